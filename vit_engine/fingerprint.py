"""Whether a model is still what it was: what repeated passes and CUDA graphs stand on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .derived import optimizer_steps

__all__ = ["Fingerprint"]


def _never(hook: object) -> bool:
    return False


class Fingerprint:
    """Whether a module is still what it was, asked in a few dozen microseconds for a ViT.

    Compares the submodules, parameters and buffers by identity, tensors also by address and autograd's version counter,
    and of every submodule the class, its forward() and one set on the instance, the mode and the plain attributes
    (numbers, strings, booleans; tensors as parameters are). As with any cache that stands on version counters, writing
    through `.data` goes unseen, and so does writing into tensors of inference mode, which have no counter.

    listens: says which hooks a replay may leave out, because they only listen and have nothing to hear.
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
