"""Scaled dot-product attention (arXiv 1706.03762, equation 1) with the masks a Vision Transformer meets."""

from __future__ import annotations

import itertools

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale Q K^T + mask) V, one head at a time.

    q [B, Nq, H, D]; k, v [B, Nk, Hk, D] with H a multiple of Hk (query head h reads key head h // (H/Hk)); mask bool
    (True: may attend) or additive, broadcastable to [B, H, Nq, Nk]; key_lengths [B]: keys at and past it do not exist;
    causal: query i sees keys j <= i + Nk - Nq. Returns o [B, Nq, H, D] in the dtype of v and lse [B, H, Nq] (natural
    logarithm). A query without an allowed key gives o = 0 and lse = -inf.

    With 16-bit inputs scores and softmax are fp32 and the probabilities are rounded to the dtype of v before they meet
    it. That is what scaled_dot_product_attention does, PyTorch's own eager attention; modules that spell attention out
    also round the scores, which would let a kernel get away with twice the error.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    nq, nk, heads = q.shape[1], k.shape[1], q.shape[2]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    k = k.repeat_interleave(heads // k.shape[2], dim=2)  # [B, Nk, H, D]
    v = v.repeat_interleave(heads // v.shape[2], dim=2)  # [B, Nk, H, D]

    scores = factor * torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide))  # [B, H, Nq, Nk]
    allowed = torch.ones_like(scores, dtype=torch.bool)  # [B, H, Nq, Nk]
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores = scores + mask.to(wide)
    query = torch.arange(nq, device=q.device)[:, None]  # [Nq, 1]
    key = torch.arange(nk, device=q.device)[None, :]  # [1, Nk]
    if causal:
        allowed = allowed & (key <= query + nk - nq)
    if key_lengths is not None:
        allowed = allowed & (key < key_lengths[:, None, None, None])  # [B, 1, 1, Nk] on the right
    scores = scores.masked_fill(~allowed, -torch.inf)

    lse = torch.logsumexp(scores, -1)  # [B, H, Nq]
    none_allowed = torch.isneginf(lse)[..., None]  # [B, H, Nq, 1]
    probabilities = torch.exp(scores - lse[..., None]).masked_fill(none_allowed, 0.0)  # [B, H, Nq, Nk]
    o = torch.einsum("bhij,bjhd->bihd", probabilities.to(v.dtype), v)  # [B, Nq, H, D]
    return o, lse


def attention_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """`attention` of each sequence on its own: the rows cu_seqlens[i] to cu_seqlens[i + 1] - 1 of q, k and v.

    q [T, H, D]; k, v [T, Hk, D]. Returns o [T, H, D]. max_seqlen: the longest length or more, which a kernel must know
    and a formula need not.
    """
    sequences = list(itertools.pairwise(cu_seqlens.tolist()))
    if any(last - first > max_seqlen for first, last in sequences):
        raise ValueError(f"max_seqlen must be at least the longest length; got {max_seqlen}")
    parts = [attention(*(x[None, first:last] for x in (q, k, v)), scale, causal)[0][0] for first, last in sequences]
    return torch.cat([q[:0], *parts])
