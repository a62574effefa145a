"""What the tile choices of all operations share: arithmetic on widths, rates of the units, and the row-wise tile.

A tile choice is a pure function (problem, dtype size, device) -> tile, in a file beside its operation: what was
measured to be fastest on the device (`device.tuned`) where this very problem was, and else the candidate with the least
modelled time. Nothing is measured at run time and nothing asks the machine. The candidates are few, and those that a
preset model gets compile without register spills for every supported GPU.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from .checks import short
from .device import Device

Entry = TypeVar("Entry")
# What beside the arguments of a chooser names a problem, as pairs of a name and a value.
Call = tuple[tuple[str, Hashable], ...]


class _Own(enum.Enum):
    TORCH = "torch"


# In place of a tile: PyTorch's own operators were measured to be fastest (`with_torch`).
TORCH = _Own.TORCH


def described(kernel: str, dtype: torch.dtype, **options: Any) -> Call:
    """The launcher's name, the dtype and the options of a call, tensors as whether they are given."""
    named = ((name, value if isinstance(value, (str, int)) else value is not None) for name, value in options.items())
    return (("kernel", kernel), ("dtype", short(dtype)), *named)


def tuned_first(tile: type, none: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a chooser: what `device.tuned` holds for exactly this problem, else what the chooser models; cached.

    tile: the class of its tiles; none: the name in tuned files of its choice None. The problem is the chooser's
    arguments but for the device and the dtype's size, and `call` (`described`), a keyword that the decorated chooser
    has beside them: without it nothing is looked up.
    """

    def decorate(choose: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(choose)
        device_at = list(signature.parameters).index("device")
        modelled = functools.lru_cache(maxsize=4096)(choose)

        @functools.lru_cache(maxsize=4096)
        def looked_up(arguments: tuple[Any, ...], options: tuple[tuple[str, Any], ...], call: Call) -> Any:
            winner = None
            if call:
                problem = problem_of(signature, arguments, dict(options), call)
                winner = arguments[device_at].tuned.winner(problem)
            if winner is None:
                plain = list(arguments)
                plain[device_at] = replace(plain[device_at], tuned=None)
                return modelled(*plain, **dict(options))
            if isinstance(winner, str):
                return None if winner == none else _Own(winner)
            return tile(**winner)

        @functools.wraps(choose)
        def chosen(*arguments: Any, call: Call = (), **options: Any) -> Any:
            if arguments[device_at].tuned is None:
                return modelled(*arguments, **options)
            return looked_up(arguments, tuple(sorted(options.items())), call)

        return chosen

    return decorate


def problem_of(
    signature: inspect.Signature, arguments: Sequence[Any], options: Mapping[str, Any], call: Call
) -> dict[str, Any]:
    """The named fields of what a chooser was asked, as they stand in tuned files, `kernel` among them."""
    bound = signature.bind(*arguments, **options)
    bound.apply_defaults()
    asked = {name: value for name, value in bound.arguments.items() if name not in ("device", "itemsize")}
    return {**asked, **dict(call)}


@dataclass(frozen=True)
class RowsTile:
    """Rows and columns of one program of a row-wise kernel."""

    block_m: int
    block_n: int
    num_warps: int


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def split_width(width: int, least_main: int = 16) -> tuple[int, int]:
    """A width as two powers of two (main, tail) of at least 16 each, or one (tail 0), that cover it with little waste.

    tl.dot takes powers of two; 80 as 64 + 16 costs 80 columns of work where 128 would cost 128. A width whose main part
    would be under least_main stays in one piece.
    """
    whole = max(next_power_of_2(width), 16)
    main = whole // 2
    tail = max(next_power_of_2(width - main), 16)
    if main < least_main or main + tail >= whole:
        return whole, 0
    return main, tail


@tuned_first(RowsTile)
def choose_rows(m: int, n: int, itemsize: int, device: Device) -> RowsTile:
    """Whole rows up to 4096 columns: about 2048 elements a program, or one row where that leaves SMs without any."""
    block_n = min(next_power_of_2(n), 4096)
    block_m = max(1, min(2048 // block_n, 32))
    if cdiv(m, block_m) < device.sm_count:
        block_m = 1
    return RowsTile(block_m, block_n, 8 if block_n >= 4096 else 4)


# Dense multiply-adds count two. Tensor-core FLOP per clock and SM with fp32 accumulation, by compute capability.
TENSOR_RATE = {80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
FP32_RATE = {80: 128, 86: 256, 89: 256, 90: 256, 100: 256, 120: 256}
L2_BYTES_PER_CLOCK = 48

# Data-centre Blackwell keeps accumulators in tensor memory and reads all of one back for the epilogue:
# the largest tiles spill there.
TENSOR_MEMORY = range(100, 120)


def nearest(table: Mapping[int, Entry], capability: int) -> Entry:
    """The entry of the newest listed GPU that is not newer than this one."""
    return table[max(c for c in table if c <= max(capability, min(table)))]


def interpreted_block(size: int) -> int:
    """The interpreter pays for every program and every element: few programs, little padding."""
    return min(128, max(16, next_power_of_2(size)))
