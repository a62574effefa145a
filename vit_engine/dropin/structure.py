"""Whether a module is still built as it was when it was described: asked before every pass, in a few microseconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..class_code import replaced
from .describe import dtype_name

__all__ = ["Structure", "foreign_code", "listens", "only_listens", "plain"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# transformers puts a hook on every attention module once any output was asked for. It only listens, and blocks ask
# whether it wants anything: see other_outputs_wanted() in transformers_blocks.py.
_LISTENERS = ("transformers.utils.output_capturing",)


def _hooks(part: nn.Module) -> Iterator[object]:
    for table in _HOOKS:
        yield from getattr(part, table).values()


def listens(hook: object) -> bool:
    """Whether a hook is known to leave alone what it is shown."""
    return getattr(hook, "__module__", None) in _LISTENERS


def only_listens(hooks: dict[int, Any]) -> bool:
    """Whether these hooks, if any, are known to leave alone what they are shown."""
    return all(map(listens, hooks.values()))


def foreign_code(root: nn.Module) -> str | None:
    """What somebody put into a module that would not run if its parts were not called: a reason, or None.

    Looks at the parts below root: hooks, forward methods on instances, parametrizations, tensor subclasses, parameters
    of several precisions (of which some libraries' operators promote and most raise). Hooks on root itself run anyway.
    The classes of all of them, root's too, must have the forward() of their library.
    """
    precisions: dict[torch.dtype, str] = {}
    for name, part in root.named_modules():
        if part is root:
            tensors = list(part._parameters.items())
        else:
            for hook in _hooks(part):
                if not listens(hook):
                    return f"{name} has a hook ({getattr(hook, '__qualname__', type(hook).__name__)})"
            if "forward" in vars(part):
                return f"{name}.forward is overridden on the instance"
            tensors = [(f"{name}.{key}", value) for key, value in part._parameters.items()]
        if replaced(type(part)):
            return f"{name or 'it'}: {type(part).__qualname__}.forward was replaced on the class"
        if "parametrizations" in part._modules:
            return f"{name or 'it'} has parametrizations"
        for key, value in tensors:
            if value is None:
                continue
            if not plain(value):
                return f"{key} is a {type(value).__name__}, expected a plain Parameter"
            if value.is_floating_point():
                precisions.setdefault(value.dtype, key)
    if len(precisions) > 1:
        found = ", ".join(f"{key} is {dtype_name(dtype)}" for dtype, key in precisions.items())
        return f"its parameters have several dtypes: {found}"
    if torch_module._has_any_global_hook():
        return "global module hooks are installed"
    return None


def plain(tensor: Tensor) -> bool:
    """Whether a tensor is of no class that may mean something else than its memory says."""
    # While a graph is traced, parameters are fake tensors that stand for plain ones.
    return type(tensor) in (Tensor, nn.Parameter) or torch.compiler.is_compiling()


class Structure:
    """The submodules of a module, their classes and these' forward(), settings, hooks and precisions, at one moment.

    Values of parameters are none of its business: they are read anew by every pass.
    """

    def __init__(self, root: nn.Module) -> None:
        self._global_hooks = bool(torch_module._has_any_global_hook())
        self._types: list[tuple[nn.Module, type]] = []
        self._entries: list[tuple[dict, str, object]] = []
        self._sizes: list[tuple[dict, int]] = []
        self._hooks: list[tuple[nn.Module, str, tuple[int, ...]]] = []
        self._tensors: list[tuple[dict, str, type, torch.dtype | None]] = []
        kinds = {type(part) for part in root.modules()}
        self._forwards = [(kind, kind.forward) for kind in kinds]
        for part in root.modules():
            self._types.append((part, type(part)))
            for name, value in vars(part).items():
                if isinstance(value, (int, float, str)) and name != "training":
                    self._entries.append((vars(part), name, value))
            self._entries += [(part._modules, name, child) for name, child in part._modules.items()]
            self._hooks += [(part, table, tuple(getattr(part, table))) for table in _HOOKS]
            self._sizes += [(part._modules, len(part._modules)), (vars(part), len(vars(part)))]
            for name, value in part._parameters.items():
                self._tensors.append((part._parameters, name, type(value), None if value is None else value.dtype))

    def holds(self) -> bool:
        """True while nothing has changed."""
        for part, kind in self._types:
            if type(part) is not kind:
                return False
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return False
        for table, size in self._sizes:
            if len(table) != size:
                return False
        # In the tables that are there now: whoever clears hooks may replace them.
        for part, table, numbers in self._hooks:
            if tuple(vars(part)[table]) != numbers:
                return False
        for table, name, value in self._entries:
            if table.get(name) is not value:
                return False
        for table, name, kind, dtype in self._tensors:
            value = table.get(name)
            if type(value) is not kind or (value is not None and value.dtype is not dtype):
                return False
        return bool(torch_module._has_any_global_hook()) == self._global_hooks
