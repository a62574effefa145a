"""What the kernels of `linear` do behind the product: the folded norm, bias, activation, LayerScale, residual, the
store, and the row statistics of what was stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import activate, activate_fast, rounded, store_partial_moments


@triton.jit
def _halves(x):
    """x [M, N] -> its left and its right N / 2 columns."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _norm_and_bias(
    acc, shift, rstd, columns, keep_columns, bias_ptr, column_sum_ptr, stride_bias,
    NORM: tl.constexpr, CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """TIMES (rstd (acc - shift c) + b), in two multiply-adds an element. CENTRED: the shift is not in acc any more."""
    added = tl.zeros((1, columns.shape[0]), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns.to(tl.int64) * stride_bias, mask=keep_columns, other=0.0)
        added = (bias.to(tl.float32) * TIMES)[None, :]
    if NORM == "none":
        return acc * TIMES + added
    scale = rstd * TIMES
    if NORM == "layer" and not CENTRED:
        column_sum = tl.load(column_sum_ptr + columns, mask=keep_columns, other=0.0)
        added = added - (shift * scale)[:, None] * column_sum[None, :]
    return acc * scale[:, None] + added


@triton.jit
def load_residual(residual_ptr, rows, columns, M, N, stride_rm, stride_rn):
    """The residual [rows, columns]; what lies past an end of it is not stored, and reads as zero."""
    keep = (rows < M)[:, None] & (columns < N)[None, :]
    at = residual_ptr + rows[:, None] * stride_rm + columns[None, :].to(tl.int64) * stride_rn
    return tl.load(at, mask=keep, other=0.0)


@triton.jit
def finish(
    acc,  # [BLOCK_M, width]
    up,  # [BLOCK_M, width]; swiglu only
    residual,  # [BLOCK_M, width]; EARLY: loaded before the product
    shift,  # [BLOCK_M]
    rstd,  # [BLOCK_M]
    rows,  # [BLOCK_M]
    first_column,
    bias_ptr,
    column_sum_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    y_stats_ptr,
    M,
    N,
    stride_bias,
    stride_scale,
    stride_rm,
    stride_rn,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EMIT_STATS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Everything behind the product, and the store; CHUNK columns at a time, because whole rows of a large tile and
    what is computed from them would not fit the registers together."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    WIDTH: tl.constexpr = acc.shape[1]
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    HALVED: tl.constexpr = FAST and ACTIVATION != "none"
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    if WIDTH > CHUNK:
        left, right = _halves(acc)
        up_left, up_right = _halves(up) if GATED else (left, right)
        residual_left, residual_right = _halves(residual) if EARLY and HAS_RESIDUAL else (left, right)
        finish(
            left, up_left, residual_left, shift, rstd, rows, first_column, bias_ptr, column_sum_ptr, scale_ptr,
            residual_ptr, y_ptr, y_stats_ptr, M, N, stride_bias, stride_scale, stride_rm, stride_rn, NORM, CENTRED,
            ACTIVATION, FAST, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, CHUNK, EARLY,
        )  # fmt: skip
        finish(
            right, up_right, residual_right, shift, rstd, rows, first_column + WIDTH // 2, bias_ptr, column_sum_ptr,
            scale_ptr, residual_ptr, y_ptr, y_stats_ptr, M, N, stride_bias, stride_scale, stride_rm, stride_rn, NORM,
            CENTRED, ACTIVATION, FAST, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, CHUNK, EARLY,
        )  # fmt: skip
    else:
        columns = first_column + tl.arange(0, WIDTH)
        keep_rows = rows < M
        keep_columns = columns < N
        acc = _norm_and_bias(
            acc, shift, rstd, columns, keep_columns, bias_ptr, column_sum_ptr, stride_bias, NORM, CENTRED, HAS_BIAS,
            TIMES=0.5 if HALVED else 1.0,
        )  # fmt: skip
        acc = activate_fast(acc, ACTIVATION, DTYPE) if HALVED else activate(acc, ACTIVATION, FAST, DTYPE)
        if GATED:
            # The value half of the weights, biases and sums follows the N rows of the gate.
            bias_up = bias_ptr + N.to(tl.int64) * stride_bias if HAS_BIAS else bias_ptr
            sum_up = column_sum_ptr + N if NORM == "layer" and not CENTRED else column_sum_ptr
            acc *= _norm_and_bias(
                up, shift, rstd, columns, keep_columns, bias_up, sum_up, stride_bias, NORM, CENTRED, HAS_BIAS, TIMES=1.0
            )
        if HAS_SCALE:
            scale = tl.load(scale_ptr + columns.to(tl.int64) * stride_scale, mask=keep_columns, other=0.0)
            acc *= scale.to(tl.float32)[None, :]
        keep = keep_rows[:, None] & keep_columns[None, :]
        if HAS_RESIDUAL:
            if not EARLY:
                residual = load_residual(residual_ptr, rows, columns, M, N, stride_rm, stride_rn)
            acc += residual.to(tl.float32)
        y, stored = rounded(acc, DTYPE)
        tl.store(y_ptr + rows[:, None] * N + columns[None, :], y, mask=keep)
        if EMIT_STATS:
            store_partial_moments(y_stats_ptr, stored, rows, keep_rows, first_column, M, N, BLOCK_M, WIDTH)
