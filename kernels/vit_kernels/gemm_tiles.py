"""Tile choice of the GEMM-shaped operations, `linear` and `patch_embed`."""

from __future__ import annotations

from .device import INTERPRETED, Device
from .gemm_cycles import gemm_cycles, parts_cycles, step_cycles, sum_cycles
from .gemm_tile import (
    SUM_COLUMNS,
    SUM_ROWS,
    GemmTile,
    check_statistics,
    column_tiles,
    gemm_shared_bytes,
    halved_tiles,
    loads_early,
    may_halve,
    may_have_roles,
    may_share,
    resident_programs,
    ring_slots,
    shared_out,
    split_tiles,
    staying_programs,
    staying_slots,
    wide_and_tail,
)
from .tiles import TENSOR_MEMORY, cdiv, interpreted_block, tuned_first

__all__ = [
    "SHARED_TILES",
    "SUM_COLUMNS",
    "SUM_ROWS",
    "TO_MEASURE",
    "GemmTile",
    "check_statistics",
    "choose_gemm",
    "choose_patch_embed",
    "column_tiles",
    "gemm_cycles",
    "gemm_shared_bytes",
    "halved_tiles",
    "loads_early",
    "may_halve",
    "may_have_roles",
    "may_share",
    "parts_cycles",
    "resident_programs",
    "ring_slots",
    "shared_out",
    "split_tiles",
    "staying_programs",
    "staying_slots",
    "step_cycles",
    "sum_cycles",
    "wide_and_tail",
]

_SMALL_TILES = (GemmTile(64, 64, 64, 4, 4), GemmTile(32, 64, 64, 4, 4), GemmTile(16, 64, 64, 4, 4))
_HALF_TILES = (GemmTile(128, 128, 32, 4, 4, chunk=64), GemmTile(64, 128, 64, 4, 3, chunk=64), *_SMALL_TILES)
# With roles, a wide tile reads less and a narrow one leaves fewer SMs without work; its ring is longer, for an SM gets
# no more from memory than it has asked for. Without, two programs an SM, so that one multiplies while the other
# finishes its tile. The small ones are for small batches, which wait for data more than for anything else.
_TMA_TILES = (
    GemmTile(128, 256, 64, 4, 3, tma=1, roles=True),
    GemmTile(128, 128, 64, 4, 5, tma=1, roles=True),
    GemmTile(128, 128, 64, 4, 3, chunk=64, tma=2),
    GemmTile(64, 128, 128, 4, 4, group_m=0, chunk=64, tma=1),
    GemmTile(64, 64, 128, 4, 6, group_m=0, chunk=64, tma=1),
    GemmTile(64, 64, 128, 4, 3, group_m=0, chunk=64, tma=2),
    *_HALF_TILES,
)
# For a short K, where weights can stay. No other tile is asked then, but those whose rows are columns: alone, products
# of ViT-S and Ti at batches 32 to 256 took from 0.96 to 1.1 times as long in others on an H100; but the pass of ViT-Ti
# at batch 64, with its projections in 128 x 128, two programs an SM, 0.68 ms for 0.61.
_STAYING = GemmTile(128, 128, 64, 4, 8, tma=1, staying=True)
# Gated activations sum two products: half the tile, or twice the threads, for the same registers.
_GATED_TILES = (GemmTile(64, 128, 64, 8, 3), *_SMALL_TILES)
_GATED_TMA_TILES = (GemmTile(128, 64, 64, 4, 3, chunk=64, tma=2), *_GATED_TILES)
# For fewer tiles than SMs, with as many parts of K as that leaves room for (`shared_out`). Operands of 16 bits.
_SHARED_TILES = (GemmTile(64, 128, 64, 4, 3), GemmTile(64, 64, 64, 4, 4))
_SHARED_TMA_TILES = (GemmTile(64, 128, 64, 4, 6, tma=1),)
SHARED_TILES = (*_SHARED_TILES, *_SHARED_TMA_TILES)
_FLOAT_TILES = (
    GemmTile(64, 64, 32, 8, 3),
    GemmTile(32, 64, 32, 8, 3),
    GemmTile(16, 64, 32, 4, 3),
)
# Never chosen by the model: it sees them a few per cent behind or ahead, which is less than it can tell. `vit-engine
# tune` measures them beside the others.
TO_MEASURE = (
    GemmTile(128, 256, 64, 8, 3, chunk=64, tma=1),
    GemmTile(256, 128, 64, 8, 3, chunk=64, tma=1),
    GemmTile(128, 256, 64, 8, 3, chunk=64),
    GemmTile(256, 128, 32, 8, 3, chunk=64),
)
# What a second launch must promise: the model cannot tell less.
_WORTH_A_LAUNCH = 1.25
# What a tile through pointers must promise where there are descriptors: products of ViT-B at batch 1 took 1.1 to 1.6
# times as long so as modelled where a norm or activation stands behind them, and less than modelled where a residual.
_WORTH_POINTERS = 1.25


def _interpreted_gemm(m: int, n: int, k: int) -> GemmTile:
    return GemmTile(interpreted_block(m), max(64, interpreted_block(n)), interpreted_block(k), 4, 1)


@tuned_first(GemmTile)
def choose_gemm(
    m: int,
    n: int,
    k: int,
    itemsize: int,
    device: Device,
    *,
    gated: bool = False,
    tf32: bool = False,
    described: bool = False,
    activation: str = "none",
    residual: bool = False,
) -> GemmTile:
    """The candidate with the least modelled time for x [m, k] times weights [n, k] (twice [n, k] when gated).

    described: x, the weights and a residual can be loaded through tensor descriptors, and the elements of bias and
    LayerScale lie side by side. activation, residual: what stands behind the product.
    """
    if device == INTERPRETED:
        return _interpreted_gemm(m, n, k)
    operands = 2 if gated else 1
    of_descriptors = described and itemsize == 2 and 90 <= device.capability < 100
    if itemsize == 4:
        table = _FLOAT_TILES
    elif of_descriptors:
        table = _GATED_TMA_TILES if gated else _TMA_TILES
    else:
        table = _GATED_TILES if gated else _HALF_TILES
    if n % 16 and itemsize == 2:
        # Rows of y begin anywhere: results are stored one by one, and their addresses fill the registers of large
        # tiles.
        table = _SMALL_TILES
    elif itemsize == 2 and not gated:
        few = _SHARED_TMA_TILES if table is _TMA_TILES else _SHARED_TILES
        shared = [shared_out(tile, m, n, k, device.sm_count) for tile in few]
        table = (*table, *(tile for tile in shared if tile is not None))
    roles = may_have_roles(n, itemsize, device, gated=gated, described=described)
    # With a tile for each SM there is nothing for weights to stay for.
    if roles and cdiv(m, 128) * cdiv(n, 128) > device.sm_count and staying_slots(_STAYING, k)[0]:
        table = (_STAYING,)
    if roles:
        table = (*table, *column_tiles(m, n, device.sm_count, residual=residual))
    table = tuple(t for t in table if not t.roles or (roles and ring_slots(t, k) > 1))
    # What tiles with roles take is known to the byte.
    room = [device.shared_memory - (0 if t.roles or t.staying or t.columns else 2048) for t in table]
    candidates = [t for t, most in zip(table, room, strict=True) if gemm_shared_bytes(t, itemsize, operands) <= most]

    def cost(t: GemmTile) -> float:
        cycles = gemm_cycles(
            t, m, n, k, itemsize, device, operands=operands, tf32=tf32, activated=activation != "none",
            residual=residual,
        )  # fmt: skip
        by_pointers = of_descriptors and not t.tma
        return cycles * (_WORTH_A_LAUNCH if t.parts > 1 else _WORTH_POINTERS if by_pointers else 1.0)

    return min(candidates, key=cost)


# Within 10 % of the fastest of twelve, simulated for ViT-B at batches 1, 8 and 64 on sm_80, 89 and 90; the fastest of
# four at batches 1, 8 and 64 on an H100.
_PATCH_TILES_HALF = (GemmTile(64, 128, 64, 8, 3), GemmTile(64, 64, 32, 4, 3), GemmTile(32, 64, 64, 4, 4))
_PATCH_TILES_FLOAT = (GemmTile(32, 64, 16, 4, 2), GemmTile(16, 64, 32, 4, 2))
# Where pixels come in blocks. The widest first: each tile reads its pixels again.
_PATCH_BLOCKS = (
    GemmTile(128, 192, 64, 4, 4, tma=1, blocks=True),
    GemmTile(128, 128, 64, 4, 6, tma=1, blocks=True),
    GemmTile(128, 64, 64, 4, 8, tma=1, blocks=True),
)


@tuned_first(GemmTile)
def choose_patch_embed(
    m: int, n: int, k: int, itemsize: int, device: Device, *, tf32: bool = False, described: bool = False
) -> GemmTile:
    """The widest tile of pixels in blocks that gives half the SMs one, if there is one. Else the largest of a few
    tiles that gives every SM one, or, but for sm_90, two if it is a wide one, of which a second for some would take
    long; they leave registers for the gathered addresses of pixels.

    described: pixels and weights are as `patch_embed_blocks` wants them.
    """
    if device == INTERPRETED:
        return _interpreted_gemm(m, n, k)
    if may_have_roles(n, itemsize, device, gated=False, described=described):
        for tile in _PATCH_BLOCKS:
            if n % tile.block_n == 0 and 2 * cdiv(m, tile.block_m) * (n // tile.block_n) >= device.sm_count:
                return tile
    candidates = _PATCH_TILES_HALF if itemsize == 2 else _PATCH_TILES_FLOAT
    if device.capability in TENSOR_MEMORY:
        candidates = candidates[1:]
    for tile in candidates:
        each = 2 if tile.block_n > 64 and not 90 <= device.capability < 100 else 1
        if cdiv(m, tile.block_m) * cdiv(n, tile.block_n) >= each * device.sm_count:
            return tile
    return candidates[-1]
