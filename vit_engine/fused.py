"""The launch plan: a ViT's forward pass on the kernels, five launches per encoder block.

    stem    patch_embed                    tokens z [B * T, D] and their row statistics
    block   see encoder_block.py           z and its row statistics
    tail    layer_norm on what the head reads, head

Where the head reads the class token (equation 4), the last block has keys and values of all tokens, and the rest of it
for the class token alone.

The parameters are the model's own; only the folded weights are copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import ops
from .attention_pool import PoolPlan, run_pool
from .encoder_block import BlockPlan, Norm, Source, Stack, run_block
from .layers import Block, LayerScale
from .plain_parts import changed_methods

if TYPE_CHECKING:
    from .pooling import AttentionPool
    from .vit import ViT

__all__ = ["forward", "forward_features", "forward_head"]


def forward_features(model: ViT, images: Tensor) -> Tensor:
    """images [B, C, H, W] -> tokens [B, T, D] after the final norm (before it, if it comes after pooling)."""
    return _normed(model, encode(model, images))


def forward(model: ViT, images: Tensor) -> Tensor:
    """images [B, C, H, W] -> logits. Equation 4 reads the class token alone, so the last block computes no other."""
    if model.config.global_pool == "token":
        if isinstance(model.pre_logits, nn.Identity) and isinstance(model.head, nn.Linear):
            # Nothing but launches from the pixels to the logits.
            return _repeated(model, "forward", images, lambda: _classify_token(model, _class_token(model, images)))
        return _classify_token(model, _repeated(model, "class token", images, lambda: _class_token(model, images)))
    if model.attn_pool is not None and isinstance(model.pre_logits, nn.Identity):
        return _repeated(model, "forward", images, lambda: forward_head(model, _normed(model, _encode(model, images))))
    return forward_head(
        model, _normed(model, _repeated(model, "encode for the head", images, lambda: _encode(model, images)))
    )


def forward_head(model: ViT, tokens: Tensor, pre_logits: bool = False) -> Tensor:
    """tokens [B, T, D] of forward_features() -> logits, or the classifier's input."""
    x = model.pool(tokens) if model.attn_pool is None else _attention_pool(model, model.attn_pool, tokens)
    if isinstance(model.fc_norm, nn.LayerNorm):
        x = _norm(x, model.fc_norm)
    return _classify(model, x, pre_logits)


def encode(model: ViT, images: Tensor) -> Tensor:
    """images [B, C, H, W] -> tokens z_L [B, T, D] behind the last block, not normalised (equations 1 to 3)."""
    return _repeated(model, "encode", images, lambda: _encode(model, images), head=False)


def _repeated(model: ViT, kind: str, images: Tensor, written: Callable[[], Tensor], head: bool = True) -> Tensor:
    """written(), or its launches again.

    Whether the model is made of what the kernels compute is asked where a pass runs as written, so once for all its
    repetitions: they end with any change of the model. head: whether the head is part of what the kernels stand for.
    """

    def run() -> tuple[Tensor]:
        model.require_plain_parts(head)
        return (written(),)

    # A graph that is traced has no use for repetitions, nor for the locks they have; and these know the parts of the
    # model, not its methods.
    if torch.compiler.is_compiling() or changed_methods(model, head) is not None:
        return run()[0]
    return model.replays.run(kind, model, (images,), run)[0]


def _class_token(model: ViT, images: Tensor) -> Tensor:
    """images [B, C, H, W] -> class tokens z_L^0 [B, D], not normalised."""
    return _encode(model, images, class_token=True)[:, 0]


def _encode(model: ViT, images: Tensor, class_token: bool = False) -> Tensor:
    """z_L [B, T, D]; class_token: z_L^0 alone, [B, 1, D]."""
    stem = model.patch_embed
    use_constants = images.dtype == torch.uint8
    z, stats = ops.patch_embed(
        images, stem.proj.weight, stem.proj.bias, _prefix(model), model.position_embedding(stem.grid(images)),
        mean=stem.mean if use_constants else None, std=stem.std if use_constants else None, emit_stats=True,
    )  # fmt: skip
    batch, tokens, width = z.shape
    z = z.view(batch * tokens, width)
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        last = number == len(model.blocks) - 1
        z, stats = run_block(
            _plan(block), z, stats, (batch, tokens), model.derived, f"blocks.{number}",
            first_token=class_token and last,
        )  # fmt: skip
    return z.view(batch, 1 if class_token else tokens, width)


def _plan(block: Block) -> BlockPlan:
    attn, mlp = block.attn, block.mlp
    return BlockPlan(
        norm1=Norm(block.norm1),
        qkv=_layer(attn.qkv),
        heads=attn.num_heads,
        heads_k=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.scale,
        proj=_layer(attn.proj),
        gamma1=_gamma(block.ls1),
        norm2=Norm(block.norm2),
        fc1=_layer(mlp.fc1),
        activation=mlp.activation,
        fc2=_layer(mlp.fc2),
        gamma2=_gamma(block.ls2),
    )


def _attention_pool(model: ViT, pool: AttentionPool, tokens: Tensor) -> Tensor:
    """tokens [B, T, D] -> [B, D]: the probe attends to the patches."""
    plan = PoolPlan(
        latent=(pool, "latent"),
        q=_layer(pool.q),
        kv=_layer(pool.kv),
        heads=pool.num_heads,
        head_dim=pool.head_dim,
        scale=pool.scale,
        proj=_layer(pool.proj),
        norm2=Norm(pool.norm),
        fc1=_layer(pool.mlp.fc1),
        activation=pool.mlp.activation,
        fc2=_layer(pool.mlp.fc2),
    )
    return run_pool(plan, tokens, model.derived, "attn_pool", model.config.num_prefix_tokens)


def _layer(linear: nn.Linear) -> Stack:
    return Stack(((linear, "weight"),), ((linear, "bias"),))


def _prefix(model: ViT) -> Tensor | None:
    """Class token and registers [R, D] in one table, put together once per change of either."""
    tokens: list[Tensor | None] = [t for t in (model.cls_token, model.reg_token) if t is not None]
    if len(tokens) < 2 or torch.compiler.is_compiling() or changed_methods(model, head=False) is not None:
        return model.prefix_tokens()
    return model.derived.get("prefix", tokens, lambda: (torch.cat([t[0] for t in tokens if t is not None]),))[0]


def _classify_token(model: ViT, token: Tensor) -> Tensor:
    """class tokens z_L^0 [B, D] -> the head's result on them, normalised."""
    for norm in (model.norm, model.fc_norm):
        if isinstance(norm, nn.LayerNorm):
            token = _norm(token, norm)
    return _classify(model, token)


def _gamma(scale: nn.Module) -> Source | None:
    return (scale, "gamma") if isinstance(scale, LayerScale) else None


def _normed(model: ViT, z: Tensor) -> Tensor:
    """tokens z_L [B, T, D], normalised if the norm is in front of the pooling."""
    return _norm(z.flatten(0, 1), model.norm).view(z.shape) if isinstance(model.norm, nn.LayerNorm) else z


def _norm(rows: Tensor, norm: nn.LayerNorm) -> Tensor:
    return ops.layer_norm(rows, norm.weight, norm.bias, eps=norm.eps)


def _classify(model: ViT, x: Tensor, pre_logits: bool = False) -> Tensor:
    """The head on pooled and normalised rows x [B, D]. Its dropout does nothing here: the kernels run in eval mode."""
    if isinstance(model.pre_logits, nn.Sequential):
        hidden = model.pre_logits.fc
        assert isinstance(hidden, nn.Linear)
        x = torch.tanh(_linear(x, hidden))
    if pre_logits or not isinstance(model.head, nn.Linear):
        return x
    return _linear(x, model.head)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    y = ops.linear(x, layer.weight, layer.bias)
    assert isinstance(y, Tensor)
    return y
