"""The multiplying role of `linear_roles_kernel` in tiles of 256 columns: two warpgroups that run one copy of the code.

They sum a tile in two halves of its columns, the right one a step behind the left one, and finish either in two pieces:

    tensor cores   left n-1 | right n-2 | right n-1              | left 0, next tile | left 1, next tile | right 0 ...
    all others                left, first piece | second piece   | right, first piece | second piece     |

Without a residual, pieces leave from a place of their own, one behind the other, and the ring is left to operands. With
one, each half has a slot, so that operands of the next tile come later: it begins with the right half's second piece.

ptxas must see that products under way are not touched: it makes each wait for the one before (`WARPGROUP.DEPBAR` behind
every `HGMMA`) where sums pass through a wait that lets all of them go on.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .linear_roles_multiply import accumulators, finish, multiply_tile
from .linear_roles_ring import NARROW, TURNS, narrow_tile, own_slot, share_of_tiles
from .primitives import grouped_tile


@gluon.jit
def _arrived(ring, step, STAGES: gl.constexpr):
    _, _, _, full, _ = ring
    mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)


@gluon.jit
def _let_go(ring, step, STAGES: gl.constexpr, pred):
    _, _, _, _, empty = ring
    mbarrier.arrive(empty.index(step % STAGES), count=1, pred=pred)


@gluon.jit
def _begin(acc, ring, step, FIRST: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr):
    """Begins a step's product with HALF columns from FIRST on, added to acc or in its place; its operands have
    arrived."""
    x_s, w_s, _, _, _ = ring
    x = x_s.index(step % STAGES)
    w = w_s.index(step % STAGES).slice(FIRST, HALF).permute((1, 0))
    if not ADD:
        # Never written, but a product that adds nothing asks for sums all the same.
        acc, _ = accumulators(x.shape[0], HALF, 0)
    return warpgroup_mma(x, w, acc, use_acc=ADD, is_async=True)


@gluon.jit
def _pieces(acc):
    """The left and the right half of some columns, of which each thread has as many."""
    ROWS: gl.constexpr = acc.shape[0]
    PIECE: gl.constexpr = acc.shape[1] // 2
    return acc.reshape((ROWS, 2, PIECE)).permute((0, 2, 1)).split()


@gluon.jit
def _begin_left(
    left, ring, step, first: gl.constexpr, number: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Begins the left half's products number `first` and following, of a tile that begins at `step`."""
    for ahead in gl.static_range(first, first + number):  # type: ignore[reportGeneralTypeIssues]
        _arrived(ring, step + ahead, STAGES)
        left = _begin(left, ring, step + ahead, 0, HALF, STAGES, ahead > 0)
    return left


@gluon.jit
def _multiply_wide_tile(
    left, right, y_desc, piece_desc, y_stats_ptr, ring, own_place, vectors, vector_bars, step, turn, row, column, M, N,
    K, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """Multiplies and finishes the tile at (row, column). The left half's first two products have been begun; those of
    the tile to come have when this returns."""
    ready, spent = vector_bars
    HALF: gl.constexpr = y_desc.block_shape[1]
    PIECE: gl.constexpr = piece_desc.block_shape[1]
    SLOTS: gl.constexpr = 2 if HAS_RESIDUAL else 0  # type: ignore[reportAssignmentType]
    right = _begin(right, ring, step, HALF, HALF, STAGES, False)
    if HAS_RESIDUAL:
        if turn > 0:
            tma.store_wait(0)
        _let_go(ring, step + (STAGES - 2), STAGES, turn > 0)
        _let_go(ring, step + (STAGES - 1), STAGES, turn > 0)
    left, right = warpgroup_mma_wait(1, deps=(left, right))  # type: ignore[reportGeneralTypeIssues]
    step += 2
    for _ in range(2 * BLOCK_K, K, BLOCK_K):
        _arrived(ring, step, STAGES)
        left = _begin(left, ring, step, 0, HALF, STAGES, True)
        right = _begin(right, ring, step - 1, HALF, HALF, STAGES, True)
        left, right = warpgroup_mma_wait(2, deps=(left, right))  # type: ignore[reportGeneralTypeIssues]
        _let_go(ring, step - 2, STAGES, True)
        step += 1
    right = _begin(right, ring, step - 1, HALF, HALF, STAGES, True)
    mbarrier.wait(ready.index(turn % TURNS), turn // TURNS & 1)
    left = warpgroup_mma_wait(2, deps=(left,))
    pieces = _pieces(left)
    for piece in gl.static_range(4):  # type: ignore[reportGeneralTypeIssues]
        if HAS_RESIDUAL:
            if piece % 2 == 0:
                _arrived(ring, step + piece // 2, STAGES)
            half = own_slot(ring, (step + piece // 2) % STAGES, y_desc, HALF)
            place = half.slice(piece % 2 * PIECE, PIECE, 1)
        else:
            tma.store_wait(0)
            place = own_place
        finish(
            pieces[piece % 2], piece_desc, y_stats_ptr, place, vectors, turn, 0, row, column, M, N, piece * PIECE, 1,
            NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
        )  # fmt: skip
        if piece == 0:
            # Not later, for the next tile's operands to be there in time.
            right = warpgroup_mma_wait(0, deps=(right,))
            _let_go(ring, step - 2, STAGES, True)
            _let_go(ring, step - 1, STAGES, True)
        if piece == 1:
            pieces = _pieces(right)
        if piece >= (2 if HAS_RESIDUAL else 1) and piece < (4 if HAS_RESIDUAL else 3):
            left = _begin_left(left, ring, step + SLOTS, piece - (2 if HAS_RESIDUAL else 1), 1, HALF, STAGES)
    mbarrier.arrive(spent.index(turn % TURNS), count=1)
    return left, right, step + SLOTS


@gluon.jit
def multiply_pair(
    y_desc, narrow_y_desc, y_stats_ptr, ring, own_place, vectors, vector_bars, M, N, K, split,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """The role of two warpgroups that go together: all tiles of this program, in order. K is more than BLOCK_K."""
    HALF: gl.constexpr = y_desc.block_shape[1]
    turn = 0
    programs = gl.num_programs(0)
    whole, first, pieces = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    left, _ = accumulators(BLOCK_M, HALF, 0)
    right, _ = accumulators(BLOCK_M, HALF, 0)
    left = _begin_left(left, ring, 0, 0, 2, HALF, STAGES)
    step = 0
    for tile in range(gl.program_id(0), whole, programs):
        tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        left, right, step = _multiply_wide_tile(
            left, right, y_desc, narrow_y_desc, y_stats_ptr, ring, own_place, vectors, vector_bars, step, turn,
            tile_m * BLOCK_M, tile_n * BLOCK_N, M, N, K, BLOCK_K, STAGES, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE,
            HAS_RESIDUAL, EMIT_STATS,
        )  # fmt: skip
        turn += 1
    # Two products were begun for no tile. Who follows lets go of their slots as if they held results.
    left = warpgroup_mma_wait(0, deps=(left,))
    tma.store_wait(0)
    if HAS_RESIDUAL:
        _let_go(ring, step + (STAGES - 2), STAGES, True)
        _let_go(ring, step + (STAGES - 1), STAGES, True)
    step += 2
    for piece in range(first, pieces, programs):
        row, column = narrow_tile(piece, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = multiply_tile(
            0, narrow_y_desc, narrow_y_desc, y_stats_ptr, ring, (own_place, own_place, own_place, own_place), vectors,
            vector_bars, step, turn, row, column, M, N, K, BLOCK_K, STAGES, NARROW, 0, NORM, ACTIVATION, TIMES,
            HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
        )  # fmt: skip
        turn += 1
    tma.store_wait(0)
