"""Blocks of keys in flash attention: one block added to a running softmax, and a loop over blocks.

In base 2: with s = log2(e) (scale q k^T + mask), a running row maximum m and p = 2^(s - m), every new block of keys
rescales what was accumulated by 2^(m_old - m_new) (online softmax, arXiv 2205.14135, algorithm 1).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .primitives import accumulate

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load_keys(at, columns, n_keep, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """A [BLOCK_N, PADDED] tile of keys or values; key rows past the end and columns past the head width read as zero.

    The rows must not be read even where their weight is 0: they may be another image's, and 0 x NaN is NaN.
    """
    if MASKED and WIDTH < PADDED:
        return tl.load(at, mask=n_keep[:, None] & (columns < WIDTH)[None, :], other=0.0)
    if MASKED:
        return tl.load(at, mask=n_keep[:, None], other=0.0)
    if WIDTH < PADDED:
        return tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def attend_block(
    acc,  # [BLOCK_M, MAIN]
    acc_tail,  # [BLOCK_M, TAIL]
    row_sum,  # [BLOCK_M]
    row_max,  # [BLOCK_M], base-2 logits
    q,  # [BLOCK_M, MAIN]
    q_tail,  # [BLOCK_M, TAIL]
    k_ptr,
    v_ptr,
    mask_ptr,
    query,  # [BLOCK_M] query numbers
    keep_query,
    start,
    keys,
    diagonal,
    stride_kn,
    stride_kd,
    stride_vn,
    stride_vd,
    stride_mask_m,
    stride_mask_n,
    logit_scale,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the keys [start, start + BLOCK_N) to the running softmax.

    MASKED: some of them may be past the end or the diagonal. FIRST: acc and row_sum are 0 and row_max is -inf, so that
    nothing is rescaled; and no loop fetches the values ahead, so that they are asked for before they are needed.
    """
    d = tl.arange(0, MAIN)
    n = tl.arange(0, BLOCK_N)
    key = start + n
    keep_key = key < keys
    # What a block adds to the offsets is one number, so that the offsets inside a block stay in registers.
    k_row = k_ptr + tl.cast(start, tl.int64) * stride_kn * UNIT + n.to(tl.int64)[:, None] * stride_kn * UNIT
    v_row = v_ptr + tl.cast(start, tl.int64) * stride_vn * UNIT + n.to(tl.int64)[:, None] * stride_vn * UNIT
    k = _load_keys(k_row + d.to(tl.int64)[None, :] * stride_kd, d, keep_key, WIDTH, MAIN, MASKED)
    v_at = v_row + d.to(tl.int64)[None, :] * stride_vd
    if FIRST:
        v = _load_keys(v_at, d, keep_key, WIDTH, MAIN, MASKED)
    s = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if TAIL:
        d_tail = MAIN + tl.arange(0, TAIL)
        at = k_row + d_tail.to(tl.int64)[None, :] * stride_kd
        k_tail = _load_keys(at, d_tail, keep_key, WIDTH, MAIN + TAIL, MASKED)
        s = tl.dot(q_tail, k_tail.T, s, input_precision=PRECISION)

    if MASK == "additive":
        at = mask_ptr + query.to(tl.int64)[:, None] * stride_mask_m + key.to(tl.int64)[None, :] * stride_mask_n
        bias = tl.load(at, mask=keep_query[:, None] & keep_key[None, :], other=0.0)
        s = s * logit_scale + bias.to(tl.float32) * LOG2_E
    if MASK == "boolean":
        at = mask_ptr + query.to(tl.int64)[:, None] * stride_mask_m + key.to(tl.int64)[None, :] * stride_mask_n
        allowed = tl.load(at, mask=keep_query[:, None] & keep_key[None, :], other=0) != 0
        s = tl.where(allowed, s, float("-inf"))
    if MASKED:
        s = tl.where(keep_key[None, :], s, float("-inf"))
        if CAUSAL:
            s = tl.where(key[None, :] <= query[:, None] + diagonal, s, float("-inf"))

    # With an additive mask s is finished; without, its scale is left to one multiply-add per score below.
    scale = 1.0 if MASK == "additive" else logit_scale
    new_max = tl.max(s, 1) * scale
    if not FIRST:
        new_max = tl.maximum(row_max, new_max)
    # A row that has met no allowed key keeps the maximum -inf; -inf - -inf would be NaN where exp2(-inf) = 0 is meant.
    offset = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED or MASK != "none" else new_max
    p = tl.exp2(s * scale - offset[:, None])
    rescale = tl.exp2(row_max - offset)
    if not FIRST:
        row_sum = row_sum * rescale
        acc = acc * rescale[:, None]
        if TAIL:
            acc_tail = acc_tail * rescale[:, None]
        v = _load_keys(v_at, d, keep_key, WIDTH, MAIN, MASKED)
    row_sum += tl.sum(p, 1)
    p = p.to(v.dtype)
    acc = accumulate(p, v, acc, PRECISION)
    if TAIL:
        d_tail = MAIN + tl.arange(0, TAIL)
        at = v_row + d_tail.to(tl.int64)[None, :] * stride_vd
        v_tail = _load_keys(at, d_tail, keep_key, WIDTH, MAIN + TAIL, MASKED)
        acc_tail = accumulate(p, v_tail, acc_tail, PRECISION)
    return acc, acc_tail, row_sum, new_max
