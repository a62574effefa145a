"""What one tensor-core instruction of the machine code does: its FLOP, and the operands it reads from shared memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vit_bench.sass import Instruction

# mma of one warp, wgmma, tcgen05.mma; the letter in front stands for the operands.
_OPCODE = re.compile(r"[HQIDBO]G?MMA|UTC[HQIO]MMA")

_WARP = re.compile(r"HMMA\.168(16|8)\.F32(\.BF16|\.TF32)?")
_WARPGROUP = re.compile(r"HGMMA\.64x(\d+)x(\d+)\.F32(\.BF16|\.TF32)?")
_DESCRIPTOR = re.compile(r"idesc\[(UR\d+)\]")
_FORMATS = {0: 2, 1: 2, 2: 4}  # bytes of an element: fp16, bf16, tf32


@dataclass(frozen=True)
class Product:
    """One matrix product [m, k] x [k, n].

    warps: those that make it together: one (HMMA), four (HGMMA), or 0 for all of the CTA (UTCHMMA); itemsize: bytes of
    an operand's element; shared_bytes: what the instruction itself reads from shared memory.
    """

    m: int
    n: int
    k: int
    warps: int
    itemsize: int
    shared_bytes: int = 0

    @property
    def flops(self) -> int:
        """A multiply-add is two."""
        return 2 * self.m * self.n * self.k


def is_tensor(instruction: Instruction) -> bool:
    """Whether tensor cores execute it."""
    return _OPCODE.fullmatch(instruction.base) is not None


def product(code: Sequence[Instruction], position: int) -> Product:
    """The product that the tensor-core instruction at `position` of the listing `code` computes.

    Raises ValueError for one that is not fp16, bf16 or tf32 with fp32 sums: nothing here uses others, and a guess would
    make a wrong bound.
    """
    instruction = code[position]
    if match := _WARP.fullmatch(instruction.opcode):
        return Product(16, 8, int(match[1]), warps=1, itemsize=_itemsize(match[2]))
    if match := _WARPGROUP.fullmatch(instruction.opcode):
        n, k, itemsize = int(match[1]), int(match[2]), _itemsize(match[3])
        # One descriptor operand stands for both factors; the first one may be in registers, and then precedes it.
        rows = n + (64 if instruction.operands.split(",")[1].strip().startswith("gdesc") else 0)
        return Product(64, n, k, warps=4, itemsize=itemsize, shared_bytes=rows * k * itemsize)
    if instruction.opcode == "UTCHMMA":
        return _described_product(code, position)
    raise ValueError(f"tensor-core instruction {instruction.opcode!r}: vit_bench.tensor_ops does not know its shape")


def _itemsize(modifier: str | None) -> int:
    return 4 if modifier == ".TF32" else 2


def _described_product(code: Sequence[Instruction], position: int) -> Product:
    """tcgen05.mma: the shape is in its instruction descriptor (PTX ISA, "Instruction descriptor"), a constant."""
    instruction = code[position]
    register = _DESCRIPTOR.search(instruction.operands)
    word = None if register is None else _constant(code, position, register[1])
    if word is None or word >> 7 & 7 not in _FORMATS or word >> 4 & 3 != 1:
        raise ValueError(f"tensor-core instruction {instruction.operands!r}: no descriptor of a 16-bit or tf32 product")
    itemsize = _FORMATS[word >> 7 & 7]
    m, n, k = (word >> 24 & 31) << 4, (word >> 17 & 63) << 3, 32 // itemsize
    rows = n + (m if instruction.operands.startswith("gdesc") else 0)
    return Product(m, n, k, warps=0, itemsize=itemsize, shared_bytes=rows * k * itemsize)


def _constant(code: Sequence[Instruction], position: int, register: str) -> int | None:
    """The constant that the nearest instruction before `position` wrote into a uniform register."""
    for instruction in reversed(code[:position]):
        written, _, value = instruction.operands.partition(", ")
        if written == register:
            return int(value, 16) if instruction.base == "UMOV" and value.startswith("0x") else None
    return None
