"""Launches of a noted pass, made again on other memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vit_kernels.launch import Launched, at_address, launching_on, tensor_behind
from vit_kernels.repeating import Again, repeat

from .arena import Buffer, pack
from .noted import Noted, Placed

__all__ = ["Launches"]

_PLACES = 8  # so many sets of addresses are remembered
_ARENA = 0  # what an address is relative to; the results and what is given have the numbers from 1 on


class Launches:
    """The launches `begin` to `end` of a noted pass. given, written: numbers of the memories that they are given, and
    of those whose contents are wanted; whatever else they allocated lies in one allocation, each where another's memory
    is no longer needed."""

    def __init__(
        self, noted: Noted, given: Sequence[int], written: Sequence[int], begin: int = 0, end: int | None = None
    ) -> None:
        launches = noted.launches[begin:end]
        self.given, self.written = list(given), list(written)
        bases = {number: base for base, number in enumerate([*written, *given], 1)}
        offsets, self.arena_bytes = pack(_lifetimes(noted, launches, bases))
        self._device = noted.device
        self._results = [(noted.memories[number].shape, noted.memories[number].dtype) for number in written]
        self._kept: list[Tensor] = []
        self._launches: list[tuple[Any, tuple[int, ...], list[Any], list[tuple[int, int, int]]]] = []
        for launched in launches:
            fixed, moving = list(launched.arguments), []
            for at, argument in enumerate(launched.arguments):
                if isinstance(argument, Placed):
                    base = bases.get(argument.number, _ARENA)
                    moving.append((at, base, argument.offset + (0 if base else offsets[argument.number])))
                    fixed[at] = argument.argument
                elif (constant := tensor_behind(argument)) is not None:
                    self._kept.append(constant)
                    fixed[at] = at_address(argument, constant.data_ptr())
            self._launches.append((launched.compiled, launched.grid, fixed, moving))
        # Memory tends to come back at the same few addresses: each launch as it was placed there, and all of them.
        self._made: list[dict[tuple[int, ...], Again]] = [{} for _ in self._launches]
        self._lists: dict[tuple[int, ...], list[Again]] = {}

    def __len__(self) -> int:
        return len(self._launches)

    def _placed(self, addresses: tuple[int, ...]) -> list[Again]:
        """The launches with their arguments at these addresses of the arena, the results and what is given."""
        known = self._lists.get(addresses)
        if known is not None:
            return known
        placed = []
        for (compiled, grid, fixed, moving), made in zip(self._launches, self._made, strict=True):
            here = tuple([addresses[base] + offset for _, base, offset in moving])
            again = made.get(here)
            if again is None:
                arguments = fixed.copy()
                for (at, *_), address in zip(moving, here, strict=True):
                    arguments[at] = at_address(arguments[at], address)
                again = _kept(made, here, Again(Launched(compiled, grid, tuple(arguments))))
            placed.append(again)
        return _kept(self._lists, addresses, placed)

    def __call__(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Tensors like those noted, at any addresses of the same alignment -> what is wanted, in new memory."""
        arena = torch.empty(self.arena_bytes, dtype=torch.uint8, device=self._device)
        results = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in self._results]
        with launching_on(arena):
            repeat(self._placed(tuple([x.data_ptr() for x in (arena, *results, *given)])))
        return results


def _kept(table: dict[tuple[int, ...], Any], key: tuple[int, ...], value: Any) -> Any:
    if len(table) >= _PLACES:
        table.clear()
    table[key] = value
    return value


def _lifetimes(noted: Noted, launches: Iterable[Launched], elsewhere: Mapping[int, int]) -> dict[int, Buffer]:
    """Of the memories that lie nowhere else: their sizes, and the launches that use them first and last."""
    first_use, last_use = {}, {}
    for place, launched in enumerate(launches):
        for argument in launched.arguments:
            if isinstance(argument, Placed) and argument.number not in elsewhere:
                first_use.setdefault(argument.number, place)
                last_use[argument.number] = place
    return {n: Buffer(noted.memories[n].nbytes, first, last_use[n]) for n, first in first_use.items()}
