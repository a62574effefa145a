"""Tile choice of `qk_rope`: a pure function (problem, device) -> tile, as those of tiles.py."""

from __future__ import annotations

from dataclasses import dataclass

from .device import INTERPRETED, Device
from .tiles import cdiv, next_power_of_2, tuned_first

# Pairs of columns that a program of 4 warps holds at a time, by bytes of a number: 16 bytes a thread.
_PAIRS = {2: 1024, 4: 512}
_FEWEST_TOKENS = 8
# Loads are not pipelined: that many programs on an SM hide each other's latency.
_PROGRAMS_PER_SM = 8


@dataclass(frozen=True)
class QkRopeTile:
    """One program takes block_t tokens of one image through `heads` heads of q and of k, one after the other."""

    block_t: int
    heads: int
    num_warps: int


def half_width(width: int) -> int:
    """Pairs of columns of a head of this width, as a power of two."""
    return next_power_of_2(cdiv(width, 2))


def _programs(tile: QkRopeTile, batch: int, tokens: int, heads: int) -> int:
    return batch * cdiv(tokens, tile.block_t) * cdiv(heads, tile.heads)


@tuned_first(QkRopeTile)
def choose_qk_rope(batch: int, tokens: int, heads: int, width: int, itemsize: int, device: Device) -> QkRopeTile:
    """As many heads a program as leave every SM enough programs: they share what is read of cos, sin and weights.

    heads: of q or of k, whichever are more.
    """
    if device == INTERPRETED:
        # Every program and every head costs the same, whatever its size.
        return QkRopeTile(min(next_power_of_2(tokens), 1024), heads, 4)
    block_t = max(_FEWEST_TOKENS, min(_PAIRS[itemsize] // half_width(width), 64))
    wanted = _PROGRAMS_PER_SM * device.sm_count
    for each in (8, 4, 2, 1):
        tile = QkRopeTile(block_t, min(each, heads), 4)
        if _programs(tile, batch, tokens, heads) >= wanted:
            return tile
    small = QkRopeTile(_FEWEST_TOKENS, 1, 4)
    return small if _programs(tile, batch, tokens, heads) < device.sm_count else tile
