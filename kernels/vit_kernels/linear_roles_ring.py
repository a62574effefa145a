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

# A tile has two halves of so many rows, one for each multiplying warpgroup.
ROWS = gl.constexpr(64)
HALVES = gl.constexpr(2)
# Vectors are written for one tile while those of the tile before are being read.
TURNS = gl.constexpr(2)
# Columns that are finished at a time, and of the narrow tiles that the last round is shared out in.
NARROW = gl.constexpr(64)


@gluon.jit
def barriers(number: gl.constexpr, arrivals: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):  # type: ignore[reportGeneralTypeIssues]
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def seen_as(memory_s, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Shared memory in another shape and layout."""
    if _REINTERPRETS:
        return memory_s.reinterpret(memory_s.dtype, SHAPE, LAYOUT)
    else:
        return memory_s._reinterpret(memory_s.dtype, SHAPE, LAYOUT)


@gluon.jit
def as_tall(vectors_s, TALL: gl.constexpr):
    """Vectors [number, ROWS] as fewer of TALL rows each."""
    SHAPE: gl.constexpr = [vectors_s.shape[0] * ROWS // TALL, TALL]  # type: ignore[reportAssignmentType]
    LAYOUT: gl.constexpr = vectors_s.layout
    return seen_as(vectors_s, SHAPE, LAYOUT)


@gluon.jit
def share_of_tiles(M, N, split, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(whole tiles of this program, all its tiles with narrow ones, tiles done whole by all programs): `split` tiles
    are shared out in pieces, beginning with the programs that have a whole tile less."""
    programs = gl.num_programs(0)
    whole = tiles_over(M, BLOCK_M) * tiles_over(N, BLOCK_N) - split
    own = (whole - gl.program_id(0) + programs - 1) // programs
    first = _first_piece(whole)
    return own, own + (split * (BLOCK_N // NARROW) - first + programs - 1) // programs, whole


@gluon.jit
def _first_piece(whole):
    programs = gl.num_programs(0)
    return (gl.program_id(0) + programs - whole % programs) % programs


@gluon.jit
def tile_of_turn(
    turn, own, whole, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr
):  # fmt: skip
    """First row and column of the turn-th tile of this program, and its columns by NARROW. Narrow ones, from turn `own`
    on, are the pieces of the tiles from number `whole` on. GROUP_M: as of `grouped_tile`; below 0 for rows from the
    last to the first."""
    PIECES: gl.constexpr = BLOCK_N // NARROW
    tile = gl.program_id(0) + turn * gl.num_programs(0)
    column = 0
    pieces = PIECES
    if turn >= own:
        piece = _first_piece(whole) + (turn - own) * gl.num_programs(0)
        tile = whole + piece // PIECES
        column = piece % PIECES * NARROW
        pieces = 1
    BACKWARDS: gl.constexpr = GROUP_M < 0  # type: ignore[reportAssignmentType]
    tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, -GROUP_M if BACKWARDS else GROUP_M)
    if BACKWARDS:
        tile_m = tiles_over(M, BLOCK_M) - 1 - tile_m
    return tile_m * BLOCK_M, tile_n * BLOCK_N + column, pieces
