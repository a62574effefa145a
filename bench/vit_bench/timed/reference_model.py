"""What the logits of a ViT should be: the naive formulas of `vit_kernels.reference`, layer by layer, in any dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vit_engine import ViTConfig
from vit_kernels import reference


@torch.inference_mode()
def reference_logits(config: ViTConfig, state: Mapping[str, Tensor], images: Tensor, dtype: torch.dtype) -> Tensor:
    """Equations 1 to 4 of arXiv 2010.11929: images [B, C, H, W] -> logits [B, num_classes], or the class token [B, D].

    state: weights under timm's names. Everything is computed in dtype where the images are; they are rounded to it
    before. For models with a class token whose head reads it, without registers: those of the table of shapes.
    Raises ValueError for another architecture.
    """
    if config.global_pool != "token" or config.num_register_tokens or config.head != "finetune":
        raise ValueError("reference_logits: the model must classify by its class token, without registers")
    p = {name: tensor.to(images.device, dtype) for name, tensor in state.items()}
    batch, tokens, width = images.shape[0], config.num_tokens, config.embed_dim

    def linear(x: Tensor, name: str, norm: str = "", **options: Any) -> Tensor:
        if norm:
            options |= {"norm": "layer", "norm_weight": p[f"{norm}.weight"], "norm_bias": p[f"{norm}.bias"]}
        return reference.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"), eps=config.norm_eps, **options)

    stem = (p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], p["cls_token"][0], p["pos_embed"][0])
    z = reference.patch_embed(images.to(dtype), *stem).reshape(batch * tokens, width)
    for block in (f"blocks.{number}" for number in range(config.depth)):
        packed = linear(z, f"{block}.attn.qkv", f"{block}.norm1")
        q, k, v = packed.view(batch, tokens, 3, config.num_heads, config.head_dim).unbind(2)
        o, _ = reference.attention(q, k, v)
        scale = p.get(f"{block}.ls1.gamma")
        z = linear(o.reshape(batch * tokens, width), f"{block}.attn.proj", layer_scale=scale, residual=z)
        h = linear(z, f"{block}.mlp.fc1", f"{block}.norm2", activation=config.activation)
        z = linear(h, f"{block}.mlp.fc2", layer_scale=p.get(f"{block}.ls2.gamma"), residual=z)
    z = z.view(batch, tokens, width)[:, 0]
    z = reference.layer_norm(z, p["norm.weight"], p["norm.bias"], config.norm_eps)
    return linear(z, "head") if config.num_classes else z
