"""Forward passes of a shape seen before, repeated launch by launch without their host work.

At small batches a GPU waits for Python: binding, specialising and checking the arguments of sixty launches costs more
than the launches. All of that comes out the same when a forward pass of the same shape meets the same parameters. So
the first pass of a shape runs as written, the second is noted on a tape (`vit_kernels.launch.taped`), and from the
third on a `Replay` makes the same launches on new addresses: results and kernels are the same bit for bit.

What a replay depends on is asked each time: shape, strides, dtype, device and alignment of its inputs, and every
parameter, buffer, submodule and plain attribute of the model (`Fingerprint`). A pass may be that of a whole model, from
its images, or of one block, from whatever it is given. It needs no gradients, no graph being
traced, no operator being watched, and nobody's hooks in the model; anything else runs as written.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from vit_kernels.launch import (
    Launched,
    Tape,
    active_driver,
    at_address,
    interpreting,
    launching_on,
    taped,
    tensor_behind,
)
from vit_kernels.repeating import Again, repeat

from .arena import Buffer, pack
from .derived import optimizer_steps

__all__ = ["Fingerprint", "Replay", "ReplayCache", "repeatable"]

_PLACES = 8  # so many sets of addresses of a launch are remembered
ARENA = 0  # what an address of a replay is relative to; the results and the inputs have the numbers from 1 on


def _never(hook: object) -> bool:
    return False


class Fingerprint:
    """Whether a module is still what it was, asked in a few dozen microseconds for a ViT.

    Compares the submodules, parameters and buffers by identity, tensors also by address and autograd's version counter,
    and of every submodule the class, its forward() and one set on the instance, the mode and the plain attributes
    (numbers, strings, booleans; tensors as parameters are). As with any cache that stands on version counters, writing
    through `.data` goes unseen, and so does writing into tensors of inference mode, which have no counter.

    listens: tells the hooks that a replay may leave out, because they only listen and have nothing to hear.
    settings: looks into the `config` objects of the submodules, too, for code that asks them in every pass.
    """

    def __init__(self, module: nn.Module, listens: Callable[[object], bool] = _never, settings: bool = False) -> None:
        self._parts = list(module.modules())
        self._kinds = list(map(type, self._parts))
        self._classes = list(set(self._kinds))
        self._methods = list(map(_forward_of, self._classes))
        self._attributes = list(map(vars, self._parts))
        self._forwards = self._own_forwards()
        self._modes = list(map(_mode, self._attributes))
        # A replay would leave out what hooks do. Those of the module itself run around it.
        self._inside = [vars(part) for part in self._parts if part is not module]
        self._hooks = self._hook_numbers()
        tables = [table[name] for table in self._inside for name in ("_forward_hooks", "_forward_pre_hooks")]
        self.usable = not _has_any_global_hook() and all(listens(h) for hooks in tables for h in hooks.values())
        if not self.usable:
            return
        entries: list[tuple[dict[str, Any], str, object]] = []
        configs: dict[int, object] = {}  # many submodules share one
        self._tensors: list[Tensor] = []
        for part in self._parts:
            attributes = vars(part)
            for name, value in attributes.items():
                if isinstance(value, (int, float, str)) and name != "training" and not name.startswith("_"):
                    entries.append((attributes, name, value))
                elif isinstance(value, Tensor):  # put where a parameter was
                    entries.append((attributes, name, value))
                    self._tensors.append(value)
            for table in (part._modules, part._parameters, part._buffers):
                entries += [(table, name, value) for name, value in table.items()]
            if settings and hasattr(attributes.get("config"), "__dict__"):
                entries.append((attributes, "config", attributes["config"]))
                configs[id(attributes["config"])] = attributes["config"]
            self._tensors += [t for t in (*part._parameters.values(), *part._buffers.values()) if t is not None]
        for config in configs.values():
            entries += [(vars(config), name, value) for name, value in vars(config).items()]
        if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in self._tensors):
            self.usable = False  # of other classes it is not known what an address says
            return
        self._tables, self._names, self._values = zip(*entries, strict=True) if entries else ((), (), ())
        # What is added later is in no entry.
        tables = [(part._modules, part._parameters, part._buffers) for part in self._parts]
        self._sized = [table for three in tables for table in three] + [vars(config) for config in configs.values()]
        self._sizes = list(map(len, self._sized))
        self._trained = any(tensor.requires_grad for tensor in self._tensors)
        self._steps = optimizer_steps()
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._counting = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._versions = list(map(_version, self._counting))

    def holds(self) -> bool:
        """True while nothing has changed; False, too, for a module with hooks inside or tensors of other classes."""
        # Whole tables in C: this is asked before every pass.
        return (
            self.usable
            and not _has_any_global_hook()
            and self._hooks_hold()
            and list(map(type, self._parts)) == self._kinds
            and list(map(_forward_of, self._classes)) == self._methods
            and list(map(_mode, self._attributes)) == self._modes
            and self._own_forwards() == self._forwards
            and list(map(len, self._sized)) == self._sizes
            and all(map(is_, map(dict.get, self._tables, self._names), self._values))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(_version, self._counting)) == self._versions
            and (not self._trained or optimizer_steps() == self._steps)
        )

    def _own_forwards(self) -> list[object]:
        return list(map(dict.get, self._attributes, itertools.repeat("forward")))

    def _hooks_hold(self) -> bool:
        if any(self._hooks):
            return self._hook_numbers() == self._hooks
        # As nearly always: whether there are any costs a tenth of which there are.
        return not (any(map(_hooks_of, self._inside)) or any(map(_pre_hooks_of, self._inside)))

    def _hook_numbers(self) -> list[tuple[int, ...]]:
        """The numbers of the hooks inside, in the tables that are there now: whoever clears hooks may replace them."""
        return [*map(tuple, map(_hooks_of, self._inside)), *map(tuple, map(_pre_hooks_of, self._inside))]


_forward_of = attrgetter("forward")
_mode = itemgetter("training")
_hooks_of = itemgetter("_forward_hooks")
_pre_hooks_of = itemgetter("_forward_pre_hooks")
_version = attrgetter("_version")


class Replay:
    """The launches of one pass, ready to be made again for other inputs of the same shapes.

    Intermediate results lie in one allocation, each where another's memory is no longer needed.
    """

    def __init__(self, tape: Tape, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        numbers = {t.untyped_storage().data_ptr(): i for i, t in enumerate(tape.allocated)}
        places: dict[int, int] = {}  # number of an allocation, to that of the result which it is
        for place, result in enumerate(results, 1):
            number = numbers.get(result.untyped_storage().data_ptr())
            if number is None or not result.is_contiguous() or result.nbytes != result.untyped_storage().nbytes():
                raise ValueError("a result is not what one launch wrote")
            places[number] = place
        # Where inputs share memory, addresses are kept relative to the first of them: the key of a pass holds the rest.
        homes: dict[int, tuple[int, int]] = {}
        for place, given in enumerate(inputs, 1 + len(results)):
            homes.setdefault(given.untyped_storage().data_ptr(), (place, given.data_ptr()))
        offsets, self.arena_bytes = pack(_lifetimes(tape, numbers, places))
        self._like = inputs[0].device
        self._results = [(result.shape, result.dtype) for result in results]
        self._kept: list[Tensor] = []
        self._launches: list[tuple[Any, tuple[int, ...], list[Any], list[tuple[int, int, int]]]] = []
        for launched in tape.launches:
            fixed, moving = list(launched.arguments), []
            for at, argument in enumerate(launched.arguments):
                value = tensor_behind(argument)
                if value is None:
                    continue
                storage = value.untyped_storage().data_ptr()
                number = numbers.get(storage)
                fixed[at] = at_address(argument, 0)  # or the replay would keep the memory of the noted pass
                if number is not None:
                    inside = value.data_ptr() - storage
                    place = places.get(number, ARENA)
                    moving.append((at, place, inside if place else offsets[number] + inside))
                elif storage in homes:
                    place, address = homes[storage]
                    moving.append((at, place, value.data_ptr() - address))
                else:
                    self._kept.append(value)
                    fixed[at] = at_address(argument, value.data_ptr())
            self._launches.append((launched.compiled, launched.grid, fixed, moving))
        # Memory tends to come back at the same few addresses: each launch as it was placed there, by address.
        self._made: list[dict[tuple[int, ...], Again]] = [{} for _ in self._launches]

    def __len__(self) -> int:
        return len(self._launches)

    def _placed(self, addresses: list[int]) -> list[Again]:
        """The launches with their arguments at these addresses of arena, results and inputs."""
        placed = []
        for (compiled, grid, fixed, moving), made in zip(self._launches, self._made, strict=True):
            here = tuple([addresses[place] + offset for _, place, offset in moving])
            again = made.get(here)
            if again is None:
                arguments = fixed.copy()
                for (at, *_), address in zip(moving, here, strict=True):
                    arguments[at] = at_address(arguments[at], address)
                again = Again(Launched(compiled, grid, tuple(arguments)))
                if len(made) >= _PLACES:
                    made.clear()
                made[here] = again
            placed.append(again)
        return placed

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Inputs as they were when recorded, at any addresses of the same alignment -> the results, in new memory."""
        arena = torch.empty(self.arena_bytes, dtype=torch.uint8, device=self._like)
        results = [torch.empty(shape, dtype=dtype, device=self._like) for shape, dtype in self._results]
        with launching_on(inputs[0]):
            repeat(self._placed([x.data_ptr() for x in (arena, *results, *inputs)]))
        return results


def _lifetimes(tape: Tape, numbers: dict[int, int], places: dict[int, int]) -> dict[int, Buffer]:
    """Of the tape's allocations that are no results: size, and the launches that use it first and last."""
    first_use, last_use = {}, {}
    for place, launched in enumerate(tape.launches):
        for argument in launched.arguments:
            value = tensor_behind(argument)
            number = None if value is None else numbers.get(value.untyped_storage().data_ptr())
            if number is not None:
                first_use.setdefault(number, place)
                last_use[number] = place
    return {
        number: Buffer(tape.allocated[number].untyped_storage().nbytes(), first_use[number], last_use[number])
        for number in first_use
        if number not in places
    }


class _Watch(TorchDispatchMode):
    """Notes the operators that do work on the device beside the launchers: those a tape would miss."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "vit_engine" and not func.is_view:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class ReplayCache:
    """The replays of one model or block, at most `limit` shapes, the least recently used given up first.

    Not part of any state_dict, and left out of copies and pickles. `refused` says, per kind of pass, what kept a pass
    from being repeated. listens: see `Fingerprint`.
    """

    def __init__(self, limit: int = 16, listens: Callable[[object], bool] = _never) -> None:
        self.limit = limit
        self.refused: dict[str, str] = {}
        self._listens = listens
        self._entries: OrderedDict[tuple, Replay | None] = OrderedDict()
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

    def run(
        self, kind: str, model: nn.Module, inputs: Sequence[Tensor], forward: Callable[[], Sequence[Tensor]]
    ) -> Sequence[Tensor]:
        """forward(), or the same launches again: once it ran as written, the next time noted, then repeated.

        kind tells passes of one model apart; forward must depend on nothing but the model and the inputs.
        """
        if not repeatable(inputs):
            return forward()
        fingerprint = self._fingerprint
        if fingerprint is None or not fingerprint.holds():
            self.clear()
            self._fingerprint = fingerprint = Fingerprint(model, self._listens)
        entries, refused = self._entries, self.refused
        if kind in refused or not fingerprint.usable:
            return forward()
        key = (kind, active_driver(), *_layout(inputs))
        with self._lock:
            known, replay = key in entries, entries.pop(key, None)
            entries[key] = replay
            if len(entries) > self.limit:
                entries.popitem(last=False)
        if not known:
            return forward()
        if replay is not None:
            return replay(inputs)
        with _Watch() as watch, taped() as tape:
            results = forward()
        if watch.seen:
            refused[kind] = f"it does more than launch kernels: {', '.join(sorted(set(watch.seen)))}"
        elif tape.by_torch:
            names = ", ".join(sorted(set(tape.by_torch)))
            refused[kind] = f"the tuned file leaves part of it to PyTorch's operators: {names}"
        elif any(launched.compiled is None for launched in tape.launches):
            refused[kind] = "its launches are not Triton's own"
        elif fingerprint.holds():
            # Into the table of this fingerprint: another thread may have begun a new one.
            with self._lock:
                entries[key] = Replay(tape, inputs, results)
        return results

    def __getstate__(self) -> dict[str, object]:
        return {"limit": self.limit, "listens": self._listens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["limit"], state["listens"])


def _layout(inputs: Sequence[Tensor]) -> list[tuple]:
    """What has to be alike for a pass to be repeated: of each input shape, strides, dtype, device, alignment, and where
    in memory it lies, from the first input on, if it shares that with another."""
    homes: dict[int, int] = {}
    found = []
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
