"""What one forward pass did: its launches, and the memories that they worked on, none of which is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from vit_kernels.launch import Launched, at_address, taped, tensor_behind

__all__ = ["Memory", "Noted", "Placed", "noting"]


class Memory(NamedTuple):
    """A memory by the tensor that it was made as. nbytes: of all of it; element: where in it that tensor begins."""

    address: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    element: int
    nbytes: int


class Placed(NamedTuple):
    """An argument of a kernel that lies in a memory of the pass, `offset` bytes behind the begin of its tensor.

    argument: the same at the address 0, a number or a descriptor.
    """

    argument: object
    number: int
    offset: int


class Noted:
    """memories: the inputs first, then what launchers allocated and what else was added, by number; launches: with
    `Placed` for every argument in one of these; allocated: the numbers of what launchers allocated.

    Tensors are not kept, so that noting a pass takes no more memory than making it. Numbers are found by the storage,
    of which what remains when its memory is freed is kept, so that no other takes its place.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.device = inputs[0].device
        self.memories: list[Memory] = []
        self.launches: list[Launched] = []
        self.allocated: list[int] = []
        self.by_torch: list[str] = []
        self._numbers: dict[int, int] = {}
        self._storages: list[StorageWeakRef] = []
        for tensor in inputs:
            self.add(tensor)

    def add(self, tensor: Tensor) -> int:
        """The number of the memory that this tensor was made as."""
        storage, number = tensor.untyped_storage(), len(self.memories)
        self._storages.append(StorageWeakRef(storage))
        self._numbers.setdefault(storage._cdata, number)
        element = int(tensor.storage_offset())
        made_as = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, element, storage.nbytes()
        self.memories.append(Memory(*made_as))
        return number

    def number(self, tensor: Tensor) -> int | None:
        """Of the memory that holds this tensor, None for one that is not of the pass."""
        return self._numbers.get(tensor.untyped_storage()._cdata)

    def placed(self, argument: object) -> object:
        """A kernel's argument as `Placed` if it lies in a memory of the pass."""
        tensor = tensor_behind(argument)
        number = None if tensor is None else self.number(tensor)
        if tensor is None or number is None:
            return argument
        return Placed(at_address(argument, 0), number, tensor.data_ptr() - self.memories[number].address)


class _Allocated(list):
    """The place of `Tape.allocated`."""

    def __init__(self, noted: Noted) -> None:
        super().__init__()
        self._noted = noted

    def append(self, tensor: Tensor) -> None:
        self._noted.allocated.append(self._noted.add(tensor))


class _Launched(list):
    """The place of `Tape.launches`."""

    def __init__(self, noted: Noted) -> None:
        super().__init__()
        self._noted = noted

    def append(self, launched: Launched) -> None:
        arguments = tuple(map(self._noted.placed, launched.arguments))
        self._noted.launches.append(launched._replace(arguments=arguments))


@contextmanager
def noting(inputs: Sequence[Tensor]) -> Iterator[Noted]:
    """Notes what launchers do in this block, on this thread."""
    noted = Noted(inputs)
    with taped() as tape:
        tape.launches, tape.allocated, tape.by_torch = _Launched(noted), _Allocated(noted), noted.by_torch
        yield noted
