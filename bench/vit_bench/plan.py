"""The launches of one forward pass as calls of the launchers, by shape only.

What the compile matrix needs of a model is the shapes, dtypes, strides and options with which it calls the launchers; no
weight has a value here. Tensors live on the meta device, so that a batch of 256 through ViT-g costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import vit_kernels
from vit_engine.config import ViTConfig

BATCHES = (1, 8, 64, 256)


@dataclass(frozen=True)
class Call:
    """One launcher call of a model. kernel: the launcher's name; label: what it is in the model."""

    kernel: str
    label: str
    run: Callable[[], object]


def model_calls(config: ViTConfig, batch: int, dtype: torch.dtype) -> Iterator[Call]:
    """The distinct launcher calls of one forward pass of `config` (each encoder block repeats the same ones)."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    width, tokens, heads = config.embed_dim, config.num_tokens, config.num_heads
    rows = batch * tokens
    vector = new(width)
    scale = new(width) if config.layer_scale is not None else None
    x = new(rows, width)
    stats = new(2, -(-width // 64), rows, dtype=torch.float32)
    float_sums = {n: new(n, dtype=torch.float32) for n in (3 * width, config.mlp_hidden)}

    height, width_px = config.image_hw
    weight = new(width, config.in_channels, *config.patch_hw)
    prefix = new(config.num_prefix_tokens, width) if config.num_prefix_tokens else None
    position = new(config.num_patches + config.num_position_prefix, width)
    pixels = new(batch, config.in_channels, height, width_px)
    raw = new(batch, config.in_channels, height, width_px, dtype=torch.uint8)
    constants = new(config.in_channels, dtype=torch.float32)
    yield Call(
        "patch_embed",
        "stem",
        lambda: vit_kernels.patch_embed(pixels, weight, vector, prefix, position, emit_stats=True),
    )
    yield Call(
        "patch_embed",
        "stem, uint8",
        lambda: vit_kernels.patch_embed(
            raw, weight, vector, prefix, position, mean=constants, std=constants, emit_stats=True
        ),
    )
    yield Call("row_stats", "statistics", lambda: vit_kernels.row_stats(x))

    qkv_bias = float_sums[3 * width]
    yield Call(
        "linear",
        "qkv",
        lambda: vit_kernels.linear(
            x, new(3 * width, width), qkv_bias, norm="layer", stats=stats, column_sum=float_sums[3 * width]
        ),
    )
    packed = new(batch, tokens, 3, heads, config.head_dim)
    yield Call("attention", "attention", lambda: vit_kernels.attention(*packed.unbind(2)))
    yield Call(
        "linear",
        "projection",
        lambda: vit_kernels.linear(x, new(width, width), vector, layer_scale=scale, residual=x, emit_stats=True),
    )
    inner = config.mlp_hidden // 2 if config.activation == "swiglu" else config.mlp_hidden
    yield Call(
        "mlp",
        "mlp",
        lambda: vit_kernels.mlp(
            x,
            new(config.mlp_hidden, width),
            float_sums[config.mlp_hidden],
            new(width, inner),
            vector,
            stats=stats,
            column_sum=float_sums[config.mlp_hidden],
            activation=config.activation,
            layer_scale=scale,
            residual=x,
            emit_stats=True,
        ),
    )
    yield Call("layer_norm", "final norm", lambda: vit_kernels.layer_norm(x, vector, vector))
    if config.num_classes:
        pooled = new(batch, width)
        yield Call(
            "linear", "head", lambda: vit_kernels.linear(pooled, new(config.num_classes, width), new(config.num_classes))
        )
