"""Tile choice of the one-kernel `mlp`."""

from __future__ import annotations

from dataclasses import dataclass

from .device import INTERPRETED, Device
from .tiles import cdiv, interpreted_block, nearest, split_width, tuned_first


@dataclass(frozen=True)
class MlpTile:
    """One program keeps block_m rows in registers and walks the hidden features block_h at a time."""

    block_m: int
    block_h: int
    num_warps: int
    num_stages: int


MLP_MAX_WIDTH = 384
# Wider, two products are faster: simulated cycle by cycle on sm_80, 89 and 90, from 7,000 rows on, one kernel takes 0.2
# to 0.95 of their time at D = 64 and 128, 0.6 to 1.1 at 192, but 1.35 to 1.7 at 256, and 1.6 to 1.9 at 384 (from 12,000
# rows on). No GPU was measured.
_FASTER_TO = 192
TWO_PRODUCTS = "two_products"  # the name of None in tuned files

_HALF_MLP = (MlpTile(64, 32, 8, 2), MlpTile(32, 32, 4, 2), MlpTile(16, 32, 4, 1))
_FLOAT_MLP = (MlpTile(16, 16, 4, 1),)


@dataclass(frozen=True)
class _Cost:
    """Cycles of a program: what a step of 32 hidden features keeps its SM busy, and what it takes alone; resident: so
    many programs share an SM."""

    resident: int
    step: int
    step_alone: int


_START = 3500  # cycles of a program before its first step and behind its last
# By capability and width, for _HALF_MLP[0]: read off the same simulation.
_COSTS = {
    80: {64: _Cost(2, 600, 680), 128: _Cost(2, 1530, 1870), 192: _Cost(1, 1730, 1730)},
    89: {64: _Cost(2, 1180, 1270), 128: _Cost(2, 2600, 2980), 192: _Cost(1, 3430, 3430)},
    90: {64: _Cost(3, 560, 840), 128: _Cost(2, 980, 1310), 192: _Cost(2, 1380, 1760)},
}


def mlp_cycles(tile: MlpTile, m: int, width: int, hidden: int, device: Device) -> float | None:
    """Modelled SM cycles of a 16-bit launch without a gate; None where there are no figures."""
    padded = sum(split_width(width, 64))
    if tile != _HALF_MLP[0] or device.capability < min(_COSTS) or padded not in (64, 128, 192):
        return None
    cost = nearest(_COSTS, device.capability)[padded]
    per_sm = cdiv(cdiv(m, tile.block_m), device.sm_count)
    steps = cdiv(hidden, tile.block_h)

    def together(programs: int) -> float:
        return _START + steps * max(programs * cost.step, cost.step_alone)

    rounds, rest = divmod(per_sm, cost.resident)
    return rounds * together(cost.resident) + (together(rest) if rest else 0.0)


def mlp_shared_bytes(tile: MlpTile, width: int, itemsize: int, operands: int) -> int:
    """Shared memory: the rows of x, num_stages slices of the weights, and the hidden features on their way to W2."""
    padded = sum(split_width(width, 64))
    weights = tile.num_stages * (operands + 1) * tile.block_h * padded
    return (tile.block_m * padded + weights + tile.block_m * tile.block_h) * itemsize


@tuned_first(MlpTile, none=TWO_PRODUCTS)
def choose_mlp(
    m: int, width: int, hidden: int, itemsize: int, device: Device, *, gated: bool = False, always: bool = False
) -> MlpTile | None:
    """The one-kernel MLP's tile, or None where two GEMMs serve better.

    Every program reads all weights, so the tallest tile that fits is the best one; with fewer row tiles than SMs the
    GEMMs, which also split the columns, keep more of the GPU busy. They also serve better beyond a width of 192, where
    the accumulator leaves no room for a tall tile and a long step, and in fp32, where the registers hold few rows.
    always: whatever serves better, up to a width of 384.
    """
    if width > (MLP_MAX_WIDTH if always else _FASTER_TO) or (itemsize == 4 and not always):
        return None
    if device == INTERPRETED:
        return MlpTile(interpreted_block(m), interpreted_block(hidden), 4, 1)
    for tile in _HALF_MLP if itemsize == 2 else _FLOAT_MLP:
        fits = mlp_shared_bytes(tile, width, itemsize, 2 if gated else 1) <= device.shared_memory - 1024
        if fits and (always or cdiv(m, tile.block_m) >= device.sm_count):
            return tile
    return None
