"""The MLP of an encoder block as one call: y = residual + layer_scale * (act(norm(x) W1^T + b1) W2^T + b2).

For narrow models one kernel does it all, and the hidden features never leave the SM: it is shaped like attention, with
rows of W1 for keys, an activation for the softmax and columns of W2 for values (on sm_90: mlp_roles.py). Wide models
run two fused GEMMs: there a tile of fp32 results would not fit the register file, or leaves so little of it that two
GEMMs are faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import mlp_tiles, tiles
from .checks import (
    check_choice,
    check_eps,
    check_flag,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tf32,
    check_vector,
)
from .device import device_of
from .launch import allocate, launch
from .linear import ACTIVATIONS, check_norm, kernel_norm, linear, stats_partials
from .mlp_roles_launch import all_describable, launch_mlp_roles
from .norm import row_stats
from .primitives import accumulate, activate, follow, product, shift_and_scale, store_partial_moments


@triton.jit
def _hidden(
    x,  # [BLOCK_M, MAIN]
    x_tail,  # [BLOCK_M, TAIL]
    w1_ptr,
    bias_ptr,
    column_sum_ptr,
    hidden,  # [BLOCK_H] rows of W1
    keep_hidden,
    shift,  # [BLOCK_M]
    rstd,  # [BLOCK_M]
    stride_w1n,
    stride_w1k,
    stride_bias,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Hidden features before the activation [BLOCK_M, BLOCK_H], with the norm finished per row."""
    row = w1_ptr + hidden.to(tl.int64)[None, :] * stride_w1n
    d = tl.arange(0, MAIN)
    keep = keep_hidden[None, :] & (d < WIDTH)[:, None]
    w1 = tl.load(row + d.to(tl.int64)[:, None] * stride_w1k, mask=keep, other=0.0)
    h = tl.dot(x, w1, input_precision=PRECISION)
    if TAIL:
        d = MAIN + tl.arange(0, TAIL)
        keep = keep_hidden[None, :] & (d < WIDTH)[:, None]
        w1_tail = tl.load(row + d.to(tl.int64)[:, None] * stride_w1k, mask=keep, other=0.0)
        h = tl.dot(x_tail, w1_tail, h, input_precision=PRECISION)
    if NORM == "layer" and not CENTRED:
        column_sum = tl.load(column_sum_ptr + hidden, mask=keep_hidden, other=0.0)
        h -= shift[:, None] * column_sum[None, :]
    if NORM != "none":
        h *= rstd[:, None]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + hidden.to(tl.int64) * stride_bias, mask=keep_hidden, other=0.0)
        h += bias.to(tl.float32)[None, :]
    return h


@triton.jit
def _finish(
    acc,  # [BLOCK_M, PADDED]
    columns,
    keep_columns,
    rows,
    keep_rows,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    N,
    stride_bias,
    stride_scale,
    stride_rm,
    stride_rn,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Bias, LayerScale, residual and the store of some columns of y; returns them as stored, in fp32."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns.to(tl.int64) * stride_bias, mask=keep_columns, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if HAS_SCALE:
        scale = tl.load(scale_ptr + columns.to(tl.int64) * stride_scale, mask=keep_columns, other=0.0)
        acc *= scale.to(tl.float32)[None, :]
    keep = keep_rows[:, None] & keep_columns[None, :]
    if HAS_RESIDUAL:
        at = residual_ptr + rows[:, None] * stride_rm + columns[None, :].to(tl.int64) * stride_rn
        acc += tl.load(at, mask=keep, other=0.0).to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], y, mask=keep)
    return y.to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def mlp_kernel(
    x_ptr,  # [M, D]
    w1_ptr,  # [HIDDEN, D]; swiglu: [2 HIDDEN, D], gate rows first
    bias1_ptr,  # [HIDDEN]; swiglu: [2 HIDDEN]
    column_sum_ptr,  # [HIDDEN]; swiglu: [2 HIDDEN], fp32
    w2_ptr,  # [D, HIDDEN]
    bias2_ptr,  # [D]
    scale_ptr,  # [D]
    residual_ptr,  # [M, D]
    y_ptr,  # [M, D]
    y_stats_ptr,  # [2, 1, M]
    M,
    HIDDEN,
    stride_xm,
    stride_xk,
    stride_w1n,
    stride_w1k,
    stride_bias1,
    stride_w2n,
    stride_w2k,
    stride_bias2,
    stride_scale,
    stride_rm,
    stride_rn,
    eps,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS1: tl.constexpr,
    HAS_BIAS2: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EMIT_STATS: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """This program computes rows [pid * BLOCK_M, (pid + 1) * BLOCK_M) of y, all WIDTH = MAIN + TAIL columns of them."""
    follow(OVERLAP)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    keep_rows = rows < M
    x_row = x_ptr + tl.minimum(rows, M - 1)[:, None] * stride_xm
    d = tl.arange(0, MAIN)
    x = tl.load(x_row + d.to(tl.int64)[None, :] * stride_xk, mask=(d < WIDTH)[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    # Without a tail these two only fill the argument list.
    x_tail = x
    d_tail = d
    if TAIL:
        d_tail = MAIN + tl.arange(0, TAIL)
        x_tail = tl.load(x_row + d_tail.to(tl.int64)[None, :] * stride_xk, mask=(d_tail < WIDTH)[None, :], other=0.0)
        acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)

    shift = tl.zeros((BLOCK_M,), tl.float32)
    rstd = shift
    if NORM != "none":
        total = tl.sum(x.to(tl.float32), 1)
        if TAIL:
            total += tl.sum(x_tail.to(tl.float32), 1)
        mean = total / WIDTH
        apart = tl.where((d < WIDTH)[None, :], x.to(tl.float32) - mean[:, None], 0.0)
        m2 = tl.sum(product(apart, apart), 1)
        if TAIL:
            apart = tl.where((d_tail < WIDTH)[None, :], x_tail.to(tl.float32) - mean[:, None], 0.0)
            m2 += tl.sum(product(apart, apart), 1)
        shift, rstd = shift_and_scale(mean, m2, WIDTH, eps, NORM)
    # As in `linear`: fp32 rows are centred before the product, others after it.
    CENTRE: tl.constexpr = NORM == "layer" and x.dtype == tl.float32
    if CENTRE:
        x -= shift[:, None]
        if TAIL:
            x_tail -= shift[:, None]

    for start in range(0, HIDDEN, BLOCK_H):
        hidden = start + tl.arange(0, BLOCK_H)
        keep_hidden = hidden < HIDDEN
        h = _hidden(
            x, x_tail, w1_ptr, bias1_ptr, column_sum_ptr, hidden, keep_hidden, shift, rstd,
            stride_w1n, stride_w1k, stride_bias1, NORM, CENTRE, HAS_BIAS1, WIDTH, MAIN, TAIL, PRECISION,
        )  # fmt: skip
        h = activate(h, ACTIVATION, FAST, x.dtype)
        if ACTIVATION == "swiglu":
            h *= _hidden(
                x, x_tail, w1_ptr, bias1_ptr, column_sum_ptr, hidden + HIDDEN, keep_hidden, shift, rstd,
                stride_w1n, stride_w1k, stride_bias1, NORM, CENTRE, HAS_BIAS1, WIDTH, MAIN, TAIL, PRECISION,
            )  # fmt: skip
        # Features past the end are zero here (zero weights, no bias) for every activation, so W2's zeros meet zeros.
        h = h.to(x.dtype)
        w2_row = w2_ptr + hidden.to(tl.int64)[:, None] * stride_w2k
        keep = keep_hidden[:, None]
        w2 = tl.load(w2_row + d.to(tl.int64)[None, :] * stride_w2n, mask=keep & (d < WIDTH)[None, :], other=0.0)
        acc = accumulate(h, w2, acc, PRECISION)
        if TAIL:
            w2_tail = tl.load(
                w2_row + d_tail.to(tl.int64)[None, :] * stride_w2n, mask=keep & (d_tail < WIDTH)[None, :], other=0.0
            )
            acc_tail = accumulate(h, w2_tail, acc_tail, PRECISION)

    y = _finish(
        acc, d, d < WIDTH, rows, keep_rows, bias2_ptr, scale_ptr, residual_ptr, y_ptr, WIDTH,
        stride_bias2, stride_scale, stride_rm, stride_rn, HAS_BIAS2, HAS_SCALE, HAS_RESIDUAL,
    )  # fmt: skip
    if TAIL:
        y_tail = _finish(
            acc_tail, d_tail, d_tail < WIDTH, rows, keep_rows, bias2_ptr, scale_ptr, residual_ptr, y_ptr, WIDTH,
            stride_bias2, stride_scale, stride_rm, stride_rn, HAS_BIAS2, HAS_SCALE, HAS_RESIDUAL,
        )  # fmt: skip
    if EMIT_STATS:
        store_partial_moments(y_stats_ptr, y, rows, keep_rows, 0, M, WIDTH, BLOCK_M, MAIN)
        if TAIL:
            store_partial_moments(y_stats_ptr, y_tail, rows, keep_rows, MAIN, M, WIDTH, BLOCK_M, TAIL)


def mlp(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None = None,
    *,
    norm: str = "layer",
    stats: torch.Tensor | None = None,
    column_sum: torch.Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "gelu",
    layer_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    emit_stats: bool = False,
    fused: bool | None = None,
    tf32: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = residual + layer_scale * (act(norm(x) W1^T + b1) W2^T + b2)

    x [M, D]; fc1_weight [H, D] (swiglu: [2H, D], gate rows first); fc2_weight [D, H]; all of one dtype (fp32, fp16,
    bf16), any strides. Biases, layer_scale of any supported dtype; residual [M, D] in the dtype of x. Returns y [M, D]
    contiguous, or (y, stats) with emit_stats: the row statistics [2, ceil(D / 64), M] of y.

    norm "layer" or "rms": fc1_weight, column_sum and fc1_bias come from `fold_norm`. stats are the row statistics of x;
    None computes them. Activations, eps, tf32 and a column_sum of None as in `linear`; the hidden features are rounded
    to the dtype of x.
    fused: True for one kernel (D <= 384 only), False for two GEMMs; None lets the tile choice decide: one kernel up to
    D = 192, where that is faster (see mlp_tiles.py), unless a tuned file knows better.

    Raises TypeError or ValueError that names the argument, UnsupportedDeviceError for tensors the kernels cannot reach.
    Source: arXiv 2010.11929, equation 3 and appendix; SwiGLU: arXiv 2002.05202, equation 6.
    """
    check_flag("emit_stats", emit_stats)
    precision = _check_mlp(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm, stats, column_sum, eps, activation, layer_scale, residual,
        fused, tf32,
    )  # fmt: skip
    m, width = x.shape
    hidden = fc2_weight.shape[1]
    gated = activation == "swiglu"
    tile = None
    if fused is not False and width <= mlp_tiles.MLP_MAX_WIDTH and m > 0:
        call = tiles.described(
            "mlp", x.dtype, norm=norm, activation=activation, fc1_bias=fc1_bias, fc2_bias=fc2_bias,
            layer_scale=layer_scale, residual=residual, emit_stats=emit_stats, row_stride=x.stride(0), tf32=tf32,
        )  # fmt: skip
        tile = mlp_tiles.choose_mlp(
            m, width, hidden, x.element_size(), device_of(x), gated=gated, always=fused is True,
            described=all_describable(x, fc1_weight, fc2_weight, residual), call=call,
        )  # fmt: skip
    if fused and m > 0 and tile is None:
        raise ValueError(
            f"fused=True: no tile of the one-kernel MLP for D = {width} and {x.dtype} fits the shared memory of "
            f"{device_of(x).name} ({device_of(x).shared_memory} bytes): leave fused at None or False"
        )
    if norm != "none" and stats is None and (tile is None or tile.roles):
        stats = row_stats(x)
    if tile is None:
        h = linear(
            x, fc1_weight, fc1_bias, norm=norm, stats=stats, column_sum=column_sum, eps=eps, activation=activation,
            tf32=tf32,
        )  # fmt: skip
        assert isinstance(h, torch.Tensor)
        return linear(
            h, fc2_weight, fc2_bias, layer_scale=layer_scale, residual=residual, emit_stats=emit_stats, tf32=tf32
        )

    y = allocate(x, (m, width))
    y_stats = allocate(x, (2, stats_partials(width), m), torch.float32) if emit_stats else None
    if tile.roles:
        launch_mlp_roles(
            tile, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, kernel_norm(norm, column_sum, x.dtype), stats,
            column_sum, eps, activation, layer_scale, residual, y, y_stats,
        )  # fmt: skip
        return y if y_stats is None else (y, y_stats)
    main, tail = tiles.split_width(width, 64)
    launch(
        x, mlp_kernel, triton.cdiv(m, tile.block_m),
        x, fc1_weight, fc1_bias, column_sum, fc2_weight, fc2_bias, layer_scale, residual, y, y_stats, m, hidden,
        x.stride(0), x.stride(1), fc1_weight.stride(0), fc1_weight.stride(1),
        0 if fc1_bias is None else fc1_bias.stride(0), fc2_weight.stride(0), fc2_weight.stride(1),
        0 if fc2_bias is None else fc2_bias.stride(0), 0 if layer_scale is None else layer_scale.stride(0),
        0 if residual is None else residual.stride(0), 0 if residual is None else residual.stride(1), eps,
        NORM=kernel_norm(norm, column_sum, x.dtype), ACTIVATION=activation, FAST=x.dtype != torch.float32,
        HAS_BIAS1=fc1_bias is not None, HAS_BIAS2=fc2_bias is not None, HAS_SCALE=layer_scale is not None,
        HAS_RESIDUAL=residual is not None, EMIT_STATS=emit_stats, WIDTH=width, MAIN=main, TAIL=tail,
        PRECISION=precision, BLOCK_M=tile.block_m, BLOCK_H=tile.block_h,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y if y_stats is None else (y, y_stats)


def _check_mlp(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    norm: str,
    stats: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    eps: float,
    activation: str,
    layer_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    fused: bool | None,
    tf32: bool,
) -> str:
    """Checks the arguments of `mlp`; returns the input precision of its dots."""
    check_floating("x", x, 2)
    m, width = x.shape
    for name, weight in (("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight)):
        check_floating(name, weight, 2)
        check_same_dtype(name, weight, "x", x.dtype)
    check_choice("activation", activation, ACTIVATIONS)
    check_eps(eps)
    if fused is not None:
        check_flag("fused", fused)
    hidden = fc2_weight.shape[1]
    outputs = 2 * hidden if activation == "swiglu" else hidden
    check_shape("fc2_weight", fc2_weight, (width, hidden), "D x hidden, D the columns of x")
    meaning = "hidden (swiglu: gate and value, 2 x hidden) x D, hidden the columns of fc2_weight"
    check_shape("fc1_weight", fc1_weight, (outputs, width), meaning)
    if width == 0 or hidden == 0:
        raise ValueError(f"fc2_weight must have at least one row and one column; got shape {tuple(fc2_weight.shape)}")
    check_vector("fc1_bias", fc1_bias, outputs, "the rows of fc1_weight")
    check_vector("fc2_bias", fc2_bias, width, "the rows of fc2_weight")
    check_vector("layer_scale", layer_scale, width, "the columns of y")
    if residual is not None:
        check_floating("residual", residual, 2)
        check_same_dtype("residual", residual, "x", x.dtype)
        check_shape("residual", residual, (m, width), "the shape of y")
    check_norm(norm, stats, column_sum, m, width, outputs, stats_optional=True)
    others = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    others |= {"stats": stats, "column_sum": column_sum, "layer_scale": layer_scale, "residual": residual}
    check_same_device("x", x, others)
    if fused and width > mlp_tiles.MLP_MAX_WIDTH:
        limit = mlp_tiles.MLP_MAX_WIDTH
        raise ValueError(f"fused=True needs D <= {limit}; got D = {width}: leave fused at None or False")
    return check_tf32(tf32, x.dtype)
