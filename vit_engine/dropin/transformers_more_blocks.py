"""Encoder layers of transformers' vision models that are not built like its ViT or CLIP, as plans for the kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..encoder_block import AttentionInputs, BlockPlan
from .describe import Block, Unsupported, activation, check_head_dim, dropout, expect, linear, required_norm
from .transformers_blocks import refusal, unless_another_attention

__all__ = ["MORE_TRANSFORMERS_BLOCKS"]


def _arguments(hidden_states: Tensor, *rest: Any, **more: Any) -> Any:
    """Of layers that take no mask."""
    return refusal(None, rest, more) or (hidden_states, AttentionInputs())


def _videomae(block: Any) -> Block:
    """VideoMAELayer: the parts of the first ViT of transformers, without a bias of the keys."""
    prefix = f"{type(block).__module__}.VideoMAE"
    for name in ("Attention", "Intermediate", "Output"):
        expect(block, name.lower(), f"{prefix}{name}")
    expect(block, "attention.output", f"{prefix}SelfOutput")
    attention = expect(block, "attention.attention", f"{prefix}SelfAttention")
    if attention.is_causal:
        raise Unsupported("attention.attention.is_causal is set", changed=True)
    qkv = linear(attention, "query", "key", "value")
    heads, width = attention.num_attention_heads, attention.attention_head_size
    rows = [layer.weight.shape[0] for layer in (attention.query, attention.key, attention.value)]
    if set(rows) != {heads * width}:
        raise Unsupported(f"attention projects to {rows} features, for {heads} heads {width} wide", changed=True)
    plan = BlockPlan(
        norm1=required_norm(block, "layernorm_before"),
        qkv=qkv,
        heads=heads,
        heads_k=heads,
        head_dim=check_head_dim(width),
        scale=attention.scaling,
        proj=linear(block, "attention.output.dense"),
        norm2=required_norm(block, "layernorm_after"),
        fc1=linear(block, "intermediate.dense"),
        activation=activation(block.intermediate.intermediate_act_fn, "intermediate's activation"),
        fc2=linear(block, "output.dense"),
    )
    random = dropout(block, "attention.output.dropout", "output.dropout")
    random += (attention,) if attention.dropout_prob else ()
    return Block(plan, unless_another_attention(attention, _arguments), random)


def _blip(block: Any) -> Block:
    """BlipEncoderLayer: one packed projection, and attention in operators of its own, whatever the settings say."""
    prefix = f"{type(block).__module__}.Blip"
    attention, mlp = expect(block, "self_attn", f"{prefix}Attention"), expect(block, "mlp", f"{prefix}MLP")
    plan = BlockPlan(
        norm1=required_norm(block, "layer_norm1"),
        qkv=linear(attention, "qkv"),
        heads=attention.num_heads,
        heads_k=attention.num_heads,
        head_dim=check_head_dim(attention.embed_dim // attention.num_heads),
        scale=attention.scale,
        proj=linear(attention, "projection"),
        norm2=required_norm(block, "layer_norm2"),
        fc1=linear(mlp, "fc1"),
        activation=activation(mlp.activation_fn, "mlp's activation"),
        fc2=linear(mlp, "fc2"),
    )
    return Block(plan, _arguments, dropout(block, "self_attn.dropout"))


MORE_TRANSFORMERS_BLOCKS = {
    "transformers.models.videomae.modeling_videomae.VideoMAELayer": _videomae,
    "transformers.models.blip.modeling_blip.BlipEncoderLayer": _blip,
}
