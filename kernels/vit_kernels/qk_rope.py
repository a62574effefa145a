"""Normalisation of queries and keys per head, and rotary position embedding, of both in one launch.

x' = norm(x), over the D numbers of one head of one token:
    layer: (x - mean) / sqrt(M2/D + eps) * weight + bias       (arXiv 1607.06450; queries and keys: arXiv 2302.05442)
    rms:   x / sqrt(1/D sum x^2 + eps) * weight + bias         (arXiv 1910.07467)
y = x' cos + rot(x') sin, where rot turns pairs of columns by a right angle (arXiv 2104.09864, equation 34):
    halves (DINOv3, Hugging Face):          rot(x) = (-x[D/2:], x[:D/2])
    interleaved (EVA-02, Perception Encoder): rot(x) = (-x1, x0, -x3, x2, ...)

A head is held as two tiles, the first and the second column of each pair, so that a number's partner is in the same
place of the other tile and every number is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import qk_rope_tiles
from .device import device_of
from .launch import allocate, launch
from .primitives import follow, product, tiles_over
from .qk_rope_checks import check_qk_rope
from .tiles import described


@triton.jit
def _load_pairs(
    ptr,
    rows,
    keep_rows,
    stride,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    FIRST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rows of WIDTH numbers in fp32 as two tiles [rows, HALF], 0 where there are none: their first FIRST columns and
    the others, or, INTERLEAVED, the even and the odd ones."""
    if INTERLEAVED:
        # Neighbours are loaded together, or each load would leave every second number.
        columns = tl.arange(0, 2 * HALF)
        keep = keep_rows[:, None] & (columns < WIDTH)[None, :]
        x = tl.load(ptr + rows[:, None] + columns[None, :].to(tl.int64) * stride, mask=keep, other=0.0)
        first, second = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
        return first.to(tl.float32), second.to(tl.float32)
    columns = tl.arange(0, HALF)
    at = ptr + rows[:, None] + columns[None, :].to(tl.int64) * stride
    first = tl.load(at, mask=keep_rows[:, None] & (columns < FIRST)[None, :], other=0.0)
    at = ptr + rows[:, None] + (FIRST + columns)[None, :].to(tl.int64) * stride
    second = tl.load(at, mask=keep_rows[:, None] & (columns < WIDTH - FIRST)[None, :], other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(
    ptr,
    rows,
    keep_rows,
    first,
    second,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    FIRST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Writes what `_load_pairs` reads, columns next to each other."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * HALF)
        keep = keep_rows[:, None] & (columns < WIDTH)[None, :]
        y = tl.join(first.to(ptr.dtype.element_ty), second.to(ptr.dtype.element_ty))
        tl.store(ptr + rows[:, None] + columns[None, :], tl.reshape(y, (first.shape[0], 2 * HALF)), mask=keep)
    else:
        columns = tl.arange(0, HALF)
        at = ptr + rows[:, None] + columns[None, :]
        tl.store(at, first.to(ptr.dtype.element_ty), mask=keep_rows[:, None] & (columns < FIRST)[None, :])
        keep = keep_rows[:, None] & (columns < WIDTH - FIRST)[None, :]
        tl.store(at + FIRST, second.to(ptr.dtype.element_ty), mask=keep)


@triton.jit
def _load_vector(
    ptr, stride, WIDTH: tl.constexpr, HALF: tl.constexpr, FIRST: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """One vector as `_load_pairs` loads a row: two tiles [1, HALF]."""
    row = tl.zeros((1,), tl.int64)
    return _load_pairs(ptr, row, row == 0, stride, WIDTH, HALF, FIRST, INTERLEAVED)


@triton.jit
def _heads(
    x_ptr,  # [N, heads, D], strided
    y_ptr,  # [N, heads, D]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    token,
    keep,
    turned,  # where cos and sin are meant
    cos_first,  # [BLOCK_T, HALF]
    cos_second,
    sin_first,
    sin_second,
    first_head,
    stop_head,
    heads,
    stride_n,
    stride_h,
    stride_d,
    stride_weight,
    stride_bias,
    eps,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    FIRST: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Heads [first_head, stop_head) of these tokens."""
    keep_first = (tl.arange(0, HALF) < FIRST)[None, :]
    keep_second = (tl.arange(0, HALF) < WIDTH - FIRST)[None, :]
    if HAS_WEIGHT:
        weight_first, weight_second = _load_vector(weight_ptr, stride_weight, WIDTH, HALF, FIRST, INTERLEAVED)
    if HAS_BIAS:
        bias_first, bias_second = _load_vector(bias_ptr, stride_bias, WIDTH, HALF, FIRST, INTERLEAVED)
    for head in range(first_head, stop_head):
        head_ptr = x_ptr + tl.cast(head, tl.int64) * stride_h
        first, second = _load_pairs(head_ptr, token * stride_n, keep, stride_d, WIDTH, HALF, FIRST, INTERLEAVED)
        if NORM == "layer":
            mean = (tl.sum(first + second, 1) / WIDTH)[:, None]
            first = tl.where(keep_first, first - mean, 0.0)
            second = tl.where(keep_second, second - mean, 0.0)
        if NORM != "none":
            squares = tl.sum(product(first, first) + product(second, second), 1)
            rstd = tl.rsqrt(squares / WIDTH + eps)[:, None]
            first *= rstd
            second *= rstd
        if HAS_WEIGHT:
            first *= weight_first
            second *= weight_second
        if HAS_BIAS:
            first += bias_first
            second += bias_second
        if ROPE:
            # Class and register tokens keep their bits, whatever 0 times their partner would be.
            turned_first = tl.where(turned[:, None], first * cos_first - second * sin_first, first)
            second = tl.where(turned[:, None], second * cos_second + first * sin_second, second)
            first = turned_first
        row = (token * heads + head) * WIDTH
        _store_pairs(y_ptr, row, keep, first, second, WIDTH, HALF, FIRST, INTERLEAVED)


@triton.jit(do_not_specialize=["tokens", "heads_q", "heads_k", "heads_each", "groups", "prefix"])
def qk_rope_kernel(
    q_ptr,  # [B, N, H, D]
    k_ptr,  # [B, N, Hk, D]
    q_out_ptr,  # [B, N, H, D]
    k_out_ptr,  # [B, N, Hk, D]
    q_weight_ptr,  # [D]
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    cos_ptr,  # [B, H, N - prefix, D], strides of 0 where they are shared
    sin_ptr,
    tokens,
    heads_q,
    heads_k,
    heads_each,
    groups,
    prefix,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_q_weight,
    stride_q_bias,
    stride_k_weight,
    stride_k_bias,
    stride_cos_b,
    stride_cos_h,
    stride_cos_n,
    stride_cos_d,
    stride_sin_b,
    stride_sin_h,
    stride_sin_n,
    stride_sin_d,
    eps,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    FIRST: tl.constexpr,
    NORM: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_Q_BIAS: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    HAS_K_BIAS: tl.constexpr,
    ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """This program takes BLOCK_T tokens of one image through heads_each heads of q and the same of k.

    DENSE: heads lie next to each other. Their stride is then known to the compiler, which of a stride that is no
    multiple of 16 knows nothing, and would load one number at a time.
    """
    follow(OVERLAP)
    pid = tl.program_id(0)
    first_head = (pid % groups) * heads_each
    tiles = tiles_over(tokens, BLOCK_T)
    image = (pid // groups // tiles).to(tl.int64)
    token = (pid // groups % tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    keep = token < tokens
    at = token - prefix
    turned = keep & (at >= 0)
    cos_first, cos_second, sin_first, sin_second = None, None, None, None
    if ROPE:
        # One table serves all heads of the program; where each head has its own, a program has one head.
        table, rows = cos_ptr + image * stride_cos_b + first_head.to(tl.int64) * stride_cos_h, at * stride_cos_n
        cos_first, cos_second = _load_pairs(table, rows, turned, stride_cos_d, WIDTH, HALF, FIRST, INTERLEAVED)
        table, rows = sin_ptr + image * stride_sin_b + first_head.to(tl.int64) * stride_sin_h, at * stride_sin_n
        sin_first, sin_second = _load_pairs(table, rows, turned, stride_sin_d, WIDTH, HALF, FIRST, INTERLEAVED)
    written = image * tokens
    _heads(
        q_ptr + image * stride_qb, q_out_ptr + written * heads_q * WIDTH, q_weight_ptr, q_bias_ptr, token, keep, turned,
        cos_first, cos_second, sin_first, sin_second, first_head, min(first_head + heads_each, heads_q), heads_q,
        stride_qn, WIDTH if DENSE else stride_qh, stride_qd, stride_q_weight, stride_q_bias, eps,
        WIDTH, HALF, FIRST, NORM, HAS_Q_WEIGHT, HAS_Q_BIAS, ROPE, INTERLEAVED,
    )  # fmt: skip
    _heads(
        k_ptr + image * stride_kb, k_out_ptr + written * heads_k * WIDTH, k_weight_ptr, k_bias_ptr, token, keep, turned,
        cos_first, cos_second, sin_first, sin_second, first_head, min(first_head + heads_each, heads_k), heads_k,
        stride_kn, WIDTH if DENSE else stride_kh, stride_kd, stride_k_weight, stride_k_bias, eps,
        WIDTH, HALF, FIRST, NORM, HAS_K_WEIGHT, HAS_K_BIAS, ROPE, INTERLEAVED,
    )  # fmt: skip


def qk_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    norm: str = "none",
    q_weight: torch.Tensor | None = None,
    q_bias: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
    prefix: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, normalised per head (norm "layer" or "rms") and rotated (cos and sin), for `attention`.

        y = x' cos + rot(x') sin, where x' = norm(x) as `layer_norm` has it, over a head's D columns, with the weight
        and bias of q or k, and rot turns each pair of columns (a, b) into (-b, a); y = x' for the first `prefix` tokens

    q [B, N, H, D], k [B, N, Hk, D] fp32, fp16 or bf16 with any strides, views of a packed projection [B, N, 3, H, D]
    among them; D from 1 to 128, even where cos is given -> (q, k) of the same shapes and dtype, contiguous.
    q_weight, q_bias, k_weight, k_bias [D] or None: of the norms. cos, sin: both or neither; [N - prefix, D],
    [1 or H, N - prefix, D] or [1 or B, 1 or H, N - prefix, D], of one head count 1 where Hk differs from H. The first
    `prefix` tokens (class, registers) are only normalised. interleaved: pairs of columns are neighbours, as in timm's
    `rot`, and not D/2 apart, as in Hugging Face's `rotate_half`; cos and sin have D columns either way.
    Weights, cos and sin in any of the three dtypes, with any strides. All is computed in fp32 and rounded once.
    Raises TypeError or ValueError that names the argument, UnsupportedDeviceError for tensors the kernels cannot reach.
    Source: arXiv 2302.05442 (normalised queries and keys); arXiv 2104.09864, equation 34 (rotation).
    """
    tables = check_qk_rope(q, k, norm, q_weight, q_bias, k_weight, k_bias, eps, cos, sin, interleaved, prefix)
    batch, tokens, heads, width = q.shape
    q_out, k_out = allocate(q, tuple(q.shape)), allocate(k, tuple(k.shape))
    most = max(heads, k.shape[2])
    if batch * tokens * most == 0:
        return q_out, k_out
    call = described(
        "qk_rope", q.dtype, norm=norm, q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias, cos=cos,
        interleaved=interleaved, prefix=prefix, heads_q=heads, heads_k=k.shape[2], q_stride=q.stride(1),
    )  # fmt: skip
    tile = qk_rope_tiles.choose_qk_rope(batch, tokens, most, width, q.element_size(), device_of(q), call=call)
    cos, sin = tables if tables else (None, None)
    own_tables = cos is not None and sin is not None and (cos.stride(1) != 0 or sin.stride(1) != 0)
    heads_each = 1 if own_tables else tile.heads
    groups = triton.cdiv(most, heads_each)
    half = qk_rope_tiles.half_width(width)
    # Where nothing is turned, the second tile may begin where loads are widest.
    first = min(half, width) if cos is None else width // 2
    vectors = (q_weight, q_bias, k_weight, k_bias)
    launch(
        q, qk_rope_kernel, batch * triton.cdiv(tokens, tile.block_t) * groups, q, k, q_out, k_out, *vectors, cos, sin,
        tokens, heads, k.shape[2], heads_each, groups, prefix, *q.stride(), *k.stride(),
        *(0 if v is None else v.stride(0) for v in vectors),
        *((0, 0, 0, 0) if cos is None else cos.stride()), *((0, 0, 0, 0) if sin is None else sin.stride()), eps,
        WIDTH=width, HALF=half, FIRST=first, NORM=norm, HAS_Q_WEIGHT=q_weight is not None,
        HAS_Q_BIAS=q_bias is not None, HAS_K_WEIGHT=k_weight is not None, HAS_K_BIAS=k_bias is not None,
        ROPE=cos is not None, INTERLEAVED=cos is not None and interleaved,
        DENSE=q.stride(2) == width == k.stride(2), BLOCK_T=tile.block_t, num_warps=tile.num_warps,
    )  # fmt: skip
    return q_out, k_out
