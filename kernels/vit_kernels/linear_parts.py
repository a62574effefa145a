"""The kernels of `linear` for few rows and a long K: one sums parts of K, the other adds the parts up and finishes.

A small batch has fewer tiles than a GPU has SMs, and each of them reads all of K, however long that takes. Shared out
to `parts` programs a tile, K keeps the GPU busy. The parts meet in memory, in fp32, and are added in their order by the
launch behind: results are the same bit for bit every time, and no program waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ahead import fetch_ahead
from .linear_epilogue import finish
from .primitives import follow, merge_moments, shift_and_scale, tiles_over


@triton.jit(do_not_specialize=["M", "parts"])
def linear_parts_kernel(
    x,  # [M, K]: a descriptor in blocks of [BLOCK_M, BLOCK_K] if DESCRIBED, else a pointer
    w,  # [N, K]: a descriptor in blocks of [BLOCK_N, BLOCK_K] if DESCRIBED, else a pointer
    ahead_ptr,  # [N, K]: the weights, if they can be asked for ahead
    sums_ptr,  # [parts, M, N], fp32
    M,
    N,
    K,
    parts,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """This program sums x W^T over one part of K for a BLOCK_M x BLOCK_N tile; K is a multiple of BLOCK_K.

    The parts of a tile follow each other by one round of tiles. Operands are of 16 bits.
    """
    if ahead_ptr is not None:
        fetch_ahead(ahead_ptr, N, K, OVERLAP)
    follow(OVERLAP)
    tiles_m = tiles_over(M, BLOCK_M)
    tiles = tiles_m * tiles_over(N, BLOCK_N)
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    row = tile % tiles_m * BLOCK_M
    column = tile // tiles_m * BLOCK_N
    rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    steps = K // BLOCK_K
    first = part * steps // parts
    end = (part + 1) * steps // parts
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIBED:
        for step in range(first, end):
            acc = tl.dot(x.load([row, step * BLOCK_K]), w.load([column, step * BLOCK_K]).T, acc)
    else:
        # Rows and columns past the end repeat the last one: their sums are dropped.
        k = first.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        safe_columns = tl.minimum(columns, N - 1).to(tl.int64)
        x_at = x + tl.minimum(rows, M - 1)[:, None] * stride_xm + k[None, :] * stride_xk
        w_at = w + safe_columns[None, :] * stride_wn + k[:, None] * stride_wk
        ahead = tl.full((), BLOCK_K, tl.int64)
        for _ in range(end - first):
            acc = tl.dot(tl.load(x_at), tl.load(w_at), acc)
            x_at += ahead * stride_xk
            w_at += ahead * stride_wk
    at = sums_ptr + part.to(tl.int64) * M * N + rows[:, None] * N + columns[None, :]
    tl.store(at, acc, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def linear_sum_kernel(
    sums_ptr,  # [PARTS, M, N], fp32
    bias_ptr,  # [N]
    stats_ptr,  # [2, partials, M]: row statistics of x
    column_sum_ptr,  # [N], fp32
    scale_ptr,  # [N]: LayerScale
    residual_ptr,  # [M, N]
    y_ptr,  # [M, N]
    y_stats_ptr,  # [2, ceil(N / 64), M]: row statistics of y
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
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EMIT_STATS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """This program finishes a BLOCK_M x BLOCK_N tile of y from the sums over the parts of K, as `linear_kernel` would.

    K is what the rows of x had, for their norm.
    """
    follow(OVERLAP)
    tiles_m = tiles_over(M, BLOCK_M)
    column = tl.program_id(0) // tiles_m * BLOCK_N
    rows = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    at = sums_ptr + rows[:, None] * N + columns[None, :]
    keep = (rows < M)[:, None] & (columns < N)[None, :]
    acc = tl.load(at, mask=keep, other=0.0)
    for part in tl.static_range(1, PARTS):  # type: ignore[reportGeneralTypeIssues]
        acc += tl.load(at + tl.full((), part, tl.int64) * M * N, mask=keep, other=0.0)
    shift = tl.zeros((BLOCK_M,), tl.float32)
    rstd = shift
    if NORM != "none":
        mean, m2 = merge_moments(stats_ptr, tl.minimum(rows, M - 1), M, K, PARTIALS)
        shift, rstd = shift_and_scale(mean, m2, K, eps, NORM)
    finish(
        acc, acc, acc, shift, rstd, rows, column, bias_ptr, column_sum_ptr, scale_ptr, residual_ptr, y_ptr, y_stats_ptr,
        M, N, stride_bias, stride_scale, stride_rm, stride_rn, NORM, False, ACTIVATION, True, HAS_BIAS, HAS_SCALE,
        HAS_RESIDUAL, EMIT_STATS, BLOCK_N, EARLY=False,
    )  # fmt: skip
