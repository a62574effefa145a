"""Flash attention: o = softmax(scale q k^T + mask) v, one pass over the keys with running maximum and sum.

Online softmax (arXiv 2205.14135, algorithm 1) in base 2: with s = log2(e) (scale q k^T + mask), a running row maximum m
and p = 2^(s - m), every new block of keys rescales what was accumulated by 2^(m_old - m_new).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import attention_tiles, tiles
from .attention_checks import check_attention, expand_mask
from .device import device_of
from .launch import allocate, launch
from .primitives import accumulate, tiles_over

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))


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
def _attend(
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
    first,
    last,
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
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the keys [first, last) to the running softmax. MASKED: some of them may be past the end or the diagonal."""
    d = tl.arange(0, MAIN)
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        keep_key = key < keys
        k_row = k_ptr + key.to(tl.int64)[:, None] * stride_kn * UNIT
        v_row = v_ptr + key.to(tl.int64)[:, None] * stride_vn * UNIT
        k = _load_keys(k_row + d.to(tl.int64)[None, :] * stride_kd, d, keep_key, WIDTH, MAIN, MASKED)
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
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
        # A row that has met no allowed key keeps the maximum -inf; -inf - -inf would be NaN where exp2(-inf) = 0 is
        # meant.
        offset = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED or MASK != "none" else new_max
        p = tl.exp2(s * scale - offset[:, None])
        rescale = tl.exp2(row_max - offset)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max

        v = _load_keys(v_row + d.to(tl.int64)[None, :] * stride_vd, d, keep_key, WIDTH, MAIN, MASKED)
        p = p.to(v.dtype)
        acc = accumulate(p, v, acc * rescale[:, None], PRECISION)
        if TAIL:
            d_tail = MAIN + tl.arange(0, TAIL)
            at = v_row + d_tail.to(tl.int64)[None, :] * stride_vd
            v_tail = _load_keys(at, d_tail, keep_key, WIDTH, MAIN + TAIL, MASKED)
            acc_tail = accumulate(p, v_tail, acc_tail * rescale[:, None], PRECISION)
    return acc, acc_tail, row_sum, row_max


@triton.jit
def attention_kernel(
    q_ptr,  # [B, Nq, H, D]
    k_ptr,  # [B, Nk, Hk, D]
    v_ptr,  # [B, Nk, Hk, D]
    key_lengths_ptr,  # [B]
    mask_ptr,  # [B, H, Nq, Nk], expanded by strides
    o_ptr,  # [B, Nq, H, D]
    lse_ptr,  # [B, H, Nq]
    heads,
    queries,
    keys,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_vd,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    logit_scale,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    MASK: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """This program computes queries [tile * BLOCK_M, (tile + 1) * BLOCK_M) of one head of one image.

    The tiles of a head follow each other, so that its keys and values are read from L2. Strides of images, tokens and
    heads count in UNIT elements.
    """
    tiles_m = tiles_over(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles_m
    head = (tl.program_id(0) // tiles_m) % heads
    image = (tl.program_id(0) // tiles_m // heads).to(tl.int64)
    head_k = (head // GROUP).to(tl.int64)
    q_ptr += (image * stride_qb + head.to(tl.int64) * stride_qh) * UNIT
    k_ptr += (image * stride_kb + head_k * stride_kh) * UNIT
    v_ptr += (image * stride_vb + head_k * stride_vh) * UNIT
    if MASK != "none":
        mask_ptr += image * stride_mask_b + head.to(tl.int64) * stride_mask_h

    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    keep_query = query < queries
    # Queries past the end repeat the last one; their results are dropped.
    row = tl.minimum(query, queries - 1).to(tl.int64)[:, None]
    q_row = q_ptr + row * stride_qn * UNIT
    d = tl.arange(0, MAIN)
    q = tl.load(q_row + d.to(tl.int64)[None, :] * stride_qd, mask=(d < WIDTH)[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    # Without a tail these two only fill the argument list.
    q_tail = q
    acc_tail = tl.zeros((BLOCK_M,), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if TAIL:
        d_tail = MAIN + tl.arange(0, TAIL)
        at = q_row + d_tail.to(tl.int64)[None, :] * stride_qd
        q_tail = tl.load(at, mask=(d_tail < WIDTH)[None, :], other=0.0)
        acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    # The diagonal is aligned bottom-right of all keys; a key length only cuts keys off.
    diagonal = keys - queries
    stop = keys
    if HAS_LENGTHS:
        stop = tl.maximum(tl.minimum(tl.load(key_lengths_ptr + image), keys), 0).to(tl.int32)
    length = stop
    whole = stop // BLOCK_N * BLOCK_N
    if CAUSAL:
        stop = tl.minimum(stop, (tile + 1) * BLOCK_M + diagonal)
        whole = tl.maximum(tl.minimum(whole, (tile * BLOCK_M + diagonal + 1) // BLOCK_N * BLOCK_N), 0)
    acc, acc_tail, row_sum, row_max = _attend(
        acc, acc_tail, row_sum, row_max, q, q_tail, k_ptr, v_ptr, mask_ptr,
        query, keep_query, 0, whole, length, diagonal,
        stride_kn, stride_kd, stride_vn, stride_vd, stride_mask_m, stride_mask_n, logit_scale,
        WIDTH, MAIN, TAIL, UNIT, MASK, CAUSAL, False, PRECISION, BLOCK_N,
    )  # fmt: skip
    acc, acc_tail, row_sum, row_max = _attend(
        acc, acc_tail, row_sum, row_max, q, q_tail, k_ptr, v_ptr, mask_ptr,
        query, keep_query, whole, stop, length, diagonal,
        stride_kn, stride_kd, stride_vn, stride_vd, stride_mask_m, stride_mask_n, logit_scale,
        WIDTH, MAIN, TAIL, UNIT, MASK, CAUSAL, True, PRECISION, BLOCK_N,
    )  # fmt: skip

    # A row without any allowed key has the sum 0 and gives 0.
    inverse = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)
    out = ((image * queries + row) * heads + head) * WIDTH
    tl.store(
        o_ptr + out + d[None, :],
        (acc * inverse[:, None]).to(o_ptr.dtype.element_ty),
        mask=keep_query[:, None] & (d < WIDTH)[None, :],
    )
    if TAIL:
        d_tail = MAIN + tl.arange(0, TAIL)
        tl.store(
            o_ptr + out + d_tail[None, :],
            (acc_tail * inverse[:, None]).to(o_ptr.dtype.element_ty),
            mask=keep_query[:, None] & (d_tail < WIDTH)[None, :],
        )
    if RETURN_LSE:
        lse = row_max * LN_2 + tl.log(row_sum)
        tl.store(lse_ptr + (image * heads + head) * queries + query, lse, mask=keep_query)


def _stride_unit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int:
    """8 for 16-bit tensors where 8 divides all strides but those of the head width, and 16 does not; else 1.

    Triton knows of a run-time number only whether 16 divides it. Heads 72 wide lie 72 elements apart; that 8 divides
    it, and with it loads of 16 bytes in place of 2, has to be said. Said where nothing is gained by it, or in fp32, it
    makes some tiles spill.
    """
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    gains = q.element_size() == 2 and any(stride % 16 for stride in strides)
    return 8 if gains and all(stride % 8 == 0 for stride in strides) else 1


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    return_lse: bool = False,
    tf32: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o = softmax(scale q k^T + mask) v per head, with fp32 statistics.

    q [B, Nq, H, D]; k, v [B, Nk, Hk, D] of one dtype (fp32, fp16, bf16) and any strides, so that the three views of a
    packed projection [B, N, 3, H, D] go in as they are. D from 1 to 128 (16 and more at full speed); H a multiple of
    Hk: query head h reads the key head h // (H / Hk). Returns o [B, Nq, H, D] contiguous, or (o, lse).

    scale: positive, default D**-0.5. causal: query i sees keys up to i + Nk - Nq (aligned bottom-right).
    key_lengths [B] int32 or int64: keys from there on are never read (values are clamped to [0, Nk]).
    mask: boolean (True: may attend) or additive floating, broadcastable to [B, H, Nq, Nk]. A masked key that *is* read
    must be finite: its weight is exactly 0, but 0 x NaN is NaN, as in PyTorch. Conditions add up.
    return_lse: also the natural-log sum of exponentials, lse [B, H, Nq] fp32.
    A query with no allowed key gives o = 0 and lse = -inf. tf32: as in `linear`.

    Raises TypeError or ValueError that names the argument, UnsupportedDeviceError for tensors the kernels cannot reach.
    Source: arXiv 1706.03762 equation 1, computed as arXiv 2205.14135 algorithm 1.
    """
    precision, scale = check_attention(q, k, v, scale, causal, key_lengths, mask, tf32)
    batch, queries, heads, width = q.shape
    keys, heads_k = k.shape[1], k.shape[2]
    o = allocate(q, (batch, queries, heads, width))
    lse = allocate(q, (batch, heads, queries), torch.float32) if return_lse else None
    if o.numel() > 0:
        kind, mask = expand_mask(mask, (batch, heads, queries, keys))
        main, tail = tiles.split_width(width)
        tile = attention_tiles.choose_attention(
            batch * heads, queries, keys, width, q.element_size(), device_of(q), masked=kind != "none"
        )
        unit = _stride_unit(q, k, v)
        strides = [stride // (unit if axis < 3 else 1) for x in (q, k, v) for axis, stride in enumerate(x.stride())]
        launch(
            q, attention_kernel, triton.cdiv(queries, tile.block_m) * batch * heads,
            q, k, v, key_lengths, mask, o, lse, heads, queries, keys,
            *strides, *((0, 0, 0, 0) if mask is None else mask.stride()),
            scale * LOG2_E.value,
            WIDTH=width, MAIN=main, TAIL=tail, GROUP=heads // heads_k, UNIT=unit, CAUSAL=causal,
            HAS_LENGTHS=key_lengths is not None, MASK=kind, RETURN_LSE=return_lse, PRECISION=precision,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return o if lse is None else (o, lse)
