"""A forward pass made again: its launches, and the few operators of PyTorch among them.

An operator belongs to the pass if it draws random numbers, or reads an input or what belongs to the pass: a cast in
front of the launches, say, or a pooler behind them. Whatever else PyTorch computes meanwhile, such as the tables of a
rotary embedding, depends on the model alone, and its result is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .launches import Launches
from .noted import Noted, Placed
from .reads import is_random, tensors_of, written_by

__all__ = ["PLAIN", "Operators", "Pass", "Refused"]

PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)


class Refused(Exception):
    """Why a pass cannot be repeated."""


class _View(NamedTuple):
    """A tensor in a memory of the pass, `offset` elements behind the begin of the memory's own tensor.

    whole: it is that tensor.
    """

    number: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    whole: bool

    def of(self, memories: Sequence[Any]) -> Tensor:
        memory: Tensor = memories[self.number]
        if self.whole:
            return memory
        return memory.as_strided(self.shape, self.stride, memory.storage_offset() + self.offset)


@dataclass
class _Operator:
    """A call of an operator behind the first `at` launches, tensors of the pass among its arguments as `_View`.

    results: the numbers of the memories that it makes, None for results that lie in another one.
    """

    at: int
    function: Any
    args: Any
    kwargs: Any
    results: list[int | None]


class Operators(TorchDispatchMode):
    """Notes the operators of a pass beside what launchers do. why: what cannot be made again, if anything."""

    def __init__(self, noted: Noted) -> None:
        super().__init__()
        self.noted = noted
        self.found: list[_Operator] = []
        self.why: str | None = None
        self._fresh: dict[int, StorageWeakRef] = {}  # what was made meanwhile and is not of the pass

    @property
    def constants(self) -> bool:
        """Whether anything was made that depends on the model alone."""
        return bool(self._fresh)

    def view(self, value: Any) -> Any:
        """A tensor of the pass as `_View`; anything else stays what it is."""
        number = self.noted.number(value) if isinstance(value, Tensor) else None
        if number is None:
            return value
        memory = self.noted.memories[number]
        if memory.dtype != value.dtype:
            raise Refused("memory is read in another dtype than it was written in")
        offset = int(value.storage_offset()) - memory.element
        whole = offset == 0 and value.shape == memory.shape and value.stride() == memory.stride
        return _View(number, value.shape, value.stride(), offset, whole)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "vit_engine" or self.why is not None:
            return result
        given = tensors_of((args, kwargs))
        if is_random(func, args, kwargs) or any(self.noted.number(tensor) is not None for tensor in given):
            try:
                self._note(func, args, kwargs, result)
            except Refused as refusal:
                self.why = str(refusal)
        elif all(tensor.untyped_storage()._cdata in self._fresh for tensor in written_by(func, args, kwargs)):
            old = {tensor.untyped_storage()._cdata for tensor in given}
            for tensor in tensors_of(result):
                storage = tensor.untyped_storage()
                if storage._cdata not in old:
                    self._fresh[storage._cdata] = StorageWeakRef(storage)
        else:
            self.why = f"it writes to tensors that are not its own: {func}"
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        flat = result if isinstance(result, (tuple, list)) else [result]
        if func._schema.is_mutable:
            raise Refused(f"it writes to what it has computed: {func}")
        # tolist() of a tensor on a GPU copies it to the host, and reads it there unseen.
        if not all(isinstance(value, Tensor) and value.device == self.noted.device for value in flat):
            raise Refused(f"the host reads what it computes: {func}")
        if _depends_on_values(func, args):
            raise Refused(f"the shape of what it computes depends on values: {func}")
        if all(self.noted.number(tensor) is not None for tensor in flat):
            return  # views
        args, kwargs = tree_map(self.view, args), tree_map(self.view, kwargs)
        results = [self.noted.add(tensor) if self.noted.number(tensor) is None else None for tensor in flat]
        self.found.append(_Operator(len(self.noted.launches), func, args, kwargs, results))


def _depends_on_values(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operator gives more or fewer values for other ones; indices do if they are masks."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    masks = (torch.bool, torch.uint8)
    return func is not torch.ops.aten.index.Tensor or any(i is not None and i.dtype in masks for i in args[1])


class Pass:
    """A noted pass, ready to be made again for other inputs of the same kind. Raises Refused if it cannot be."""

    def __init__(self, operators: Operators, results: Any, with_operators: bool) -> None:
        noted, found = operators.noted, operators.found
        if found and not with_operators:
            names = sorted({str(operator.function) for operator in found})
            raise Refused(f"it does more than launch kernels: {', '.join(names)}")
        if operators.why is not None:
            raise Refused(operators.why)
        if noted.by_torch:
            names = sorted(set(noted.by_torch))
            raise Refused(f"the tuned file leaves part of it to PyTorch's operators: {', '.join(names)}")
        if not noted.launches or any(launched.compiled is None for launched in noted.launches):
            raise Refused("its launches are not Triton's own")
        leaves, self._structure = tree_flatten(results)
        self._leaves = list(map(operators.view, leaves))
        if not all(isinstance(leaf, (_View, *PLAIN)) for leaf in self._leaves):
            raise Refused("it returns what does not depend on its inputs")
        self._memories = len(noted.memories)
        self._steps: list[_Operator | Launches] = []
        # From the end, since only what is read later needs memory of its own.
        end, read = len(noted.launches), _numbers_in(self._leaves)
        for operator in reversed([None, *found]):
            begin = 0 if operator is None else operator.at
            if begin < end:
                launches = _launches(noted, begin, end, read)
                self._steps.append(launches)
                read.update(launches.given)
            if operator is not None:
                self._steps.append(operator)
                read |= _numbers_in((operator.args, operator.kwargs))
            end = begin
        self._steps.reverse()

    def __len__(self) -> int:
        """How many launches it makes."""
        return sum(len(step) for step in self._steps if isinstance(step, Launches))

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        memories: list[Any] = [*inputs, *[None] * (self._memories - len(inputs))]
        for step in self._steps:
            if isinstance(step, Launches):
                numbers, made = step.written, step([memories[number] for number in step.given])
            else:
                args, kwargs = _filled_in(step.args, memories), _filled_in(step.kwargs, memories)
                result = step.function(*args, **kwargs)
                numbers, made = step.results, result if isinstance(result, (tuple, list)) else [result]
            for number, tensor in zip(numbers, made, strict=True):
                if number is not None:
                    memories[number] = tensor
        return tree_unflatten(_filled_in(self._leaves, memories), self._structure)


def _launches(noted: Noted, begin: int, end: int, read: set[int]) -> Launches:
    """The launches from `begin` to `end`, what of their results is read later, and what they read themselves."""

    def used(begin: int, end: int) -> set[int]:
        arguments = (argument for launched in noted.launches[begin:end] for argument in launched.arguments)
        return {argument.number for argument in arguments if isinstance(argument, Placed)}

    here = used(begin, end)
    own = (here - used(0, begin)).intersection(noted.allocated)
    return Launches(noted, sorted(here - own), sorted(own & read), begin, end)


def _numbers_in(tree: Any) -> set[int]:
    """The numbers of the memories that the views in a tree lie in."""
    leaves, _ = tree_flatten(tree, is_leaf=lambda leaf: isinstance(leaf, _View))
    return {leaf.number for leaf in leaves if isinstance(leaf, _View)}


def _filled_in(tree: Any, memories: Sequence[Any]) -> Any:
    """Arguments or results with the tensors that views in them stand for now."""
    if isinstance(tree, _View):
        return tree.of(memories)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_filled_in(value, memories) for value in tree)
    if isinstance(tree, dict):
        return {name: _filled_in(value, memories) for name, value in tree.items()}
    return tree
