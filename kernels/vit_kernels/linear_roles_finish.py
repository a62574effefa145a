"""The finishing role of `linear_roles_kernel`: a warpgroup makes results of the sums that others hand over."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .linear_roles_ring import HALVES, NARROW, ROWS, TURNS, share_of_tiles, tile_of_turn
from .primitives import STATS_COLUMNS, activate_fast, follow, rounded


@gluon.jit
def _store_stats(y_stats_ptr, y, rows, keep, column, M, N):
    """The moments of finished rows y [ROWS, 64], as partial number column / 64 of [2, N / 64, M]."""
    mean = gl.sum(y, 1) * (1.0 / STATS_COLUMNS)
    apart = y - mean[:, None]
    m2 = gl.sum(apart * apart, 1)
    at = y_stats_ptr + gl.to_tensor(column // STATS_COLUMNS).to(gl.int64) * M + rows
    gl.store(at, mean, mask=keep)
    gl.store(at + gl.to_tensor(N // STATS_COLUMNS).to(gl.int64) * M, m2, mask=keep)


@gluon.jit
def finish_half(
    results, pieces_s, summed, vectors, turn, half, row, column, pieces, M, N, stride_rm, WARPS: gl.constexpr,
    NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """Finishes half a tile, NARROW columns of its ROWS rows from (row, column) on at a time: folded norm, bias,
    activation, LayerScale, residual, store, moments. By so many warps, when the sums are there."""
    residual_ptr, y_ptr, y_stats_ptr = results
    _, shift_s, bias_s, column_sum_s, scale_s = vectors
    # A thread has 16 bytes of a row, a warp 128 bytes of four rows: whole lines of memory, and all banks.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # type: ignore[reportAssignmentType]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)  # type: ignore[reportAssignmentType]
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)  # type: ignore[reportAssignmentType]
    PITCH: gl.constexpr = pieces_s.shape[0] // HALVES
    slot = turn % TURNS
    rows = row + gl.arange(0, ROWS, BY_ROW)
    keep = rows < M
    long = rows.to(gl.int64)[:, None]
    columns = column + gl.arange(0, NARROW, BY_COLUMN)[None, :]
    y_at = y_ptr + long * N + columns
    residual = y_at
    residual_at = y_at
    if HAS_RESIDUAL:
        # A piece ahead, because memory is far.
        residual_at = residual_ptr + long * stride_rm + columns
        residual = gl.load(residual_at, mask=keep[:, None] & (column < N), other=0.0)
    mbarrier.wait(summed.index(half), turn & 1)
    for piece in range(pieces):
        inside = column + piece * NARROW < N
        acc = pieces_s.index(half * PITCH + piece).load(LAYOUT).to(gl.float32)
        at = slot * PITCH + piece
        if NORM == "none":
            acc = acc * TIMES
        if NORM == "layer":
            shift = shift_s.index(slot * HALVES + half).load(BY_ROW)[:, None]
            column_sum = column_sum_s.index(at).load(BY_COLUMN)[None, :]
            if HAS_BIAS:
                acc = acc + (shift * column_sum + bias_s.index(at).load(BY_COLUMN)[None, :])
            else:
                acc = acc + shift * column_sum
        elif HAS_BIAS:
            acc = acc + bias_s.index(at).load(BY_COLUMN)[None, :]
        if ACTIVATION != "none":
            acc = activate_fast(acc, ACTIVATION)
        if HAS_SCALE:
            acc = acc * scale_s.index(at).load(BY_COLUMN)[None, :]
        if HAS_RESIDUAL:
            acc = acc + residual.to(gl.float32)
            residual_at += NARROW
            after = (piece + 1 < pieces) & (column + (piece + 1) * NARROW < N)
            residual = gl.load(residual_at, mask=(keep & after)[:, None], other=0.0)
        y, stored = rounded(acc, y_ptr.dtype.element_ty)
        gl.store(y_at, y, mask=(keep & inside)[:, None])
        y_at += NARROW
        if EMIT_STATS:
            _store_stats(y_stats_ptr, stored, rows, keep & inside, column + piece * NARROW, M, N)


@gluon.jit
def finish(
    results, sums, vectors, vector_bars, M, N, split, stride_rm, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr, WARPS: gl.constexpr, NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
    HELPS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the finishing warps: all tiles of this program, in order. HELPS: but for the last."""
    _, pieces_s, summed, free = sums
    ready, spent = vector_bars
    if HAS_RESIDUAL:
        follow(OVERLAP)
    own, all_turns, whole = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    for turn in range(all_turns - 1 if HELPS else all_turns):
        row, column, pieces = tile_of_turn(turn, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        mbarrier.wait(ready.index(turn % TURNS), turn // TURNS & 1)
        for half in range(HALVES):
            finish_half(
                results, pieces_s, summed, vectors, turn, half, row + half * ROWS, column, pieces, M, N, stride_rm,
                WARPS, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
            )  # fmt: skip
            mbarrier.arrive(free.index(half), count=1)
        mbarrier.arrive(spent.index(turn % TURNS), count=1)
