"""torchvision's encoder block (vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14) as a plan for the kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..encoder_block import AttentionInputs, BlockPlan, Stack
from .describe import (
    Block,
    Unsupported,
    activation,
    check_head_dim,
    dropout,
    expect,
    linear,
    required_norm,
    source,
    unknown_arguments,
)

__all__ = ["TORCHVISION_BLOCKS"]


def _arguments(input: Tensor, *rest: Any, **more: Any) -> Any:
    return unknown_arguments(rest, more) or (input, AttentionInputs())


def _encoder_block(block: Any) -> Block:
    attention = expect(block, "self_attention", "torch.nn.modules.activation.MultiheadAttention")
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise Unsupported("self_attention must have one packed projection, and no bias_k or add_zero_attn")
    mlp = expect(block, "mlp", "torchvision.models.vision_transformer.MLPBlock")
    if list(mlp._modules) != ["0", "1", "2", "3", "4"]:
        # It runs whatever is in it, one after the other.
        raise Unsupported(f"mlp has the parts {', '.join(mlp._modules)}, expected torchvision's five", changed=True)
    plan = BlockPlan(
        norm1=required_norm(block, "ln_1"),
        qkv=Stack(((attention, "in_proj_weight"),), (source(attention, "in_proj_bias"),)),
        heads=attention.num_heads,
        heads_k=attention.num_heads,
        head_dim=check_head_dim(attention.head_dim),
        scale=attention.head_dim**-0.5,
        proj=linear(attention, "out_proj"),
        norm2=required_norm(block, "ln_2"),
        fc1=linear(mlp, "0"),
        activation=activation(mlp[1], "mlp.1"),
        fc2=linear(mlp, "3"),
    )
    random = dropout(block, "dropout", "mlp.2", "mlp.4") + ((attention,) if attention.dropout else ())
    return Block(plan, _arguments, random)


TORCHVISION_BLOCKS = {"torchvision.models.vision_transformer.EncoderBlock": _encoder_block}
