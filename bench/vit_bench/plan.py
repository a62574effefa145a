"""The launches of one forward pass as calls of the launchers, by shape only.

What compiling and timing need of a model is the shapes, dtypes, strides and options with which it calls the
launchers. Tensors live on the meta device by default, so that a batch of 256 through ViT-g costs no memory; elsewhere
they are ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

import vit_kernels
from vit_engine.config import ViTConfig

BATCHES = (1, 8, 64, 256)


@dataclass(frozen=True)
class Call:
    """One launcher call of a model.

    kernel: the launcher's name; label: what it is in the model; times: how often one forward pass of float images makes
    it, 0 for the calls of other entry points (uint8 images, features of all tokens, statistics of rows that no kernel
    of ours wrote).
    """

    kernel: str
    label: str
    run: Callable[[], object]
    times: int


def model_calls(config: ViTConfig, batch: int, dtype: torch.dtype, device: str = "meta") -> Iterator[Call]:
    """The distinct launcher calls of `config` (each encoder block repeats the same ones), in the order of a forward."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    new_fp32 = partial(new, dtype=torch.float32)
    width, hidden, tokens = config.embed_dim, config.mlp_hidden, config.num_tokens
    rows = batch * tokens
    vector = new(width)
    scale = new(width) if config.layer_scale is not None else None
    x = new(rows, width)
    stats = new_fp32(2, -(-width // 64), rows)

    size = (batch, config.in_channels, *config.image_hw)
    stem: list[torch.Tensor | None] = [new(width, config.in_channels, *config.patch_hw), vector]
    stem.append(new(config.num_prefix_tokens, width) if config.num_prefix_tokens else None)
    stem.append(new(config.num_patches + config.num_position_prefix, width))
    constants = new_fp32(config.in_channels)
    embed = partial(vit_kernels.patch_embed, emit_stats=True)
    yield Call("patch_embed", "stem", partial(embed, new(*size), *stem), 1)
    raw = new(*size, dtype=torch.uint8)
    yield Call("patch_embed", "stem, uint8", partial(embed, raw, *stem, mean=constants, std=constants), 0)
    yield Call("row_stats", "statistics", partial(vit_kernels.row_stats, x), 0)

    qkv, sums, folded_bias = new(3 * width, width), new_fp32(3 * width), new_fp32(3 * width)
    normed = partial(vit_kernels.linear, norm="layer", stats=stats, column_sum=sums)
    yield Call("linear", "qkv", partial(normed, x, qkv, folded_bias), config.depth)
    packed = new(batch, tokens, 3, config.num_heads, config.head_dim)
    yield Call("attention", "attention", partial(vit_kernels.attention, *packed.unbind(2)), config.depth)
    added = partial(vit_kernels.linear, layer_scale=scale, residual=x, emit_stats=True)
    attended = new(rows, width)
    yield Call("linear", "projection", partial(added, attended, new(width, width), vector), config.depth)

    inner = hidden // 2 if config.activation == "swiglu" else hidden
    sums, folded_bias = new_fp32(hidden), new_fp32(hidden)
    feed_forward = partial(
        vit_kernels.mlp,
        stats=stats,
        column_sum=sums,
        activation=config.activation,
        layer_scale=scale,
        residual=x,
        emit_stats=True,
    )
    run = partial(feed_forward, x, new(hidden, width), folded_bias, new(width, inner), vector)
    yield Call("mlp", "mlp", run, config.depth)
    # The class token is normalised alone. A mean over the patches is taken of normalised rows, or normalised itself.
    all_rows = config.global_pool == "avg" and not config.norm_after_pool
    normalise = partial(vit_kernels.layer_norm, weight=vector, bias=new(width))
    yield Call("layer_norm", "final norm", partial(normalise, x), int(all_rows))
    run = partial(normalise, x.view(batch, tokens, width)[:, 0])
    yield Call("layer_norm", "final norm, class token", run, int(not all_rows))
    if config.num_classes:
        head = new(config.num_classes, width), new(config.num_classes)
        yield Call("linear", "head", partial(vit_kernels.linear, new(batch, width), *head), 1)
