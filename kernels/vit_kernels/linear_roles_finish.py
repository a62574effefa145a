"""The finishing role of `linear_roles_kernel`: four warps make results of the sums that others hand
over."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .linear_roles_load import load_statistics_of
from .linear_roles_ring import HALVES, NARROW, ROWS, TURNS, share_of_tiles, tile_of_turn
from .primitives import STATS_COLUMNS, activate_fast, follow, rounded, widened

# Finishing warps, one for each quarter of an SM.
WARPS = gl.constexpr(4)


@gluon.jit
def store_stats(y_stats_ptr, y, rows, keep, column, M, N):
    """The moments of finished rows y [rows, 64], as partial number column / 64 of [2, N / 64, M]."""
    mean = gl.sum(y, 1) * (1.0 / STATS_COLUMNS)
    apart = y - mean[:, None]
    m2 = gl.sum(apart * apart, 1)
    at = y_stats_ptr + gl.to_tensor(column // STATS_COLUMNS).to(gl.int64) * M + rows
    gl.store(at, mean, mask=keep)
    gl.store(at + gl.to_tensor(N // STATS_COLUMNS).to(gl.int64) * M, m2, mask=keep)


@gluon.jit
def load_vectors(
    behind, column, LAYOUT: gl.constexpr, NORM: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
):  # fmt: skip
    """TIMES bias, weight sums and LayerScale of NARROW columns, in fp32; zeros where there are none."""
    bias_ptr, column_sum_ptr, scale_ptr, _, _, _, _ = behind
    at = (column + gl.arange(0, NARROW, LAYOUT)).to(gl.int64)
    bias = gl.zeros([NARROW], gl.float32, LAYOUT)
    column_sum = bias
    scale = bias
    if HAS_BIAS:
        bias = widened(gl.load(bias_ptr + at)) * TIMES
    if NORM == "layer":
        column_sum = gl.load(column_sum_ptr + at)
    if HAS_SCALE:
        scale = widened(gl.load(scale_ptr + at))
    return bias, column_sum, scale


@gluon.jit
def load_residual(behind, row, column, M, LAYOUT: gl.constexpr, HAS_RESIDUAL: gl.constexpr):
    """The residual of [ROWS, NARROW] results from (row, column) on."""
    _, _, _, residual_ptr, stride_rm, _, _ = behind
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, NARROW, gl.SliceLayout(0, LAYOUT))
    residual = columns[None, :] + rows[:, None]
    if HAS_RESIDUAL:
        first = residual_ptr + (gl.to_tensor(row).to(gl.int64) * stride_rm + column)
        keep = row + rows < M
        residual = gl.load(first + (rows[:, None] * stride_rm + columns[None, :]), mask=keep[:, None], other=0.0)
    return residual


@gluon.jit
def shift_of(shift_s, number, LAYOUT: gl.constexpr, NORM: gl.constexpr):
    """What the norm adds to rows, by weight sum; zeros where it adds nothing."""
    if NORM == "layer":
        return shift_s.index(number).load(LAYOUT)
    else:
        return gl.zeros([ROWS], gl.float32, LAYOUT)


@gluon.jit
def finish_piece(
    behind, sums, added, column_sum, scale, shift, residual, row, column, M, N, LAYOUT: gl.constexpr,
    NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """Finishes [ROWS, NARROW] sums that belong at (row, column): folded norm, bias, activation, LayerScale, residual,
    store, moments."""
    _, _, _, _, _, y_ptr, y_stats_ptr = behind
    acc = widened(sums)
    if NORM == "none":
        acc = acc * TIMES
    if NORM == "layer":
        acc = acc + (shift[:, None] * column_sum[None, :] + added[None, :])
    elif HAS_BIAS:
        acc = acc + added[None, :]
    if ACTIVATION != "none":
        acc = activate_fast(acc, ACTIVATION, y_ptr.dtype.element_ty)
    if HAS_SCALE:
        acc = acc * scale[None, :]
    if HAS_RESIDUAL:
        acc = acc + widened(residual)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, NARROW, gl.SliceLayout(0, LAYOUT))
    keep = row + rows < M
    first = y_ptr + (gl.to_tensor(row).to(gl.int64) * N + column)
    y, stored = rounded(acc, y_ptr.dtype.element_ty)
    gl.store(first + (rows[:, None] * N + columns[None, :]), y, mask=keep[:, None])
    if EMIT_STATS:
        store_stats(y_stats_ptr + row, stored, rows, keep, column, M, N)


@gluon.jit
def _pieces_of_turn(
    turn, own, whole, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr
):  # fmt: skip
    """`tile_of_turn` without the pieces behind N, which is a multiple of NARROW."""
    row, column, pieces = tile_of_turn(turn, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    return row, column, gl.minimum(pieces, (N - column) // NARROW)


@gluon.jit
def finish(
    behind, stats_ptr, sums, vectors, vector_bars, M, N, K, split, eps, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr, NORM: gl.constexpr, PARTIALS: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
    STATISTICS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the finishing warps: all tiles of this program, in order, 64 x 64 results at a time, of which a warp
    has 16 rows. What these need from memory is asked for before those in front of them are finished. STATISTICS: they
    also load row statistics."""
    sums_s, summed, free = sums
    PITCH: gl.constexpr = sums_s.shape[0] // HALVES
    # A thread has 16 bytes of a row, a warp 128 bytes of four rows: whole lines of memory, and all banks.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # type: ignore[reportAssignmentType]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)  # type: ignore[reportAssignmentType]
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)  # type: ignore[reportAssignmentType]
    follow(OVERLAP)
    own, all_turns, whole = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    row, first, pieces = _pieces_of_turn(0, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    added, column_sum, scale = load_vectors(behind, first, BY_COLUMN, NORM, TIMES, HAS_BIAS, HAS_SCALE)
    residual = load_residual(behind, row, first, M, LAYOUT, HAS_RESIDUAL)
    # To add zero is to wait for them here. Else they would be waited for in the loop, and with them what it has just
    # asked for: ptxas tells loads of one kind apart by nothing.
    added, column_sum, scale = added + 0.0, column_sum + 0.0, scale + 0.0
    # Statistics of a tile's rows are there a turn before its results are finished: those that multiply want them.
    for ahead in range(all_turns + 1):
        turn = ahead - 1
        # Behind the last tile comes that again: what is loaded of it is not used.
        row_after, first_after, pieces_after = _pieces_of_turn(
            gl.minimum(ahead, all_turns - 1), own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M
        )
        if NORM != "none" and STATISTICS:
            if ahead < all_turns:
                load_statistics_of(
                    stats_ptr, vectors, vector_bars, ahead, row_after, M, K, eps, NORM, PARTIALS, TIMES, WARPS
                )  # fmt: skip
        if NORM == "layer":
            if (not STATISTICS) & (ahead > 0):
                mbarrier.wait(vector_bars[0].index(turn % TURNS), turn // TURNS & 1)
        half = 0
        piece = 0
        items = HALVES * pieces
        if ahead == 0:
            items = 0
        for _ in range(items):
            if piece == 0:
                mbarrier.wait(summed.index(half), turn & 1)
            column = first + piece * NARROW
            next_row, next_column = row, column + NARROW
            last = piece + 1 == pieces
            if last:
                next_row, next_column = row + ROWS, first
                if half == 1:
                    # A narrow tile may lie behind N: it is not finished.
                    next_row, next_column = row_after, gl.minimum(first_after, N - NARROW)
            next_added, next_sum, next_scale = load_vectors(
                behind, next_column, BY_COLUMN, NORM, TIMES, HAS_BIAS, HAS_SCALE
            )  # fmt: skip
            next_residual = load_residual(behind, next_row, next_column, M, LAYOUT, HAS_RESIDUAL)
            finish_piece(
                behind, sums_s.index(half * PITCH + piece).load(LAYOUT), added, column_sum, scale,
                shift_of(vectors[1], turn % TURNS * HALVES + half, BY_ROW, NORM), residual, row, column, M, N, LAYOUT,
                NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
            )  # fmt: skip
            added, column_sum, scale = next_added, next_sum, next_scale
            residual = next_residual
            piece += 1
            if last:
                mbarrier.arrive(free.index(half), count=1)
                half += 1
                piece = 0
                row += ROWS
        if NORM == "layer":
            if (not STATISTICS) & (ahead > 0):
                mbarrier.arrive(vector_bars[1].index(turn % TURNS), count=1)
        row, first, pieces = row_after, first_after, pieces_after
