"""The kernels of `linear`: a matrix product whose tiles are finished where they are, in two ways of loading.

`linear_kernel` loads through pointers, any strides, one program a tile. `linear_tma_kernel` loads through tensor
descriptors (sm_90's TMA) and walks tile after tile, so that the loads of the next one run under the epilogue of this.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ahead import fetch_ahead
from .linear_epilogue import finish, load_residual
from .primitives import (
    MANY_PARTIALS,
    accumulate,
    follow,
    grouped_tile,
    load_moments,
    merge_loaded,
    merge_moments,
    shift_and_scale,
    tiles_over,
)


# One compiled kernel for every number of rows: which multiples M is of aligns nothing that is loaded or stored wide.
@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]; swiglu: [2N, K], gate rows first
    ahead_ptr,  # the same memory, if it can be asked for ahead
    bias_ptr,  # [N]; swiglu: [2N]
    stats_ptr,  # [2, partials, M]: row statistics of x
    column_sum_ptr,  # [N]; swiglu: [2N], fp32
    scale_ptr,  # [N]: LayerScale
    residual_ptr,  # [M, N]
    y_ptr,  # [M, N]
    y_stats_ptr,  # [2, ceil(N / 64), M]: row statistics of y
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_scale,
    stride_rm,
    stride_rn,
    eps,
    NORM: tl.constexpr,
    PARTIALS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EMIT_STATS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """This program computes the BLOCK_M x BLOCK_N tile of y that `grouped_tile` gives it."""
    if ahead_ptr is not None:
        fetch_ahead(ahead_ptr, 2 * N if ACTIVATION == "swiglu" else N, K, OVERLAP)
    follow(OVERLAP)
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # Rows and columns past the end repeat the last one: their results are dropped, and the K loop needs no mask.
    safe_rows = tl.minimum(rows, M - 1)
    safe_columns = tl.minimum(columns, N - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_at = x_ptr + safe_rows[:, None] * stride_xm + k[None, :] * stride_xk
    w_at = w_ptr + safe_columns[None, :] * stride_wn + k[:, None] * stride_wk
    step = tl.full((), BLOCK_K, tl.int64)
    # In fp32 the subtraction of the mean is cheap beside the product, and before it nothing cancels. 16-bit operands
    # go to the tensor cores as they are; the mean is taken out of their fp32 sum, which has bits to spare for that.
    CENTRE: tl.constexpr = NORM == "layer" and x_ptr.dtype.element_ty == tl.float32
    shift = tl.zeros((BLOCK_M,), tl.float32)
    rstd = shift
    if CENTRE:
        mean, m2 = merge_moments(stats_ptr, safe_rows, M, K, PARTIALS)
        shift, rstd = shift_and_scale(mean, m2, K, eps, NORM)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = acc
    if GATED:
        up_at = w_ptr + (safe_columns + N)[None, :] * stride_wn + k[:, None] * stride_wk
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(k < K - start)[None, :], other=0.0)
            w = tl.load(w_at, mask=(k < K - start)[:, None], other=0.0)
        if CENTRE:
            x -= shift[:, None]
        acc = accumulate(x, w, acc, PRECISION)
        if GATED:
            if EVEN_K:
                w_up = tl.load(up_at)
            else:
                w_up = tl.load(up_at, mask=(k < K - start)[:, None], other=0.0)
            up = accumulate(x, w_up, up, PRECISION)
            up_at += step * stride_wk
        x_at += step * stride_xk
        w_at += step * stride_wk

    if NORM != "none" and not CENTRE:
        mean, m2 = merge_moments(stats_ptr, safe_rows, M, K, PARTIALS)
        shift, rstd = shift_and_scale(mean, m2, K, eps, NORM)
    finish(
        acc, up, acc, shift, rstd, rows, tile_n * BLOCK_N, bias_ptr, column_sum_ptr, scale_ptr, residual_ptr, y_ptr,
        y_stats_ptr, M, N, stride_bias, stride_scale, stride_rm, stride_rn, NORM, CENTRE, ACTIVATION, FAST, HAS_BIAS,
        HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, CHUNK, EARLY=False,
    )  # fmt: skip


@triton.jit
def _described_tile(
    x_desc,
    w_desc,
    bias_ptr,
    stats_ptr,
    column_sum_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    y_stats_ptr,
    row,
    column,
    M,
    N,
    K,
    stride_bias,
    stride_scale,
    stride_rm,
    stride_rn,
    eps,
    NORM: tl.constexpr,
    PARTIALS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EMIT_STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The tile of y that begins at (row, column). EARLY: what finishes it is loaded before the product, not behind."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    EARLY_STATS: tl.constexpr = EARLY and NORM != "none" and PARTIALS <= MANY_PARTIALS
    rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = acc
    residual = acc
    if EARLY_STATS:
        partials = load_moments(stats_ptr, tl.minimum(rows, M - 1), M, PARTIALS)
    if EARLY and HAS_RESIDUAL:
        columns = column + tl.arange(0, BLOCK_N)
        residual = load_residual(residual_ptr, rows, columns, M, N, stride_rm, stride_rn)
    for step in range(tiles_over(K, BLOCK_K)):
        k = step * BLOCK_K
        x = x_desc.load([row, k])
        acc = tl.dot(x, w_desc.load([column, k]).T, acc)
        if GATED:
            up = tl.dot(x, w_desc.load([N + column, k]).T, up)
    shift = tl.zeros((BLOCK_M,), tl.float32)
    rstd = shift
    if NORM != "none":
        if EARLY_STATS:
            mean, m2 = merge_loaded(partials, K, PARTIALS)
        else:
            mean, m2 = merge_moments(stats_ptr, tl.minimum(rows, M - 1), M, K, PARTIALS)
        shift, rstd = shift_and_scale(mean, m2, K, eps, NORM)
    finish(
        acc, up, residual, shift, rstd, rows, column, bias_ptr, column_sum_ptr, scale_ptr, residual_ptr, y_ptr,
        y_stats_ptr, M, N, stride_bias, stride_scale, stride_rm, stride_rn, NORM, False, ACTIVATION, FAST, HAS_BIAS,
        HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, CHUNK, EARLY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "halved"])
def linear_tma_kernel(
    x_desc,  # [M, K] in blocks of [BLOCK_M, BLOCK_K]
    x_half_desc,  # the same in blocks of [BLOCK_M / 2, BLOCK_K], HALVES only
    w_desc,  # [N, K], swiglu [2N, K], in blocks of [BLOCK_N, BLOCK_K]
    ahead_ptr,  # [N, K], swiglu [2N, K]: the weights, if they can be asked for ahead
    bias_ptr,
    stats_ptr,
    column_sum_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    y_stats_ptr,
    M,
    N,
    K,
    halved,
    stride_bias,
    stride_scale,
    stride_rm,
    stride_rn,
    eps,
    NORM: tl.constexpr,
    PARTIALS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EMIT_STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
    HALVES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """This program computes every P-th tile of y (of P programs), as `linear_kernel` would.

    Operands are of 16 bits; what lies past the end of x or of the weights reads as zero. HALVES: the last `halved`
    tiles are shared out as halves of BLOCK_M / 2 rows, where whole ones would leave SMs without work.
    """
    if ahead_ptr is not None:
        fetch_ahead(ahead_ptr, 2 * N if ACTIVATION == "swiglu" else N, K, OVERLAP)
    follow(OVERLAP)
    programs = tl.num_programs(0)
    whole = tiles_over(M, BLOCK_M) * tiles_over(N, BLOCK_N) - halved
    for tile in tl.range(tl.program_id(0), whole, programs, flatten=not EARLY):  # type: ignore[reportGeneralTypeIssues]
        tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        _described_tile(
            x_desc, w_desc, bias_ptr, stats_ptr, column_sum_ptr, scale_ptr, residual_ptr, y_ptr, y_stats_ptr,
            tile_m * BLOCK_M, tile_n * BLOCK_N, M, N, K, stride_bias, stride_scale, stride_rm, stride_rn, eps,
            NORM, PARTIALS, ACTIVATION, FAST, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, BLOCK_M, BLOCK_N, BLOCK_K,
            CHUNK, EARLY,
        )  # fmt: skip
    if HALVES:
        # Programs with a whole tile less come first.
        first = (tl.program_id(0) + programs - whole % programs) % programs
        for half in range(first, 2 * halved, programs):
            tile_m, tile_n = grouped_tile(whole + half // 2, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            _described_tile(
                x_half_desc, w_desc, bias_ptr, stats_ptr, column_sum_ptr, scale_ptr, residual_ptr, y_ptr, y_stats_ptr,
                tile_m * BLOCK_M + half % 2 * (BLOCK_M // 2), tile_n * BLOCK_N, M, N, K, stride_bias, stride_scale,
                stride_rm, stride_rn, eps, NORM, PARTIALS, ACTIVATION, FAST, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL,
                EMIT_STATS, BLOCK_M // 2, BLOCK_N, BLOCK_K, CHUNK, EARLY,
            )  # fmt: skip
