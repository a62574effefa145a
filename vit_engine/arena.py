"""Several buffers in one allocation, each where another's memory is no longer needed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["ALIGNMENT", "Buffer", "pack"]

ALIGNMENT = 256  # bytes; what PyTorch's own CUDA allocations keep at least, and TMA needs 16 to 128 of

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Buffer:
    """nbytes of memory that steps first to last, both included, use."""

    nbytes: int
    first: int
    last: int


def pack(buffers: Mapping[Key, Buffer]) -> tuple[dict[Key, int], int]:
    """Offsets of the buffers in one allocation, and its size in bytes; all are multiples of ALIGNMENT.

    Two buffers share memory only if their steps are disjoint. The largest are placed first, each at the lowest offset
    that is free during all of its steps.
    """
    placed: list[tuple[int, int, Buffer]] = []  # begin, end, buffer
    offsets: dict[Key, int] = {}
    for key, buffer in sorted(buffers.items(), key=lambda item: (-item[1].nbytes, item[1].first)):
        size = -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
        begin = 0
        for low, high, other in sorted(placed, key=lambda entry: entry[0]):
            if other.first <= buffer.last and buffer.first <= other.last and low < begin + size:
                begin = max(begin, high)
        placed.append((begin, begin + size, buffer))
        offsets[key] = begin
    return offsets, max((end for _, end, _ in placed), default=0)
