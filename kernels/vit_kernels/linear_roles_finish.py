"""The finishing role of `linear_roles_kernel`: two or four warps make results of the sums that others hand over."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .linear_roles_ring import HALVES, NARROW, ROWS, TURNS, as_pieces, as_tall, share_of_tiles, tile_of_turn
from .primitives import STATS_COLUMNS, activate_fast, follow, rounded


@gluon.jit
def _store_stats(y_stats_ptr, y, rows, keep, column, M, N):
    """The moments of finished rows y [rows, 64], as partial number column / 64 of [2, N / 64, M]."""
    mean = gl.sum(y, 1) * (1.0 / STATS_COLUMNS)
    apart = y - mean[:, None]
    m2 = gl.sum(apart * apart, 1)
    at = y_stats_ptr + gl.to_tensor(column // STATS_COLUMNS).to(gl.int64) * M + rows
    gl.store(at, mean, mask=keep)
    gl.store(at + gl.to_tensor(N // STATS_COLUMNS).to(gl.int64) * M, m2, mask=keep)


@gluon.jit
def _load_vectors(
    behind, column, N, LAYOUT: gl.constexpr, NORM: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
):  # fmt: skip
    """TIMES bias, weight sums and LayerScale of NARROW columns, in fp32; zeros behind N, or where there are none."""
    bias_ptr, stride_bias, column_sum_ptr, scale_ptr, stride_scale, _, _, _, _ = behind
    columns = column + gl.arange(0, NARROW, LAYOUT)
    at = columns.to(gl.int64)
    keep = columns < N
    bias = gl.zeros([NARROW], gl.float32, LAYOUT)
    column_sum = bias
    scale = bias
    if HAS_BIAS:
        bias = gl.load(bias_ptr + at * stride_bias, mask=keep, other=0.0).to(gl.float32) * TIMES
    if NORM == "layer":
        column_sum = gl.load(column_sum_ptr + at, mask=keep, other=0.0)
    if HAS_SCALE:
        scale = gl.load(scale_ptr + at * stride_scale, mask=keep, other=0.0).to(gl.float32)
    return bias, column_sum, scale


@gluon.jit
def _load_residual(behind, row, column, M, N, LAYOUT: gl.constexpr, TALL: gl.constexpr, HAS_RESIDUAL: gl.constexpr):
    """The residual of [TALL, NARROW] results from (row, column) on."""
    _, _, _, _, _, residual_ptr, stride_rm, _, _ = behind
    rows = gl.arange(0, TALL, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, NARROW, gl.SliceLayout(0, LAYOUT))
    residual = columns[None, :] + rows[:, None]
    if HAS_RESIDUAL:
        first = residual_ptr + (gl.to_tensor(row).to(gl.int64) * stride_rm + column)
        keep = (row + rows < M) & (column < N)
        residual = gl.load(first + (rows[:, None] * stride_rm + columns[None, :]), mask=keep[:, None], other=0.0)
    return residual


@gluon.jit
def _shift(shift_s, number, TALL: gl.constexpr, LAYOUT: gl.constexpr, NORM: gl.constexpr):
    """What the norm adds to rows, by weight sum; zeros where it adds nothing."""
    if NORM == "layer":
        return shift_s.index(number).load(LAYOUT)
    else:
        return gl.zeros([TALL], gl.float32, LAYOUT)


@gluon.jit
def _finish_part(
    behind, sums, added, column_sum, scale, shift, residual, row, column, M, N, LAYOUT: gl.constexpr,
    TALL: gl.constexpr, NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """Finishes [TALL, NARROW] sums that belong at (row, column): folded norm, bias, activation, LayerScale, residual,
    store, moments."""
    _, _, _, _, _, _, _, y_ptr, y_stats_ptr = behind
    acc = sums.to(gl.float32)
    if NORM == "none":
        acc = acc * TIMES
    if NORM == "layer":
        acc = acc + (shift[:, None] * column_sum[None, :] + added[None, :])
    elif HAS_BIAS:
        acc = acc + added[None, :]
    if ACTIVATION != "none":
        acc = activate_fast(acc, ACTIVATION)
    if HAS_SCALE:
        acc = acc * scale[None, :]
    if HAS_RESIDUAL:
        acc = acc + residual.to(gl.float32)
    rows = gl.arange(0, TALL, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, NARROW, gl.SliceLayout(0, LAYOUT))
    keep = (row + rows < M) & (column < N)
    first = y_ptr + (gl.to_tensor(row).to(gl.int64) * N + column)
    y, stored = rounded(acc, y_ptr.dtype.element_ty)
    gl.store(first + (rows[:, None] * N + columns[None, :]), y, mask=keep[:, None])
    if EMIT_STATS:
        _store_stats(y_stats_ptr, stored, row + rows, keep, column, M, N)


@gluon.jit
def finish(
    behind, sums, vectors, vector_bars, M, N, split, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr, WARPS: gl.constexpr, NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the finishing warps: all tiles of this program, in order, 64 x 64 results at a time, of which a warp
    has 16 rows at a time. What these need from memory is asked for before those in front of them are finished."""
    sums_s, summed, free = sums
    ready, spent = vector_bars
    TALL: gl.constexpr = 16 * WARPS
    PARTS: gl.constexpr = ROWS // TALL
    PITCH: gl.constexpr = sums_s.shape[0] // HALVES
    pieces_s = as_pieces(sums_s, TALL)
    shift_s = as_tall(vectors[1], TALL)
    # A thread has 16 bytes of a row, a warp 128 bytes of four rows: whole lines of memory, and all banks.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # type: ignore[reportAssignmentType]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)  # type: ignore[reportAssignmentType]
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)  # type: ignore[reportAssignmentType]
    follow(OVERLAP)
    own, all_turns, whole = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    after, column_after, pieces_after = tile_of_turn(0, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    added, column_sum, scale = _load_vectors(behind, column_after, N, BY_COLUMN, NORM, TIMES, HAS_BIAS, HAS_SCALE)
    residual = _load_residual(behind, after, column_after, M, N, LAYOUT, TALL, HAS_RESIDUAL)
    below = residual
    if PARTS == 2:
        below = _load_residual(behind, after + TALL, column_after, M, N, LAYOUT, TALL, HAS_RESIDUAL)
    # To add zero is to wait for them here. Else they would be waited for in the loop, and with them what it has just
    # asked for: ptxas tells loads of one kind apart by nothing.
    added, column_sum, scale = added + 0.0, column_sum + 0.0, scale + 0.0
    for turn in range(all_turns):
        row, first, pieces = after, column_after, pieces_after
        # Behind the last tile comes that again: what is loaded of it is not used.
        after, column_after, pieces_after = tile_of_turn(
            gl.minimum(turn + 1, all_turns - 1), own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M
        )
        if NORM != "none":
            mbarrier.wait(ready.index(turn % TURNS), turn // TURNS & 1)
        half = 0
        piece = 0
        for _ in range(HALVES * pieces):
            if piece == 0:
                mbarrier.wait(summed.index(half), turn & 1)
            column = first + piece * NARROW
            place = (half * PITCH + piece) * PARTS
            vector = (turn % TURNS * HALVES + half) * PARTS
            next_row, next_column = row, column + NARROW
            last = piece + 1 == pieces
            if last:
                next_row, next_column = row + ROWS, first
                if half == 1:
                    next_row, next_column = after, column_after
            next_added, next_sum, next_scale = _load_vectors(
                behind, next_column, N, BY_COLUMN, NORM, TIMES, HAS_BIAS, HAS_SCALE
            )  # fmt: skip
            next_residual = _load_residual(behind, next_row, next_column, M, N, LAYOUT, TALL, HAS_RESIDUAL)
            next_below = next_residual
            if PARTS == 2:
                next_below = _load_residual(behind, next_row + TALL, next_column, M, N, LAYOUT, TALL, HAS_RESIDUAL)
            _finish_part(
                behind, pieces_s.index(place).load(LAYOUT), added, column_sum, scale,
                _shift(shift_s, vector, TALL, BY_ROW, NORM), residual, row, column, M, N, LAYOUT, TALL,
                NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
            )  # fmt: skip
            if PARTS == 2:
                _finish_part(
                    behind, pieces_s.index(place + 1).load(LAYOUT), added, column_sum, scale,
                    _shift(shift_s, vector + 1, TALL, BY_ROW, NORM), below, row + TALL, column, M, N, LAYOUT, TALL,
                    NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
                )  # fmt: skip
            added, column_sum, scale = next_added, next_sum, next_scale
            residual, below = next_residual, next_below
            piece += 1
            if last:
                mbarrier.arrive(free.index(half), count=1)
                half += 1
                piece = 0
                row += ROWS
        if NORM != "none":
            mbarrier.arrive(spent.index(turn % TURNS), count=1)
