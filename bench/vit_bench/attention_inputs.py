"""Inputs of attention's correctness cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vit_bench.draw import Draw

Inputs = dict[str, Any]


def packed(batch: int, tokens: int, heads: int, width: int) -> Callable[[Draw], Inputs]:
    """Views of one packed projection [B, N, 3, H, D]."""
    return lambda draw: dict(zip("qkv", draw.normal(batch, tokens, 3, heads, width).unbind(2), strict=True))


def separate(
    batch: int, nq: int, nk: int, heads: int, heads_k: int, width: int, extra: str = ""
) -> Callable[[Draw], Inputs]:
    def inputs(draw: Draw) -> Inputs:
        made: Inputs = {
            "q": draw.normal(batch, nq, heads, width),
            "k": draw.normal(batch, nk, heads_k, width),
            "v": draw.normal(batch, nk, heads_k, width),
        }
        if extra == "lengths":
            made["key_lengths"] = draw.integers(0, nk + 1, batch, dtype=torch.int32)
        if extra == "boolean":
            # The first query of each head may attend to nothing.
            made["mask"] = draw.chance(0.7, batch, 1, nq, nk) & (torch.arange(nq, device=draw.device) > 0)[:, None]
        if extra == "additive":
            made["mask"] = draw.normal(1, heads, nq, nk)
        return made

    return inputs


def sequences(*lengths: int, heads: int, heads_k: int, width: int) -> Callable[[Draw], Inputs]:
    """Sequences one behind the other, for `attention_packed`."""

    def inputs(draw: Draw) -> Inputs:
        total = sum(lengths)
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(draw.device)
        q, k, v = (draw.normal(total, count, width) for count in (heads, heads_k, heads_k))
        return {"q": q, "k": k, "v": v, "cu_seqlens": bounds, "max_seqlen": max(lengths)}

    return inputs
