"""Tile choice of the one-kernel `mlp`."""

from __future__ import annotations

from dataclasses import dataclass

from .device import INTERPRETED, Device
from .tiles import cdiv, interpreted_block, nearest, split_width, tuned_first


@dataclass(frozen=True)
class MlpTile:
    """One program keeps block_m rows in registers and walks the hidden features block_h at a time.

    roles: in the kernel whose warps have roles (mlp_roles.py), where num_warps counts those that multiply, and kept
    the blocks of 64 columns of x that stay in registers.
    """

    block_m: int
    block_h: int
    num_warps: int
    num_stages: int
    roles: bool = False
    kept: int = 0


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

# Widths of the kernel whose warps have roles (mlp_roles.py), with the slots that fit beside a block of x; and of these
# the one that was measured: on an H100 at 12,608 rows 22.5 us, where the tall tile above takes 31.7, two products 41.7.
_ROLES_SLOTS = {64: 4, 128: 4, 192: 3}
_ROLES_WIDTH = 192
# `vit-engine tune` measures these, too.
TO_MEASURE = tuple(
    MlpTile(block_m, 64, 4, slots, roles=True, kept=kept)
    for width, slots in _ROLES_SLOTS.items()
    for block_m in (64, 128)
    for kept in range(width // 64 + 1)
)


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
    if tile.roles:
        return _roles_cycles(tile, m, width, hidden, device)
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


# Cycles of a program with roles before its first step and behind its last, simulated, and of a step's activation by a
# warpgroup, with what comes before and behind it. What two warpgroups that take turns take over what their products do.
# The last two make it 6 % off at most in the four launches of D = 192 on an H100 that have a round or more of programs,
# at 12,608 and 50,432 rows (Triton 3.6, cold L2, 1.755 GHz assumed).
_ROLES_START = 4500
_ROLES_ACTIVATION = 1100
_TURNS = 1.785


def _roles_cycles(tile: MlpTile, m: int, width: int, hidden: int, device: Device) -> float | None:
    """Modelled SM cycles of a launch whose warps have roles."""
    if device.capability != 90:
        return None
    products = 4 * width
    alone = products + _ROLES_ACTIVATION
    step = alone if tile.block_m == 64 else max(2 * products * _TURNS, alone)
    return cdiv(cdiv(m, tile.block_m), device.sm_count) * (_ROLES_START + cdiv(hidden, tile.block_h) * step)


def may_have_roles(tile: MlpTile, width: int, hidden: int, itemsize: int, device: Device, *, described: bool) -> bool:
    """Whether the kernel whose warps have roles does this problem in such a tile. described: x, the weights and a
    residual can be loaded through tensor descriptors. The activation must not be gated."""
    return (
        described
        and itemsize == 2
        and 90 <= device.capability < 100
        and width in _ROLES_SLOTS
        and tile.kept <= width // 64
        and roles_shared_bytes(tile, width, hidden) <= device.shared_memory
    )


def roles_shared_bytes(tile: MlpTile, width: int, hidden: int) -> int:
    """Shared memory of a tile with roles: x, num_stages slots of weights, vectors in fp32 and 16 barriers or so, whose
    places are of 16 bytes."""
    blocks = 2 * (tile.block_m + 2 * tile.num_stages * tile.block_h) * width
    chunks = cdiv(hidden, 4 * tile.block_h)
    return blocks + 8 * (4 * tile.block_h * chunks + width) + 16 * (chunks + 2 * tile.num_stages + 8)


def mlp_shared_bytes(tile: MlpTile, width: int, itemsize: int, operands: int) -> int:
    """Shared memory: the rows of x, num_stages slices of the weights, and the hidden features on their way to W2."""
    padded = sum(split_width(width, 64))
    weights = tile.num_stages * (operands + 1) * tile.block_h * padded
    return (tile.block_m * padded + weights + tile.block_m * tile.block_h) * itemsize


@tuned_first(MlpTile, none=TWO_PRODUCTS)
def choose_mlp(
    m: int,
    width: int,
    hidden: int,
    itemsize: int,
    device: Device,
    *,
    gated: bool = False,
    always: bool = False,
    described: bool = False,
) -> MlpTile | None:
    """The one-kernel MLP's tile, or None where two GEMMs serve better.

    Every program reads all weights, so the tallest tile that fits is the best one; with fewer rows than 64 an SM the
    GEMMs, which also split the columns, keep more of the GPU busy. They also serve better beyond a width of 192, where
    the accumulator leaves no room for a tall tile and a long step, and in fp32, where the registers hold few rows. On
    sm_90 the kernel whose warps have roles comes first.
    always: whatever serves better, up to a width of 384. described: x, the weights and a residual can be loaded through
    tensor descriptors.
    """
    if width > (MLP_MAX_WIDTH if always else _FASTER_TO) or (itemsize == 4 and not always):
        return None
    if device == INTERPRETED:
        return MlpTile(interpreted_block(m), interpreted_block(hidden), 4, 1)
    enough = always or cdiv(m, 64) >= device.sm_count
    if width == _ROLES_WIDTH and not gated and enough:
        block_m = 64 if cdiv(m, 64) <= device.sm_count else 128
        tile = MlpTile(block_m, 64, 4, _ROLES_SLOTS[width], roles=True, kept=width // 64)
        if may_have_roles(tile, width, hidden, itemsize, device, described=described):
            return tile
    for tile in (*nearest(_TALL, device.capability), *_HALF_MLP) if itemsize == 2 else _FLOAT_MLP:
        fits = mlp_shared_bytes(tile, width, itemsize, 2 if gated else 1) <= device.shared_memory - 1024
        if fits and (always or cdiv(m, min(tile.block_m, 64)) >= device.sm_count):
            return tile
    return None
