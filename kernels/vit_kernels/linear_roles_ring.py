"""What the roles of `linear_roles_kernel` share: its ring of slots, its barriers, and which tiles a program has."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .primitives import grouped_tile, tiles_over

# Triton 3.9 has only the new names, 3.6 and 3.7 only the old ones.
load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
store_block = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# Rows of a tile that a multiplying warpgroup has; two that go together have twice as many.
ROWS = gl.constexpr(64)
# Vectors are written for one tile while those of the tile before are being read.
TURNS = gl.constexpr(2)
# Columns of the narrow tiles that the last round is shared out in, and of the tail of a tile of 192.
NARROW = gl.constexpr(64)


@gluon.jit
def barriers(number: gl.constexpr, arrivals: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):  # type: ignore[reportGeneralTypeIssues]
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def own_slot(ring, slot, y_desc, WIDTH: gl.constexpr):
    """A slot's place for weights, as that of results: of 64 rows, or of 128 and half of the columns."""
    _, w_s, _, _, _ = ring
    place = w_s.index(slot)
    TOGETHER: gl.constexpr = y_desc.block_shape[0]
    COLUMNS: gl.constexpr = w_s.shape[1] * ROWS // TOGETHER
    if _REINTERPRETS:
        place = place.reinterpret(y_desc.dtype, [TOGETHER, COLUMNS], y_desc.layout)
    else:
        place = place._reinterpret(y_desc.dtype, [TOGETHER, COLUMNS], y_desc.layout)
    return place.slice(0, WIDTH, 1)


@gluon.jit
def share_of_tiles(M, N, split, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(tiles done whole, the first narrow tile of this program, narrow tiles): `split` tiles are shared out in pieces,
    beginning with the programs that have a whole tile less."""
    programs = gl.num_programs(0)
    whole = tiles_over(M, BLOCK_M) * tiles_over(N, BLOCK_N) - split
    first = (gl.program_id(0) + programs - whole % programs) % programs
    return whole, first, split * (BLOCK_N // NARROW)


@gluon.jit
def narrow_tile(piece, whole, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """First row and column of a narrow tile: they are the pieces of the tiles from number `whole` on."""
    PIECES: gl.constexpr = BLOCK_N // NARROW
    tile_m, tile_n = grouped_tile(whole + piece // PIECES, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    return tile_m * BLOCK_M, tile_n * BLOCK_N + piece % PIECES * NARROW
