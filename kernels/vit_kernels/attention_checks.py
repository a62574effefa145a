"""What `attention` accepts, and its masks as strided views."""

from __future__ import annotations

import math

import torch

from .checks import (
    check_flag,
    check_floating,
    check_number,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_tf32,
    short,
)

MAX_HEAD_DIM = 128


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    key_lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    tf32: bool,
) -> tuple[str, float]:
    """Checks the arguments of `attention`; returns (input precision of the dots, scale)."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor, 4)
        check_same_dtype(name, tensor, "q", q.dtype)
    batch, _, heads, width = q.shape
    if not 1 <= width <= MAX_HEAD_DIM:
        raise ValueError(f"q must have a head width from 1 to {MAX_HEAD_DIM}; got shape {tuple(q.shape)}")
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"k must have shape ({batch}, keys, key heads, {width}) to fit q; got {tuple(k.shape)}")
    check_shape("v", v, tuple(k.shape), "the shape of k")
    heads_k = k.shape[2]
    if heads and (heads_k == 0 or heads % heads_k):
        raise ValueError(f"k must have a number of heads that divides q's {heads}; got {heads_k}")
    check_flag("causal", causal)
    if key_lengths is not None:
        check_tensor("key_lengths", key_lengths)
        if key_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"key_lengths must have dtype int32 or int64; got {short(key_lengths.dtype)}")
        check_shape("key_lengths", key_lengths, (batch,), "one length per image")
        if not key_lengths.is_contiguous():
            raise ValueError("key_lengths must be contiguous; call .contiguous() on it")
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise TypeError(f"mask must be boolean or floating point; got {short(mask.dtype)}")
        if mask.dtype == torch.float64:
            raise TypeError("mask must have dtype bool, float32, float16 or bfloat16; got float64")
        wanted = (batch, heads, q.shape[1], k.shape[1])
        if mask.ndim > 4 or any(m not in (1, w) for m, w in zip(reversed(mask.shape), reversed(wanted), strict=False)):
            raise ValueError(f"mask must be broadcastable to (B, H, Nq, Nk) = {wanted}; got {tuple(mask.shape)}")
    check_same_device("q", q, {"k": k, "v": v, "key_lengths": key_lengths, "mask": mask})
    if scale is not None:
        check_number("scale", scale)
    factor = 1 / math.sqrt(width) if scale is None else float(scale)
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"scale must be a positive finite number; got {scale}")
    return check_tf32(tf32, q.dtype), factor


def expand_mask(mask: torch.Tensor | None, shape: tuple[int, int, int, int]) -> tuple[str, torch.Tensor | None]:
    """("none" | "boolean" | "additive", the mask as a view of the full shape: broadcast axes have stride 0)."""
    if mask is None:
        return "none", None
    if mask.dtype == torch.bool:
        return "boolean", mask.view(torch.uint8).expand(shape)
    return "additive", mask.expand(shape)


def check_packing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> None:
    """Checks what `attention_packed` has and `attention` has not."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor, 3)
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have as many rows as q, {q.shape[0]}; got shape {tuple(tensor.shape)}")
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must have dtype int32 or int64; got {short(cu_seqlens.dtype)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0 or not cu_seqlens.is_contiguous():
        raise ValueError(
            f"cu_seqlens must be contiguous, with the shape (sequences + 1,); got {tuple(cu_seqlens.shape)}"
        )
    check_same_device("q", q, {"cu_seqlens": cu_seqlens})
    if not isinstance(max_seqlen, int) or isinstance(max_seqlen, bool):
        raise TypeError(f"max_seqlen must be an int; got {max_seqlen!r}")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must not be negative; got {max_seqlen}")
