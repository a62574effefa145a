"""Linear layer with everything around it fused in: y = residual + layer_scale * act(norm(x) W^T + b).

The normalisation in front is folded (see folding.py): the K loop is a plain matrix product of x and W', and

    norm(x) W^T + b = rstd (x W'^T - mean c) + d

is finished per row in the epilogue, from the row statistics that the producer of x left behind. (In fp32 the mean is
subtracted from x on its way into the product instead, which is exact to the last bits and costs little there.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import gemm_tiles, tiles
from .checks import (
    check_choice,
    check_eps,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tf32,
    check_vector,
)
from .device import device_of
from .launch import allocate, launch
from .primitives import (
    STATS_COLUMNS,
    accumulate,
    activate,
    grouped_tile,
    merge_moments,
    shift_and_scale,
    store_partial_moments,
)

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu")
NORMS = ("none", "layer", "rms")


# One compiled kernel for every number of rows: which multiples M is of aligns nothing that is loaded or stored wide.
@triton.jit(do_not_specialize=["M", "partials"])
def linear_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]; swiglu: [2N, K], gate rows first
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
    partials,
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
    PARTIALS_PADDED: tl.constexpr,
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
):
    """This program computes the BLOCK_M x BLOCK_N tile of y that `grouped_tile` gives it."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    keep_rows = rows < M
    keep_columns = columns < N

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
    if CENTRE:
        mean, m2 = merge_moments(stats_ptr, safe_rows, M, K, partials, PARTIALS_PADDED)
        shift, rstd = shift_and_scale(mean, m2, K, eps, NORM)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        up_at = w_ptr + (safe_columns + N)[None, :] * stride_wn + k[:, None] * stride_wk
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
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

    if NORM != "none":
        if not CENTRE:
            mean, m2 = merge_moments(stats_ptr, safe_rows, M, K, partials, PARTIALS_PADDED)
            shift, rstd = shift_and_scale(mean, m2, K, eps, NORM)
        if NORM == "layer" and not CENTRE:
            column_sum = tl.load(column_sum_ptr + columns, mask=keep_columns, other=0.0)
            acc -= shift[:, None] * column_sum[None, :]
            if GATED:
                column_sum = tl.load(column_sum_ptr + N + columns, mask=keep_columns, other=0.0)
                up -= shift[:, None] * column_sum[None, :]
        acc *= rstd[:, None]
        if GATED:
            up *= rstd[:, None]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns.to(tl.int64) * stride_bias, mask=keep_columns, other=0.0)
        acc += bias.to(tl.float32)[None, :]
        if GATED:
            bias = tl.load(bias_ptr + (columns.to(tl.int64) + N) * stride_bias, mask=keep_columns, other=0.0)
            up += bias.to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION, FAST)
    if GATED:
        acc *= up
    if HAS_SCALE:
        scale = tl.load(scale_ptr + columns.to(tl.int64) * stride_scale, mask=keep_columns, other=0.0)
        acc *= scale.to(tl.float32)[None, :]
    keep = keep_rows[:, None] & keep_columns[None, :]
    if HAS_RESIDUAL:
        at = residual_ptr + rows[:, None] * stride_rm + columns[None, :].to(tl.int64) * stride_rn
        acc += tl.load(at, mask=keep, other=0.0).to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], y, mask=keep)
    if EMIT_STATS:
        store_partial_moments(y_stats_ptr, y.to(tl.float32), rows, keep_rows, tile_n * BLOCK_N, M, N, BLOCK_M, BLOCK_N)


def stats_partials(columns: int) -> int:
    """Partials of the statistics that a GEMM emits for rows of this many columns: one per 64."""
    return tiles.cdiv(columns, STATS_COLUMNS.value)


def check_norm(
    norm: str,
    stats: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    rows: int,
    columns: int,
    outputs: int,
    *,
    stats_optional: bool = False,
) -> None:
    """The arguments of a folded normalisation: row statistics of x [rows, columns] and the folded weights' sums."""
    check_choice("norm", norm, NORMS)
    if norm == "none":
        for name, value in (("stats", stats), ("column_sum", column_sum)):
            if value is not None:
                raise ValueError(f"{name} belongs to norm='layer' or 'rms'; got it with norm='none'")
        return
    if stats is None and not stats_optional:
        raise ValueError(f"stats is needed for norm={norm!r}: pass row_stats(x) or what the producer of x emitted")
    if stats is not None:
        allowed = {1, stats_partials(columns)}
        if stats.dtype != torch.float32 or stats.ndim != 3 or not stats.is_contiguous():
            raise ValueError(
                f"stats must be contiguous fp32 [2, partials, {rows}]; got {stats.dtype} {tuple(stats.shape)}"
            )
        if stats.shape[0] != 2 or stats.shape[1] not in allowed or stats.shape[2] != rows:
            partials = " or ".join(str(t) for t in sorted(allowed))
            raise ValueError(f"stats must have shape (2, {partials}, {rows}); got {tuple(stats.shape)}")
    if column_sum is None:
        if norm == "layer":
            raise ValueError("column_sum is needed for norm='layer': fold_norm returns it beside the folded weight")
        return
    check_vector("column_sum", column_sum, outputs, "the rows of the folded weight")
    if column_sum.dtype != torch.float32 or not column_sum.is_contiguous():
        raise ValueError(f"column_sum must be contiguous fp32, as fold_norm returns it; got {column_sum.dtype}")


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: str = "none",
    stats: torch.Tensor | None = None,
    column_sum: torch.Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    layer_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    emit_stats: bool = False,
    tf32: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = residual + layer_scale * act(norm(x) W^T + b), accumulated in fp32 and rounded once.

    x [M, K], weight [N, K] of one dtype (fp32, fp16, bf16), any strides; bias, layer_scale [N] of any supported dtype;
    residual [M, N] in the dtype of x. Returns y [M, N] contiguous, or (y, stats) with emit_stats.

    norm "layer" or "rms" normalises the rows of x first: weight, column_sum and bias must come from `fold_norm`, stats
    [2, T, M] from `row_stats(x)` or from the `linear` or `patch_embed` that produced x, and eps is the norm's own.
    activation: "none", "gelu" (erf), "gelu_tanh", "quick_gelu" (x sigmoid(1.702 x)), "silu", or "swiglu", for which
    weight is [2N, K] and the result silu(first N) * (last N). In fp16 and bf16 the activations use the hardware's tanh.
    emit_stats: also returns the row statistics of y as stored, [2, ceil(N / 64), M] fp32, for the next norm.
    tf32: lets fp32 products round their operands to tf32; the default is IEEE fp32.

    Raises TypeError or ValueError that names the argument, UnsupportedDeviceError for tensors the kernels cannot reach.
    Source: arXiv 2010.11929, equations 2 and 3; the fold is derived in folding.py.
    """
    check_floating("x", x, 2)
    check_floating("weight", weight, 2)
    check_same_dtype("weight", weight, "x", x.dtype)
    check_choice("activation", activation, ACTIVATIONS)
    check_eps(eps)
    precision = check_tf32(tf32, x.dtype)
    m, k = x.shape
    outputs = weight.shape[0]
    gated = activation == "swiglu"
    if weight.shape[1] != k:
        raise ValueError(f"weight must have K = {k} columns like x; got shape {tuple(weight.shape)}")
    if gated and outputs % 2:
        raise ValueError(f"weight must have an even number of rows for swiglu (gate and value); got {outputs}")
    if k == 0 or outputs == 0:
        raise ValueError(f"weight must have at least one row and one column; got shape {tuple(weight.shape)}")
    n = outputs // 2 if gated else outputs
    check_vector("bias", bias, outputs, "the rows of weight")
    check_vector("layer_scale", layer_scale, n, "the columns of y")
    if residual is not None:
        check_floating("residual", residual, 2)
        check_same_dtype("residual", residual, "x", x.dtype)
        check_shape("residual", residual, (m, n), "the shape of y")
    check_norm(norm, stats, column_sum, m, k, outputs)
    others = {"weight": weight, "bias": bias, "stats": stats, "column_sum": column_sum, "layer_scale": layer_scale}
    check_same_device("x", x, others | {"residual": residual})

    y = allocate(x, (m, n))
    y_stats = allocate(x, (2, stats_partials(n), m), torch.float32) if emit_stats else None
    if m > 0:
        partials = 1 if stats is None else stats.shape[1]
        tile = gemm_tiles.choose_gemm(
            m, n, k, x.element_size(), device_of(x),
            gated=gated, long_epilogue=emit_stats or residual is not None, tf32=tf32,
        )  # fmt: skip
        launch(
            x, linear_kernel, triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),
            x, weight, bias, stats, column_sum, layer_scale, residual, y, y_stats, m, n, k, partials,
            x.stride(0), x.stride(1), weight.stride(0), weight.stride(1),
            0 if bias is None else bias.stride(0), 0 if layer_scale is None else layer_scale.stride(0),
            0 if residual is None else residual.stride(0), 0 if residual is None else residual.stride(1), eps,
            NORM=norm, PARTIALS_PADDED=triton.next_power_of_2(partials),
            ACTIVATION=activation, FAST=x.dtype != torch.float32,
            HAS_BIAS=bias is not None, HAS_SCALE=layer_scale is not None, HAS_RESIDUAL=residual is not None,
            EMIT_STATS=emit_stats, EVEN_K=k % tile.block_k == 0, PRECISION=precision,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y if y_stats is None else (y, y_stats)
