"""What a forward pass reads that it did not make: noted operator by operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Reads", "is_random", "tensors_of", "written_by"]


class Reads(TorchDispatchMode):
    """Keeps the tensors that a pass reads and did not make: a graph knows their addresses and nothing else of them.

    elsewhere: other devices that it reads; random: operators that draw random numbers.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}
        self.elsewhere: set[str] = set()
        self.random: set[str] = set()
        self._device = device
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if is_random(func, args, kwargs):
            self.random.add(str(func))
        for tensor in tensors_of((args, kwargs)):
            # A number on the host goes into the launch itself; more than that would be read while the graph runs.
            if tensor.device != self._device and tensor.ndim:
                self.elsewhere.add(str(tensor.device))
            address = tensor.untyped_storage().data_ptr()
            if address not in self._made:
                self.kept[address] = tensor
        made = (tensor.untyped_storage().data_ptr() for tensor in tensors_of(result))
        self._made.update(address for address in made if address not in self.kept)
        return result


def is_random(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operator draws random numbers. Dropout and attention do unless they are told not to."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in ("train", "dropout_p"):
            default = args[place] if place < len(args) else argument.default_value
            return bool(kwargs.get(argument.name, default))
    return True


def written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among an operator's arguments that it writes to."""
    named = zip((argument.name for argument in func._schema.arguments), args, strict=False)
    given = {**dict(named), **kwargs}
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tensors_of([given.get(name) for name in written])


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
