"""Forward passes of a shape seen before, repeated without their host work.

At small batches a GPU waits for Python: binding, specialising and checking the arguments of sixty launches costs more
than the launches, and a library's own forward() around them (wrappers, masks, a loop over layers that each ask whether
they may run) as much again. All of that comes out the same when a pass of the same shape meets the same parameters. So
the first pass of a shape runs as written, the second is noted, and from the third on a `Pass` makes the same launches
on new memory: results and kernels are the same bit for bit.

What a repeated pass depends on is asked each time: shape, strides, dtype, device and alignment of its inputs, and every
parameter, buffer, submodule and plain attribute of the model (`Fingerprint`). A pass may be that of a whole model, from
its images, or of one block, from whatever it is given. Passes run as written where gradients are asked for, a graph is
traced, operators are watched, or somebody has hooks in the model.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from vit_kernels.launch import active_driver, interpreting

from .fingerprint import Fingerprint
from .noted import noting
from .passes import Operators, Pass, Refused

__all__ = ["ReplayCache", "repeatable"]


def _never(hook: object) -> bool:
    return False


class ReplayCache:
    """The replays of one model or block, at most `limit` shapes, the least recently used given up first.

    Not part of any state_dict, and left out of copies and pickles. `refused` says, per kind of pass, what kept a pass
    from being repeated. listens, settings: see `Fingerprint`. operators: whether a pass may hold operators of PyTorch,
    which are made again as well; if not, one that does is refused.
    """

    def __init__(
        self,
        limit: int = 16,
        listens: Callable[[object], bool] = _never,
        *,
        operators: bool = False,
        settings: bool = False,
    ) -> None:
        self.limit = limit
        self.refused: dict[Any, str] = {}
        self._listens, self._operators, self._settings = listens, operators, settings
        self._entries: OrderedDict[tuple, Pass | None] = OrderedDict()
        self._fingerprint: Fingerprint | None = None
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forgets everything. A pass that is being noted on another thread keeps what was, and is forgotten with it."""
        self.refused = {}
        self._entries = OrderedDict()
        self._fingerprint = None

    def unchanged(self) -> bool:
        """Whether the module is known, and still what it was at the last pass that could be repeated."""
        return self._fingerprint is not None and self._fingerprint.holds()

    def refuses(self, kind: Hashable) -> bool:
        """Whether passes of this kind run as written, as far as is known before the model has been looked at."""
        return kind in self.refused or (self._fingerprint is not None and not self._fingerprint.usable)

    def run(
        self,
        kind: Hashable,
        model: nn.Module,
        inputs: Sequence[Tensor],
        forward: Callable[[], Any],
        objection: Callable[[], str | None] = lambda: None,
    ) -> Any:
        """forward(), or the same again: once it ran as written, the next time noted, then repeated.

        kind tells passes of one model apart; forward must depend on nothing but the model and the inputs, and returns
        tensors in whatever PyTorch knows as a tree. objection: asked behind a noted pass; why it must not be repeated,
        or None.
        """
        if not repeatable(inputs):
            return forward()
        fingerprint = self._fingerprint
        if fingerprint is None or not fingerprint.holds():
            self.clear()
            self._fingerprint = fingerprint = Fingerprint(model, self._listens, self._settings)
        entries, refused = self._entries, self.refused
        if kind in refused or not fingerprint.usable:
            return forward()
        key = (kind, *_layout(inputs))
        with self._lock:
            known, again = key in entries, entries.pop(key, None)
            entries[key] = again
            if len(entries) > self.limit:
                entries.popitem(last=False)
        if not known:
            return forward()
        if again is not None:
            return again(inputs)
        gpu = _on_gpu(inputs[0])
        if gpu and torch.cuda.is_current_stream_capturing():
            return forward()  # what is computed from parameters is there only once the graph runs
        with noting(inputs) as noted, Operators(noted) as operators:
            results = forward()
        try:
            made = Pass(operators, results, self._operators)
            reason = objection()
        except Refused as refusal:
            made, reason = None, str(refusal)
        if reason is not None:
            if len(refused) >= 4 * self.limit:
                refused.clear()
            refused[kind] = reason
        elif fingerprint.holds():
            if gpu and operators.constants:
                # Whoever repeats the pass may be on another stream.
                torch.cuda.current_stream(inputs[0].device).synchronize()
            # Into the table of this fingerprint: another thread may have begun a new one.
            with self._lock:
                entries[key] = made
        return results

    def __getstate__(self) -> dict[str, object]:
        return {
            "limit": self.limit, "listens": self._listens, "operators": self._operators, "settings": self._settings
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def _on_gpu(tensor: Tensor) -> bool:
    # A sanitizer may call its tensors on the CPU "cuda": there is no stream to ask then.
    return tensor.device.type == "cuda" and torch.cuda.is_initialized()


def _layout(inputs: Sequence[Tensor]) -> list[object]:
    """What has to be alike for a pass to be repeated: Triton's driver, and of each input shape, strides, dtype, device,
    alignment, and where in memory it lies, from the first input on, if it shares that with another."""
    homes: dict[int, int] = {}
    found: list[object] = [active_driver()]
    for x in inputs:
        address = x.data_ptr()
        home = homes.setdefault(x.untyped_storage().data_ptr(), address) if len(inputs) > 1 else address
        found.append((x.shape, x.stride(), x.dtype, x.device, address % 16 == 0, address - home))
    return found


def repeatable(inputs: Sequence[Tensor]) -> bool:
    """Whether a pass may be made without its host work: nobody asks for gradients in either mode, traces or watches
    operators, and the kernels are not interpreted."""
    return (
        all(type(x) is Tensor and x.numel() > 0 and x.device.type != "meta" for x in inputs)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[reportPrivateImportUsage]
        and not interpreting()
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and _get_current_dispatch_mode() is None
    )
