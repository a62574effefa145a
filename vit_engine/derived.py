"""Tensors derived from parameters, kept until the parameters change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["PLAIN", "DerivedCache", "lasting", "optimizer_steps", "transformed"]

SIZES = 32  # so many tensors are kept of one that depends on the size of the images
# The sources' aliases, their state, and what was derived from them.
_Entry = tuple[list[Tensor | None], list[tuple], tuple[Any, ...]]
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_steps = 0


def optimizer_steps() -> int:
    """How many steps all optimizers of this process have made."""
    return _steps


def _count_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Fused optimizers write without touching version counters, which everything here stands on: counted for them.

    It is also what PyTorch's other optimizers do, so a backward pass through what such a step has overwritten raises.
    """
    global _steps
    _steps += 1
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])


register_optimizer_step_post_hook(_count_step)


class DerivedCache:
    """Results of a function of some parameters, by key, rebuilt when any of those parameters changes.

    A change is seen by address, by autograd's version counter and by the steps of optimizers, so every ordinary way of
    writing a parameter counts (optimizers, load_state_dict, in-place operations, a new Parameter, .to()). Writing
    through `.data`, through views of other libraries (numpy, dlpack), by collectives (torch.distributed.broadcast) or
    by replayed CUDA graphs bypasses the counter, and parameters made under torch.inference_mode() have none, only an
    address: call clear() after writing to these. Not part of any state_dict, and left out of copies and pickles.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        self._sized: dict[str, dict[Hashable, _Entry]] = {}

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self._sized.clear()

    def nbytes(self) -> int:
        """Bytes that the derived tensors take beside the parameters."""
        tables: list[dict[Any, _Entry]] = [self._entries, *self._sized.values()]
        tensors = (t for table in tables for _, _, derived in table.values() for t in derived if t is not None)
        return sum(t.numel() * t.element_size() for t in tensors)

    def get(
        self, key: str, sources: list[Tensor | None], build: Callable[[], tuple[Any, ...]], size: Hashable = None
    ) -> tuple[Any, ...]:
        """build(), from the cache where that is right: a tensor and what belongs to it, tensors or None.

        It is built anew while PyTorch traces a graph or differentiates forward, for tensors without an address (fake
        ones), and while a CUDA graph is captured, whose results are there only once the graph runs. Autocast is off
        meanwhile: what is derived has the dtypes of the parameters, whoever asks first.

        size: of the images, where that matters. Of each key `SIZES` sizes are kept, the least recently used given up
        first.
        """
        if torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, sources)) or transformed():
            with _no_autocast(sources):
                return build()
        state = [_state(t) for t in sources]
        if size is None:
            table, place = self._entries, key
        else:
            table, place = self._sized.setdefault(key, {}), size
        entry = table.get(place)
        if entry is not None and entry[1] == state:
            if size is not None:
                _remember(table, size, entry)
            return entry[2]
        # A sanitizer may call its tensors on the CPU "cuda": there is no stream to ask then.
        on_gpu = torch.cuda.is_initialized() and any(t is not None and t.device.type == "cuda" for t in sources)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            with _no_autocast(sources):
                return build()
        # Outside inference mode, whose tensors could not be used outside it later.
        with torch.inference_mode(False), torch.no_grad(), _no_autocast(sources):
            derived = build()
        # The aliases keep the storages alive, so that no other tensor can come to lie at a remembered address.
        aliases = [None if t is None else t.detach() for t in sources]
        if not lasting(aliases) or not lasting(derived):
            return derived
        if on_gpu:
            # Whoever finds them may be on another stream.
            torch.cuda.current_stream(derived[0].device).synchronize()
        if size is None:
            table[place] = aliases, state, derived
        else:
            _remember(table, size, (aliases, state, derived))
        return derived

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()


def _remember(table: dict[Hashable, _Entry], size: Hashable, entry: _Entry) -> None:
    """As the last one used, which is the last one in the table."""
    table.pop(size, None)
    table[size] = entry
    if len(table) > SIZES:
        table.pop(next(iter(table)), None)


def transformed() -> bool:
    """Whether tensors may stand for more than they show: under torch.func's transforms and in forward mode."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def lasting(tensors: Iterable[Tensor | None]) -> bool:
    """Whether these results may be kept: under a mode of PyTorch's, plain tensors go in and others come out."""
    return PLAIN.issuperset(map(type, tensors))


def _no_autocast(sources: list[Tensor | None]) -> AbstractContextManager[object]:
    device = next((t.device.type for t in sources if t is not None), "meta")
    if device == "meta" or not torch.is_autocast_enabled(device):  # on meta tensors there is none to ask for
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _state(tensor: Tensor | None) -> tuple:
    if tensor is None:
        return ()
    version = None if tensor.is_inference() else (tensor._version, _steps if tensor.requires_grad else None)
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device
