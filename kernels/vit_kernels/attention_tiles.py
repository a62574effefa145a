"""Tile choice of `attention`."""

from __future__ import annotations

import math

from .attention_costs import COSTS, ROLES, ROLES_TILES, WHOLE, WHOLE_TILES, AttentionTile, Cost
from .device import INTERPRETED, Device
from .tiles import cdiv, interpreted_block, nearest, next_power_of_2, split_width, tuned_first

__all__ = [
    "CANDIDATES",
    "AttentionTile",
    "attention_cycles",
    "attention_shared_bytes",
    "blocks_of_keys",
    "choose_attention",
    "may_be_whole",
    "may_have_roles",
    "rest_block",
]

CANDIDATES = (*dict.fromkeys(tile for table in COSTS.values() for tile in table), *WHOLE_TILES, *ROLES_TILES)

# With a mask to add, wider heads than this spill: padded head width by tile, 128 where none is named.
_WIDEST_MASKED = {
    AttentionTile(128, 32, 4, 3): 0,
    AttentionTile(128, 64, 8, 3): 80,
    AttentionTile(128, 64, 8, 2): 80,
    AttentionTile(128, 32, 8, 3): 80,
    AttentionTile(64, 64, 4, 3): 80,
    AttentionTile(64, 64, 4, 2): 80,
    AttentionTile(64, 32, 4, 2): 80,
}


def rest_block(keys: int, block_n: int) -> int:
    """Width of the block for the keys that whole blocks leave over: a power of two of 16 or more, 0 for no keys."""
    rest = keys % block_n
    return max(next_power_of_2(rest), 16) if rest else 0


def blocks_of_keys(keys: int, block_n: int) -> tuple[int, bool, int]:
    """(whole blocks, whether one of half the width follows, width of the last) in the kernel whose warps have roles."""
    whole, left = divmod(keys, block_n)
    half = left >= block_n // 2
    return whole, half, rest_block(keys, block_n // 2)


def attention_shared_bytes(
    tile: AttentionTile, width: int, itemsize: int, keys: int = 0, *, masked: bool = False
) -> int:
    """At most so much shared memory: q, num_stages slices of keys and values, those of a mask in fp32, and the rest."""
    if tile.whole:
        # Two tiles of queries, and 64 bytes of barriers.
        whole = keys // tile.block_n * tile.block_n + rest_block(keys, tile.block_n)
        return (2 * tile.block_m + 2 * whole) * width * itemsize + 64
    if tile.roles:
        # Queries of two tiles, and less than 1 KiB of barriers.
        return (2 * tile.block_m + 2 * tile.num_stages * tile.block_n) * width * itemsize + 1024
    rows = tile.block_m + 2 * tile.num_stages * tile.block_n + 2 * rest_block(keys, tile.block_n)
    mask = 4 * tile.block_m * tile.block_n * (tile.num_stages - 1) if masked else 0
    return rows * sum(split_width(width)) * itemsize + mask


def may_be_whole(keys: int, width: int, itemsize: int, device: Device, *, described: bool) -> bool:
    """Whether `attention_whole_kernel` can compute it: sm_90's instructions, 16 bits, heads 64 wide, and as many keys
    as registers hold scores of."""
    return described and 90 <= device.capability < 100 and itemsize == 2 and width == 64 and 64 <= keys <= 256


def may_have_roles(keys: int, width: int, itemsize: int, device: Device, *, described: bool) -> bool:
    """Whether `attention_roles_kernel` can compute it: sm_90's instructions, 16 bits, heads 64 wide, and more keys than
    `attention_whole_kernel` takes."""
    return described and 90 <= device.capability < 100 and itemsize == 2 and width == 64 and keys > 256


def _roles_cycles(tile: AttentionTile, heads: int, queries: int, keys: int, device: Device) -> float:
    """What a program of the last round takes: its share of the last tiles of heads, and one whole tile."""
    whole, half, rest = blocks_of_keys(keys, tile.block_n)
    full = ROLES.tile + whole * ROLES.block + half * ROLES.half + (rest > 0) * ROLES.rest
    tiles = cdiv(queries, tile.block_m)
    idle = tiles * (tile.block_m // 64) - cdiv(queries, 64)
    first = full if tiles > 1 else full * (1 - idle * ROLES.idle)
    return ROLES.start + first + (cdiv(tiles * heads, device.sm_count) - 1) * full * (1 - idle * ROLES.idle / tiles)


def _whole_cycles(tile: AttentionTile, heads: int, queries: int, keys: int, device: Device) -> float:
    """What the programs of an SM take together and the last of them takes after it; no less than one alone takes."""
    blocks, rest = divmod(keys, tile.block_n)
    full = WHOLE.tile + blocks * WHOLE.block + WHOLE.rest * (rest > 0)
    tiles = cdiv(queries, tile.block_m)
    longest = min(tile.whole, tiles)
    per_sm = heads * tiles / device.sm_count
    programs = cdiv(cdiv(tiles, longest) * heads, device.sm_count)
    together = programs * WHOLE.start + full * (per_sm + longest * (1 + WHOLE.longer * per_sm))
    return max(together, longest * full * WHOLE.alone)


def _cost(tile: AttentionTile, width: int, device: Device) -> Cost | None:
    """What was modelled of a tile at the next modelled head width; None where it is no candidate."""
    padded = sum(split_width(width))
    modelled_at = 64 if padded <= 64 else 80 if padded <= 96 else 128
    return nearest(COSTS, device.capability).get(tile, {}).get(modelled_at)


def attention_cycles(tile: AttentionTile, heads: int, queries: int, keys: int, width: int, device: Device) -> float:
    """Modelled SM cycles of a launch: what the programs of one SM take together, but no less than one takes alone.

    For 16-bit tensors; infinite for a tile without figures.
    """
    if tile.whole:
        return _whole_cycles(tile, heads, queries, keys, device)
    if tile.roles:
        return _roles_cycles(tile, heads, queries, keys, device)
    cost = _cost(tile, width, device)
    if cost is None:
        return math.inf
    per_sm = cdiv(cdiv(queries, tile.block_m) * heads, device.sm_count)
    # Up to 16 keys more than whole blocks are in the cost of a start.
    blocks = keys // tile.block_n + max(rest_block(keys, tile.block_n) - 16, 0) / tile.block_n
    return max(per_sm * (cost.start + blocks * cost.step), cost.start_alone + blocks * cost.step_alone)


@tuned_first(AttentionTile)
def choose_attention(
    heads: int, queries: int, keys: int, width: int, itemsize: int, device: Device, *, masked: bool = False,
    described: bool = False,
) -> AttentionTile:  # fmt: skip
    """The candidate with the least modelled time for `heads` independent heads (batch included).

    described: q, k and v can be loaded through tensor descriptors, and nothing but o = softmax(scale q k^T) v is asked.
    """
    if device == INTERPRETED:
        return AttentionTile(interpreted_block(queries), interpreted_block(keys), 4, 1)
    padded = sum(split_width(width))
    if itemsize == 4:
        # 32 rows spill with a mask, and heads of 65 to 80 on all generations but these two.
        spills = (masked and padded > 64) or (padded == 80 and device.capability not in (80, 90))
        return AttentionTile(16 if spills else 32, 32, 8, 2)
    fitting = [
        tile
        for tile in CANDIDATES
        if _cost(tile, width, device) is not None
        and not (masked and padded > _WIDEST_MASKED.get(tile, 128))
        and attention_shared_bytes(tile, width, itemsize, keys, masked=masked) <= device.shared_memory - 1024
    ]
    # Small tiles read all keys again for every few queries: for launches that leave SMs without a program otherwise.
    spread = cdiv(queries, 64) * heads < device.sm_count
    candidates = [tile for tile in fitting if spread or tile.block_m >= 64] or fitting
    if may_be_whole(keys, width, itemsize, device, described=described):
        candidates = [*candidates, *WHOLE_TILES]
    if may_have_roles(keys, width, itemsize, device, described=described):
        candidates = [*candidates, *ROLES_TILES]
    return min(candidates, key=lambda tile: attention_cycles(tile, heads, queries, keys, width, device))
