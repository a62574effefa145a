"""Row statistics and LayerNorm / RMSNorm over rows of any width.

mean_m = 1/N sum_n x_mn      M2_m = sum_n (x_mn - mean_m)^2
LayerNorm: y = (x - mean) / sqrt(M2/N + eps) * gamma + beta        (arXiv 1607.06450, equations 3 and 4)
RMSNorm:   y = x / sqrt(1/N sum_n x_mn^2 + eps) * gamma + beta     (arXiv 1910.07467, equation 4)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles, with_torch
from .checks import check_choice, check_eps, check_floating, check_same_device, check_vector
from .device import device_of
from .launch import allocate, launch
from .primitives import STATS_COLUMNS, follow, row_moments, shift_and_scale


@triton.jit
def _chunked_moments(row_ptr, keep_rows, stride_n, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Mean and M2 [BLOCK_M] of rows wider than one tile: chunks merged one after the other (Chan's formula)."""
    mean = tl.zeros((BLOCK_M,), tl.float32)
    m2 = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        keep = keep_rows[:, None] & (columns < N)[None, :]
        x = tl.load(row_ptr[:, None] + columns[None, :].to(tl.int64) * stride_n, mask=keep, other=0.0).to(tl.float32)
        count = tl.minimum(N - start, BLOCK_N).to(tl.float32)
        chunk_mean, chunk_m2 = row_moments(x, keep, count, 1)
        apart = chunk_mean - mean
        total = start + count
        mean += apart * (count / total)
        m2 += chunk_m2 + apart * apart * (start * count / total)
    return mean, m2


@triton.jit(do_not_specialize=["M"])
def row_stats_kernel(
    x_ptr,  # [M, N]
    stats_ptr,  # [2, 1, M]
    M,
    N,
    stride_m,
    stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """This program computes the moments of rows [pid * BLOCK_M, (pid + 1) * BLOCK_M)."""
    follow(OVERLAP)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean, m2 = _chunked_moments(x_ptr + rows * stride_m, rows < M, stride_n, N, BLOCK_M, BLOCK_N)
    tl.store(stats_ptr + rows, mean, mask=rows < M)
    tl.store(stats_ptr + M + rows, m2, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def layer_norm_kernel(
    x_ptr,  # [M, N]
    gamma_ptr,  # [N]
    beta_ptr,  # [N]
    y_ptr,  # [M, N]
    M,
    N,
    stride_xm,
    stride_xn,
    stride_gamma,
    stride_beta,
    stride_ym,
    eps,
    NORM: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """This program computes rows [pid * BLOCK_M, (pid + 1) * BLOCK_M) of y."""
    follow(OVERLAP)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    keep_rows = rows < M
    row_ptr = x_ptr + rows * stride_xm
    if ONE_TILE:
        columns = tl.arange(0, BLOCK_N)
        keep = keep_rows[:, None] & (columns < N)[None, :]
        x = tl.load(row_ptr[:, None] + columns[None, :].to(tl.int64) * stride_xn, mask=keep, other=0.0).to(tl.float32)
        mean, m2 = row_moments(x, keep, N, 1)
    else:
        mean, m2 = _chunked_moments(row_ptr, keep_rows, stride_xn, N, BLOCK_M, BLOCK_N)
    shift, rstd = shift_and_scale(mean, m2, N, eps, NORM)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        keep = keep_rows[:, None] & (columns < N)[None, :]
        if not ONE_TILE:
            x = tl.load(row_ptr[:, None] + columns[None, :].to(tl.int64) * stride_xn, mask=keep, other=0.0).to(
                tl.float32
            )
        y = (x - shift[:, None]) * rstd[:, None]
        if HAS_GAMMA:
            gamma = tl.load(gamma_ptr + columns.to(tl.int64) * stride_gamma, mask=columns < N, other=0.0)
            y *= gamma.to(tl.float32)[None, :]
        if HAS_BETA:
            beta = tl.load(beta_ptr + columns.to(tl.int64) * stride_beta, mask=columns < N, other=0.0)
            y += beta.to(tl.float32)[None, :]
        out = y_ptr + rows[:, None] * stride_ym + columns[None, :]
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=keep)


def row_stats(x: torch.Tensor) -> torch.Tensor:
    """Mean and sum of squared deviations of every row, in fp32.

        mean_m = 1/N sum_n x_mn        M2_m = sum_n (x_mn - mean_m)^2

    x [M, N] fp32, fp16 or bf16 with any strides -> stats [2, 1, M] fp32: stats[0, 0] the means, stats[1, 0] the M2.
    This is the one-partial form of the statistics that `linear(..., emit_stats=True)` writes for its result.
    N must be at least 1. Raises TypeError or ValueError that names the argument, UnsupportedDeviceError for tensors the
    kernels cannot reach. Source: arXiv 1607.06450, equation 3, whose sigma is sqrt(M2/N).
    """
    check_floating("x", x, 2)
    m, n = x.shape
    if n == 0:
        raise ValueError("x must have at least one column; got shape " + str(tuple(x.shape)))
    stats = allocate(x, (2, 1, m), torch.float32)
    if m == 0:
        return stats
    call = tiles.described("row_stats", x.dtype, row_stride=x.stride(0))
    tile = tiles.choose_rows(m, n, x.element_size(), device_of(x), call=call)
    launch(
        x, row_stats_kernel, triton.cdiv(m, tile.block_m), x, stats, m, n, x.stride(0), x.stride(1),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    return stats


def emitted_stats(y: torch.Tensor) -> torch.Tensor:
    """Row statistics of y [M, N] in the form that `linear` emits, [2, ceil(N / 64), M], for a y of PyTorch's operators.

    Each partial gets the mean of the whole row and its share of M2: merged, that is the whole row's mean and M2.
    """
    whole = row_stats(y)
    columns, each = y.shape[1], STATS_COLUMNS.value
    partials = -(-columns // each)
    if partials == 1:
        return whole
    stats = whole.expand(2, partials, y.shape[0]).contiguous()
    stats[1] *= each / columns
    last = columns - (partials - 1) * each
    if last < each:
        stats[1, -1] *= last / each
    return stats


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    kind: str = "layer",
) -> torch.Tensor:
    """LayerNorm (kind "layer") or RMSNorm (kind "rms") over the last axis.

        layer: y = (x - mean) / sqrt(M2/N + eps) * weight + bias       (mean and M2 as `row_stats` has them)
        rms:   y = x / sqrt(1/N sum_n x_n^2 + eps) * weight + bias

    x [M, N] fp32, fp16 or bf16 with any strides; weight (gamma), bias (beta) [N] or None -> y [M, N] contiguous, in the
    dtype of x. Statistics, gamma and beta are applied in fp32 and rounded once.
    Raises TypeError or ValueError that names the argument, UnsupportedDeviceError for tensors the kernels cannot reach.
    Source: arXiv 1607.06450, equations 3 and 4; RMSNorm: arXiv 1910.07467, equation 4.
    """
    check_floating("x", x, 2)
    check_choice("kind", kind, ("layer", "rms"))
    check_eps(eps)
    m, n = x.shape
    if n == 0:
        raise ValueError("x must have at least one column; got shape " + str(tuple(x.shape)))
    check_vector("weight", weight, n, "N, the columns of x")
    check_vector("bias", bias, n, "N, the columns of x")
    check_same_device("x", x, {"weight": weight, "bias": bias})
    if m == 0:
        return allocate(x, (m, n))
    call = tiles.described("layer_norm", x.dtype, kind=kind, weight=weight, bias=bias, row_stride=x.stride(0))
    tile = tiles.choose_rows(m, n, x.element_size(), device_of(x), call=call)
    if tile is tiles.TORCH:
        return with_torch.layer_norm(x, weight, bias, eps=eps, kind=kind)
    y = allocate(x, (m, n))
    launch(
        x, layer_norm_kernel, triton.cdiv(m, tile.block_m), x, weight, bias, y, m, n, x.stride(0), x.stride(1),
        0 if weight is None else weight.stride(0), 0 if bias is None else bias.stride(0), y.stride(0), eps,
        NORM=kind, HAS_GAMMA=weight is not None, HAS_BETA=bias is not None, ONE_TILE=n <= tile.block_n,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    return y
