"""Forward passes of a shape seen before, repeated launch by launch without their host work.

At small batches a GPU waits for Python: binding, specialising and checking the arguments of sixty launches costs more
than the launches. All of that comes out the same when a forward pass of the same shape meets the same parameters. So
the first pass of a shape runs as written, the second is noted on a tape (`vit_kernels.launch.taped`), and from the
third on a `Replay` makes the same launches on new addresses: results and kernels are the same bit for bit.

What a replay depends on is asked each time: shape, strides, dtype, device and alignment of the images, and every
parameter, buffer, submodule and plain attribute of the model (`Fingerprint`). It needs no gradients, no graph being
traced, no operator being watched, and nobody's hooks in the model; anything else runs as written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from operator import itemgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from vit_kernels.launch import Launched, Tape, active_driver, interpreting, launching_on, repeat, taped

from .arena import Buffer, pack

__all__ = ["Fingerprint", "Replay", "ReplayCache"]

ARENA, RESULT, IMAGES = range(3)  # what an address of a replay is relative to


class Fingerprint:
    """Whether a module is still what it was, asked in a few dozen microseconds for a ViT.

    Compares the submodules, parameters and buffers by identity, tensors also by address and autograd's version counter,
    and of every submodule the class, the mode, a forward() set on the instance and the plain attributes (numbers,
    strings, booleans). As with any cache that stands on version counters, writing through `.data` goes unseen.
    """

    def __init__(self, module: nn.Module) -> None:
        self._entries: list[tuple[dict[str, Any], str, object]] = []
        self._tensors: list[tuple[Tensor, int, int]] = []
        self._parts = list(module.modules())
        self._kinds = list(map(type, self._parts))
        self._attributes = list(map(vars, self._parts))
        self._forwards = list(map(_own_forward, self._attributes))
        self._modes = list(map(_mode, self._attributes))
        # A replay would leave out what hooks do. Those of the module itself run around it.
        inside = [part for part in self._parts if part is not module]
        self._hooks = [hooks for part in inside for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self.usable = not self._has_hooks()
        if not self.usable:
            return
        for part in self._parts:
            attributes = vars(part)
            for name, value in attributes.items():
                if isinstance(value, (int, float, str)) and name != "training" and not name.startswith("_"):
                    self._entries.append((attributes, name, value))
            for table in (part._modules, part._parameters, part._buffers):
                self._entries += [(table, name, value) for name, value in table.items()]
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is None:
                    continue
                if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
                    self.usable = False  # no version to ask for
                    return
                self._tensors.append((tensor, tensor._version, tensor.data_ptr()))

    def _has_hooks(self) -> bool:
        return any(self._hooks) or bool(_has_any_global_hook())

    def holds(self) -> bool:
        """True while nothing has changed; False, too, for a module with hooks inside, or with tensors that have no
        version counter."""
        if not self.usable or self._has_hooks():
            return False
        # Whole tables in C: this is asked before every pass.
        if list(map(type, self._parts)) != self._kinds or list(map(_mode, self._attributes)) != self._modes:
            return False
        if list(map(_own_forward, self._attributes)) != self._forwards:
            return False
        for table, name, value in self._entries:
            if table.get(name) is not value:
                return False
        return all(t._version == version and t.data_ptr() == address for t, version, address in self._tensors)


_mode = itemgetter("training")
_own_forward = methodcaller("get", "forward")


class Replay:
    """The launches of one forward pass, ready to be made again for other images of the same shape.

    Intermediate results lie in one allocation, each where another's memory is no longer needed.
    """

    def __init__(self, tape: Tape, images: Tensor, result: Tensor) -> None:
        numbers = {t.untyped_storage().data_ptr(): i for i, t in enumerate(tape.allocated)}
        last = numbers.get(result.untyped_storage().data_ptr())
        if last is None or not result.is_contiguous() or result.nbytes != result.untyped_storage().nbytes():
            raise ValueError("the result is not what one launch wrote")
        first_use, last_use = {}, {}
        for place, launched in enumerate(tape.launches):
            for value in launched.arguments:
                number = numbers.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None
                if number is not None:
                    first_use.setdefault(number, place)
                    last_use[number] = place
        buffers = {
            number: Buffer(tape.allocated[number].untyped_storage().nbytes(), first_use[number], last_use[number])
            for number in first_use
            if number != last
        }
        offsets, self.arena_bytes = pack(buffers)
        self._like, self._shape, self._dtype = images.device, result.shape, result.dtype
        self._kept: list[Tensor] = []
        self._launches: list[tuple[Any, tuple[int, ...], list[Any], list[tuple[int, int, int]]]] = []
        home = images.untyped_storage().data_ptr()
        for launched in tape.launches:
            fixed, moving = list(launched.arguments), []
            for at, value in enumerate(launched.arguments):
                if not isinstance(value, Tensor):
                    continue
                storage = value.untyped_storage().data_ptr()
                number = numbers.get(storage)
                if number is not None:
                    inside = value.data_ptr() - storage
                    moving.append((at, RESULT, inside) if number == last else (at, ARENA, offsets[number] + inside))
                elif storage == home:
                    moving.append((at, IMAGES, value.data_ptr() - images.data_ptr()))
                else:
                    self._kept.append(value)
                    fixed[at] = value.data_ptr()
            self._launches.append((launched.compiled, launched.grid, fixed, moving))
        # Launches that touch neither images nor result stay as they are while the arena comes back at one address.
        self._inside = {
            number
            for number, (*_, moving) in enumerate(self._launches)
            if all(kind == ARENA for _, kind, _ in moving)
        }
        self._last: tuple[int, list[Launched]] | None = None

    def __len__(self) -> int:
        return len(self._launches)

    def _placed(self, addresses: tuple[int, int, int]) -> list[Launched]:
        """The launches with their arguments at these addresses of arena, result and images."""
        cached = self._last
        same_arena = cached is not None and cached[0] == addresses[ARENA]
        placed = []
        for number, (compiled, grid, fixed, moving) in enumerate(self._launches):
            if same_arena and number in self._inside:
                placed.append(cached[1][number])  # type: ignore[index]
                continue
            arguments = fixed.copy()
            for at, kind, offset in moving:
                arguments[at] = addresses[kind] + offset
            placed.append(Launched(compiled, grid, tuple(arguments)))
        self._last = addresses[ARENA], placed
        return placed

    def __call__(self, images: Tensor) -> Tensor:
        """images as they were when recorded, at any address of the same alignment -> the pass's result, new memory."""
        arena = torch.empty(self.arena_bytes, dtype=torch.uint8, device=self._like)
        result = torch.empty(self._shape, dtype=self._dtype, device=self._like)
        with launching_on(images):
            repeat(self._placed((arena.data_ptr(), result.data_ptr(), images.data_ptr())))
        return result


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
    """The replays of one model, at most `limit` shapes, the least recently used given up first.

    Not part of any state_dict, and left out of copies and pickles. `refused` says, per kind of pass, what kept a pass
    from being repeated.
    """

    def __init__(self, limit: int = 16) -> None:
        self.limit = limit
        self.refused: dict[str, str] = {}
        self._entries: OrderedDict[tuple, Replay | None] = OrderedDict()
        self._fingerprint: Fingerprint | None = None

    def clear(self) -> None:
        """Forgets everything."""
        self.refused.clear()
        self._entries.clear()
        self._fingerprint = None

    def run(self, kind: str, model: nn.Module, images: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        """forward(), or the same launches again: once it ran as written, the next time noted, then repeated.

        kind tells passes of one model apart; forward must depend on nothing but the model and the images.
        """
        if not _repeatable(images):
            return forward()
        if self._fingerprint is None or not self._fingerprint.holds():
            self.clear()
            self._fingerprint = Fingerprint(model)
        if kind in self.refused or not self._fingerprint.usable:
            return forward()
        aligned = images.data_ptr() % 16 == 0
        key = (kind, active_driver(), images.shape, images.stride(), images.dtype, images.device, aligned)
        if key not in self._entries:
            self._entries[key] = None
            if len(self._entries) > self.limit:
                self._entries.popitem(last=False)
            return forward()
        replay = self._entries[key]
        self._entries.move_to_end(key)
        if replay is not None:
            return replay(images)
        return self._record(kind, key, images, forward)

    def _record(self, kind: str, key: tuple, images: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        with _Watch() as watch, taped() as tape:
            result = forward()
        if watch.seen:
            self.refused[kind] = f"it does more than launch kernels: {', '.join(sorted(set(watch.seen)))}"
        elif any(launched.compiled is None for launched in tape.launches):
            self.refused[kind] = "its launches are not Triton's own"
        else:
            self._entries[key] = Replay(tape, images, result)
        return result

    def __getstate__(self) -> dict[str, object]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["limit"])


def _repeatable(images: Tensor) -> bool:
    return (
        type(images) is Tensor
        and not torch.compiler.is_compiling()
        and not interpreting()
        and not torch.is_grad_enabled()
        and images.numel() > 0
        and images.device.type != "meta"
        and _get_current_dispatch_mode() is None
    )
