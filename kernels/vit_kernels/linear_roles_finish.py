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
def _load_vectors(behind, columns, keep, NORM: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr):
    """Bias, weight sums and LayerScale of some columns, as they are; zeros where not kept, or where there are none."""
    bias_ptr, stride_bias, column_sum_ptr, scale_ptr, stride_scale, _, _, _, _ = behind
    at = columns.to(gl.int64)
    keep = (columns >= 0) & keep
    bias = gl.zeros_like(columns)
    column_sum = bias
    scale = bias
    if HAS_BIAS:
        bias = gl.load(bias_ptr + at * stride_bias, mask=keep, other=0.0)
    if NORM == "layer":
        column_sum = gl.load(column_sum_ptr + at, mask=keep, other=0.0)
    if HAS_SCALE:
        scale = gl.load(scale_ptr + at * stride_scale, mask=keep, other=0.0)
    return bias, column_sum, scale


@gluon.jit
def _finish_rows(
    behind, sums, vectors, turn, half, row, column, pieces, M, N, WARPS: gl.constexpr, NORM: gl.constexpr,
    ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """Finishes half of the tile at (row, column), so many pieces of NARROW columns, when the sums are there: folded
    norm, bias, activation, LayerScale, residual, store, moments. A warp has 16 rows of a piece at a time."""
    _, _, _, _, _, residual_ptr, stride_rm, y_ptr, y_stats_ptr = behind
    sums_s, summed, _ = sums
    TALL: gl.constexpr = 16 * WARPS
    PARTS: gl.constexpr = ROWS // TALL
    PITCH: gl.constexpr = sums_s.shape[0] // HALVES
    pieces_s = as_pieces(sums_s, TALL)
    shift_s = as_tall(vectors[1], TALL)
    # A thread has 16 bytes of a row, a warp 128 bytes of four rows: whole lines of memory, and all banks.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # type: ignore[reportAssignmentType]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)  # type: ignore[reportAssignmentType]
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)  # type: ignore[reportAssignmentType]
    for part in range(PARTS):
        rows = row + half * ROWS + part * TALL + gl.arange(0, TALL, BY_ROW)
        keep = rows < M
        long = rows.to(gl.int64)[:, None]
        columns = column + gl.arange(0, NARROW, BY_COLUMN)
        y_at = y_ptr + long * N + columns[None, :]
        residual = y_at
        residual_at = y_at
        # All that is loaded is loaded a piece ahead, because memory is far.
        bias, column_sum, scale = _load_vectors(behind, columns, column < N, NORM, HAS_BIAS, HAS_SCALE)
        if HAS_RESIDUAL:
            residual_at = residual_ptr + long * stride_rm + columns[None, :]
            residual = gl.load(residual_at, mask=keep[:, None] & (column < N), other=0.0)
        mbarrier.wait(summed.index(half), turn & 1)
        for piece in range(pieces):
            first = column + piece * NARROW
            acc = pieces_s.index((half * PITCH + piece) * PARTS + part).load(LAYOUT).to(gl.float32)
            if NORM == "none":
                acc = acc * TIMES
            added = bias.to(gl.float32)[None, :] * TIMES
            if NORM == "layer":
                shift = shift_s.index((turn % TURNS * HALVES + half) * PARTS + part).load(BY_ROW)[:, None]
                acc = acc + (shift * column_sum[None, :] + added)
            elif HAS_BIAS:
                acc = acc + added
            if ACTIVATION != "none":
                acc = activate_fast(acc, ACTIVATION)
            if HAS_SCALE:
                acc = acc * scale.to(gl.float32)[None, :]
            if HAS_RESIDUAL:
                acc = acc + residual.to(gl.float32)
            more = (piece + 1 < pieces) & (first + NARROW < N)
            columns += NARROW
            bias, column_sum, scale = _load_vectors(behind, columns, more, NORM, HAS_BIAS, HAS_SCALE)
            if HAS_RESIDUAL:
                residual_at += NARROW
                residual = gl.load(residual_at, mask=(keep & more)[:, None], other=0.0)
            y, stored = rounded(acc, y_ptr.dtype.element_ty)
            gl.store(y_at, y, mask=(keep & (first < N))[:, None])
            y_at += NARROW
            if EMIT_STATS:
                _store_stats(y_stats_ptr, stored, rows, keep & (first < N), first, M, N)


@gluon.jit
def finish(
    behind, sums, vectors, vector_bars, M, N, split, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr, WARPS: gl.constexpr, NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the finishing warps: all tiles of this program, in order."""
    _, _, free = sums
    ready, spent = vector_bars
    follow(OVERLAP)
    own, all_turns, whole = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    for turn in range(all_turns):
        row, column, pieces = tile_of_turn(turn, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        if NORM != "none":
            mbarrier.wait(ready.index(turn % TURNS), turn // TURNS & 1)
        for half in range(HALVES):
            _finish_rows(
                behind, sums, vectors, turn, half, row, column, pieces, M, N, WARPS, NORM, ACTIVATION, TIMES, HAS_BIAS,
                HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
            )  # fmt: skip
            mbarrier.arrive(free.index(half), count=1)
        if NORM != "none":
            mbarrier.arrive(spent.index(turn % TURNS), count=1)
