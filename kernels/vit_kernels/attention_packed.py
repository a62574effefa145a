"""Attention inside each of many sequences that lie one behind the other, without padding (NaViT, arXiv 2307.06304)."""

from __future__ import annotations

import torch

from . import attention_tiles
from .attention import launch_attention
from .attention_checks import check_attention, check_packing
from .device import device_of
from .launch import allocate


def attention_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    tf32: bool = False,
) -> torch.Tensor:
    """o[s] = softmax(scale q[s] k[s]^T) v[s] for the rows s = cu_seqlens[i] to cu_seqlens[i + 1] - 1 of each sequence.

    q [T, H, D]; k, v [T, Hk, D], of one dtype (fp32, fp16, bf16) and any strides; heads and D as in `attention`.
    cu_seqlens [S + 1] int32 or int64, contiguous: cumulative lengths, from 0 to T, never falling; a sequence may be
    empty. max_seqlen: at least the longest length. Both are taken at their word, since looking would make the host wait
    for the GPU: rows past max_seqlen of a longer sequence, and rows of no sequence, are not written. Returns o
    [T, H, D] contiguous. scale, causal, tf32: as in `attention`; no row of another sequence is ever read.

    The same bits as `attention` on one sequence with its length as `key_lengths`, where both get the same tile.

    Raises TypeError or ValueError that names the argument, UnsupportedDeviceError for tensors the kernels cannot reach.
    Source: arXiv 2307.06304 (sequences packed into one); within one, arXiv 1706.03762, equation 1.
    """
    check_packing(q, k, v, cu_seqlens, max_seqlen)
    one_image = [x[None] for x in (q, k, v)]
    precision, scale = check_attention(*one_image, scale, causal, None, None, tf32)
    _, heads, width = q.shape
    sequences = cu_seqlens.numel() - 1
    o = allocate(q, q.shape)
    if o.numel() > 0 and sequences > 0 and max_seqlen > 0:
        tile = attention_tiles.choose_attention(
            sequences * heads, max_seqlen, max_seqlen, width, q.element_size(), device_of(q)
        )
        launch_attention(
            tile, *one_image, cu_seqlens, None, o, None, scale, sequences=sequences, queries=max_seqlen,
            keys=max_seqlen, mask_kind="none", causal=causal, packed=True, precision=precision,
        )  # fmt: skip
    return o
