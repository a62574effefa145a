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
TWO_PRODUCTS = "two_products"  # the name of None in tuned files

_HALF_MLP = (MlpTile(64, 32, 8, 2), MlpTile(32, 32, 4, 2), MlpTile(16, 32, 4, 1))
_FLOAT_MLP = (MlpTile(16, 16, 4, 1),)
# Before those, by capability: tall tiles where shared memory is large, as every program reads all weights.
_TALL: dict[int, tuple[MlpTile, ...]] = {
    80: (MlpTile(128, 32, 8, 3),),
    86: (),
    90: (MlpTile(128, 64, 8, 3), MlpTile(128, 32, 8, 3)),
    120: (),
}
# Wider, two products are faster or as fast: simulated cycle by cycle on sm_80, 89 and 90, at 12,608 rows, one kernel
# takes 0.6 to 0.85 of their time at D = 192, but 1.0 (sm_90) to 1.5 at 256, and 1.2 to 1.8 at 384. No GPU was measured.
_FASTER_TO = 192


@dataclass(frozen=True)
class _Cost:
    """Cycles of a program: what a step keeps its SM busy, and what it takes alone; resident: so many share an SM."""

    resident: int
    step: int
    step_alone: int


_START = 3500  # cycles of a program before its first step and behind its last
# By capability and width, for the first tile there: read off the same simulation.
_COSTS = {
    80: {64: _Cost(2, 1280, 1410), 128: _Cost(1, 2290, 2290), 192: _Cost(1, 3110, 3110)},
    89: {64: _Cost(2, 1200, 1260), 128: _Cost(2, 2620, 2980), 192: _Cost(1, 3450, 3450)},
    90: {64: _Cost(2, 1550, 1660), 128: _Cost(1, 2370, 2370), 192: _Cost(1, 3180, 3180)},
}


def mlp_cycles(tile: MlpTile, m: int, width: int, hidden: int, device: Device) -> float | None:
    """Modelled SM cycles of a 16-bit launch without a gate; None where there are no figures."""
    padded = sum(split_width(width, 64))
    costs = _COSTS.get(device.capability, {})
    if padded not in costs or tile != (*nearest(_TALL, device.capability), *_HALF_MLP)[0]:
        return None
    cost = costs[padded]
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

    Every program reads all weights, so the tallest tile that fits is the best one; with fewer rows than 64 an SM the
    GEMMs, which also split the columns, keep more of the GPU busy. They also serve better beyond a width of 192, where
    the accumulator leaves no room for a tall tile and a long step, and in fp32, where the registers hold few rows.
    always: whatever serves better, up to a width of 384.
    """
    if width > (MLP_MAX_WIDTH if always else _FASTER_TO) or (itemsize == 4 and not always):
        return None
    if device == INTERPRETED:
        return MlpTile(interpreted_block(m), interpreted_block(hidden), 4, 1)
    for tile in (*nearest(_TALL, device.capability), *_HALF_MLP) if itemsize == 2 else _FLOAT_MLP:
        fits = mlp_shared_bytes(tile, width, itemsize, 2 if gated else 1) <= device.shared_memory - 1024
        if fits and (always or cdiv(m, min(tile.block_m, 64)) >= device.sm_count):
            return tile
    return None
