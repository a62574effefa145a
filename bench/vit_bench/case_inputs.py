"""What cases draw: for each kernel a function from sizes to one that draws the reference's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vit_bench.draw import Draw

Inputs = dict[str, Any]


def linear_inputs(m: int, k: int, n: int, *parts: str, gated: bool = False) -> Callable[[Draw], Inputs]:
    outputs = 2 * n if gated else n

    def inputs(draw: Draw) -> Inputs:
        normed = "norm" in parts or "rms" in parts
        made = {"x": draw.rows(m, k) if normed else draw.normal(m, k), "weight": draw.weight(outputs, k)}
        if "bias" in parts:
            made["bias"] = draw.bias(outputs)
        if normed:
            made["norm_weight"] = draw.gamma(k)
        if "norm" in parts:
            made["norm_bias"] = draw.bias(k)
        if "scale" in parts:
            made["layer_scale"] = draw.layer_scale(n)
        if "residual" in parts:
            made["residual"] = draw.rows(m, n)
        return made

    return inputs


def mlp_inputs(m: int, k: int, hidden: int, *, gated: bool = False) -> Callable[[Draw], Inputs]:
    outputs = 2 * hidden if gated else hidden

    def inputs(draw: Draw) -> Inputs:
        return {
            "x": draw.rows(m, k),
            "fc1_weight": draw.weight(outputs, k),
            "fc1_bias": draw.bias(outputs),
            "fc2_weight": draw.weight(k, hidden),
            "fc2_bias": draw.bias(k),
            "norm_weight": draw.gamma(k),
            "norm_bias": draw.bias(k),
            "layer_scale": draw.layer_scale(k),
            "residual": draw.rows(m, k),
        }

    return inputs


def patch_inputs(
    batch: int, size: int, patch: int, width: int, prefix: int, *, raw: bool = False, position_all: bool = True
) -> Callable[[Draw], Inputs]:
    count = (size // patch) ** 2

    def inputs(draw: Draw) -> Inputs:
        made: Inputs = {"images": draw.normal(batch, 3, size, size)}
        if raw:
            made["images"] = draw.integers(0, 256, batch, 3, size, size, dtype=torch.uint8).contiguous(
                memory_format=torch.channels_last
            )
            made["mean"] = torch.tensor([0.485, 0.456, 0.406], device=draw.device)
            made["std"] = torch.tensor([0.229, 0.224, 0.225], device=draw.device)
        made["weight"] = draw.weight(width, 3, patch, patch)
        made["bias"] = draw.bias(width)
        made["position"] = draw.normal(count + (prefix if position_all else 0), width)
        if prefix:
            made["prefix"] = draw.normal(prefix, width)
        return made

    return inputs


def norm_inputs(m: int, n: int, *, beta: bool = True) -> Callable[[Draw], Inputs]:
    def inputs(draw: Draw) -> Inputs:
        made = {"x": draw.rows(m, n), "weight": draw.gamma(n)}
        return {**made, "bias": draw.bias(n)} if beta else made

    return inputs


def head_inputs(
    heads: int, heads_k: int, width: int, *parts: str, tokens: int = 21, prefix: int = 0
) -> Callable[[Draw], Inputs]:
    """Views of a packed projection of two images. parts: "layer" or "rms" parameters, one table for "all" heads, for
    each "head" or for each "image", "narrow" if it has the dtype of q."""

    def inputs(draw: Draw) -> Inputs:
        packed = draw.normal(2, tokens, heads + heads_k, width)
        made: Inputs = {"q": packed[:, :, :heads], "k": packed[:, :, heads:]}
        if "layer" in parts or "rms" in parts:
            made |= {"q_weight": draw.gamma(width), "k_weight": draw.gamma(width)}
        if "layer" in parts:
            made |= {"q_bias": draw.bias(width), "k_bias": draw.bias(width)}
        for axes, table in (("all", ()), ("head", (heads,)), ("image", (2, 1))):
            if axes in parts:
                angles = 3 * draw.normal(*table, tokens - prefix, width).float()
                dtype = draw.dtype if "narrow" in parts else torch.float32
                made |= {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype), "prefix": prefix}
        return made

    return inputs
