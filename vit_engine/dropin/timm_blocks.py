"""timm's encoder blocks as plans for the kernels: vision_transformer, EVA and BEiT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..encoder_block import AttentionInputs, BlockPlan, Norm, Stack
from .describe import (
    Block,
    Made,
    Unsupported,
    activation,
    check_head_dim,
    class_name,
    dropout,
    dtype_name,
    expect,
    gamma,
    linear,
    norm,
    required_norm,
    source,
    unknown_arguments,
)

__all__ = ["REFUSED", "TIMM_BLOCKS", "attention_scale"]

_EVA_ATTENTION = "timm.models.eva.EvaAttention"
_LAYER_SCALE = "timm.layers.layer_scale.LayerScale"
_MLP, _GLU, _SWIGLU = "timm.layers.mlp.Mlp", "timm.layers.mlp.GluMlp", "timm.layers.mlp.SwiGLU"


def _mlp(block: nn.Module) -> dict[str, Any]:
    """The fields of a BlockPlan that the MLP decides."""
    mlp = expect(block, "mlp", _MLP, _GLU, _SWIGLU)
    kind = activation(mlp.act, "mlp.act")
    if class_name(mlp) == _MLP:
        return {"fc1": linear(block, "mlp.fc1"), "activation": kind, "mlp_norm": norm(mlp, "norm"), **_fc2(block)}
    if kind != "silu":
        raise Unsupported(f"mlp is gated by {kind}, expected SiLU (SwiGLU)")
    if class_name(mlp) == _SWIGLU:
        fc1 = linear(block, "mlp.fc1_g", "mlp.fc1_x")
    elif mlp.gate_last:
        raise Unsupported("mlp has its gate in the last rows of fc1, expected the first")
    else:
        fc1 = linear(block, "mlp.fc1")
    return {"fc1": fc1, "activation": "swiglu", "mlp_norm": norm(mlp, "norm"), **_fc2(block)}


def _fc2(block: nn.Module) -> dict[str, Stack]:
    return {"fc2": linear(block, "mlp.fc2")}


def _attention_norms(attn: nn.Module, head_norms: bool = True) -> dict[str, Norm | None]:
    if getattr(attn, "gate", None) is not None:
        raise Unsupported("attn.gate: gated attention has no kernel")
    found = {"attention_norm": norm(attn, "norm")}
    if head_norms:
        found |= {"q_norm": norm(attn, "q_norm"), "k_norm": norm(attn, "k_norm")}
        if (found["q_norm"] is None) != (found["k_norm"] is None):
            raise Unsupported("attn normalises only one of queries and keys")
        q_norm, k_norm = found["q_norm"], found["k_norm"]
        if q_norm and k_norm and (q_norm.kind, q_norm.eps) != (k_norm.kind, k_norm.eps):
            raise Unsupported("attn normalises queries and keys in different ways", changed=True)
    return found


def attention_scale(attn: nn.Module, head_dim: int) -> float:
    """What timm's attention multiplies the logits by: PyTorch's fused one takes no notice of `attn.scale`."""
    return head_dim**-0.5 if attn.fused_attn else attn.scale  # type: ignore[return-value]


def _random(block: Any) -> tuple[nn.Module, ...]:
    """What acts at random in training mode."""
    drops = dropout(block, "attn.attn_drop", "attn.proj_drop", "drop_path1", "drop_path2", "mlp.drop1", "mlp.drop2")
    # PyTorch's fused attention takes the rate of attn_drop, but asks the attention whether it is being trained.
    return (*drops, block.attn) if block.attn.attn_drop in drops else drops


def _mask_refusal(attn: Any, x: Tensor, mask: Tensor | None, causal: bool) -> str | None:
    """Why a mask needs the original code, if it does: it decides what to raise at, depending on fused_attn."""
    if mask is None:
        return None
    # timm's masks add up with nothing: of the two its code takes one or the other.
    if causal:
        return "attn_mask and is_causal together"
    usual = mask.dtype in (torch.bool, x.dtype) or (mask.dtype == torch.float32 and attn.fused_attn)
    if mask.ndim not in (2, 3, 4) or not usual:
        return f"attn_mask has the shape {list(mask.shape)} and dtype {dtype_name(mask.dtype)}"
    return None


def _vit_arguments(attn: Any) -> Any:
    def arguments(
        x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *rest: Any, **more: Any
    ) -> Any:
        refusal = unknown_arguments(rest, more) or _mask_refusal(attn, x, attn_mask, is_causal)
        return refusal or (x, AttentionInputs(mask=attn_mask, causal=bool(is_causal)))

    return arguments


def vit_block(block: Any) -> Block:
    """timm.models.vision_transformer.Block"""
    attn = expect(block, "attn", "timm.layers.attention.Attention")
    plan = BlockPlan(
        norm1=required_norm(block, "norm1"),
        qkv=linear(block, "attn.qkv"),
        heads=attn.num_heads,
        heads_k=attn.num_heads,
        head_dim=check_head_dim(attn.head_dim),
        scale=attention_scale(attn, attn.head_dim),
        proj=linear(block, "attn.proj"),
        gamma1=gamma(block, "ls1", _LAYER_SCALE),
        norm2=required_norm(block, "norm2"),
        gamma2=gamma(block, "ls2", _LAYER_SCALE),
        **_attention_norms(attn),
        **_mlp(block),
    )
    random = _random(block)
    return Block(plan, _vit_arguments(attn), random)


def _packed_or_apart(block: Any) -> Stack:
    """EVA's and BEiT's projections: packed with biases apart (none or zero for the keys), or three layers."""
    attn = block.attn
    if getattr(attn, "qkv", None) is None:
        return linear(block, "attn.q_proj", "attn.k_proj", "attn.v_proj")
    packed = linear(block, "attn.qkv")
    if getattr(attn, "q_bias", None) is None:
        return packed
    return Stack(packed.weights, tuple(source(attn, f"{part}_bias") for part in "qkv"))


def _eva_arguments(attn: Any) -> Any:
    def arguments(
        x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False, *rest: Any,
        **more: Any,
    ) -> Any:  # fmt: skip
        refusal = unknown_arguments(rest, more) or _mask_refusal(attn, x, attn_mask, is_causal)
        if rope is None:
            return refusal or (x, AttentionInputs(mask=attn_mask, causal=bool(is_causal)))
        # The kernel turns as many of the last tokens as there are rows; timm those behind a prefix of known length.
        if x.shape[1] - rope.shape[-2] != attn.num_prefix_tokens:
            sizes = f"{rope.shape[-2]} of {x.shape[1]} tokens, with num_prefix_tokens={attn.num_prefix_tokens}"
            return f"rope is for {sizes}"
        # timm keeps sine and cosine side by side: [..., N, 2 head_dim].
        sin, cos = rope.chunk(2, dim=-1)
        return refusal or (x, AttentionInputs(mask=attn_mask, causal=bool(is_causal), cos=cos, sin=sin))

    return arguments


def eva_block(block: Any) -> Block:
    """timm.models.eva.EvaBlock: rotary embeddings, SwiGLU, norms inside the branches, no key bias."""
    attn = expect(block, "attn", _EVA_ATTENTION, "timm.layers.attention.AttentionRope")
    proj = linear(block, "attn.proj")
    # EVA's own attention shares out what there is among the heads.
    head_dim = attn.proj.in_features // attn.num_heads if class_name(attn) == _EVA_ATTENTION else attn.head_dim
    plan = BlockPlan(
        norm1=required_norm(block, "norm1"),
        qkv=_packed_or_apart(block),
        heads=attn.num_heads,
        heads_k=getattr(attn, "num_kv_heads", attn.num_heads),
        head_dim=check_head_dim(head_dim),
        scale=attention_scale(attn, head_dim),
        interleaved=not attn.rotate_half,
        proj=proj,
        gamma1=source(block, "gamma_1"),
        norm2=required_norm(block, "norm2"),
        gamma2=source(block, "gamma_2"),
        **_attention_norms(attn),
        **_mlp(block),
    )
    random = _random(block)
    return Block(plan, _eva_arguments(attn), random, rotary=True)


def beit_block(block: Any) -> Block:
    """timm.models.beit.Block: a bias per head and relative position, added to the attention's logits."""
    attn = expect(block, "attn", "timm.models.beit.Attention")
    if block.gamma_1 is not None and block.gamma_2 is None:
        raise Unsupported("gamma_2 is None beside a gamma_1", changed=True)
    proj = linear(block, "attn.proj")
    head_dim = attn.proj.in_features // attn.num_heads
    plan = BlockPlan(
        norm1=required_norm(block, "norm1"),
        qkv=_packed_or_apart(block),
        heads=attn.num_heads,
        heads_k=attn.num_heads,
        head_dim=check_head_dim(head_dim),
        scale=attention_scale(attn, head_dim),
        proj=proj,
        gamma1=source(block, "gamma_1"),
        norm2=required_norm(block, "norm2"),
        gamma2=None if block.gamma_1 is None else source(block, "gamma_2"),  # it asks for the first one alone
        **_mlp(block),
    )

    def arguments(x: Tensor, shared_rel_pos_bias: Tensor | None = None, *rest: Any, **more: Any) -> Any:
        if rest or more:
            return unknown_arguments(rest, more)
        table = attn.relative_position_bias_table
        if table is None:
            return x, AttentionInputs(mask=shared_rel_pos_bias)
        if shared_rel_pos_bias is None:
            return x, Made("relative position bias", [table, attn.relative_position_index], attn._get_rel_pos_bias)
        return x, AttentionInputs(mask=attn._get_rel_pos_bias() + shared_rel_pos_bias)

    random = _random(block)
    return Block(plan, arguments, random)


TIMM_BLOCKS = {
    "timm.models.vision_transformer.Block": vit_block,
    "timm.models.eva.EvaBlock": eva_block,
    "timm.models.beit.Block": beit_block,
}

REFUSED = {
    "timm.models.vision_transformer.ResPostBlock": "norms behind the branches instead of in front of them",
    "timm.models.vision_transformer.ParallelScalingBlock": "attention and MLP side by side on one projection",
    "timm.models.vision_transformer.DiffParallelScalingBlock": "differential attention beside the MLP",
    "timm.models.vision_transformer.ParallelThingsBlock": "several attentions and MLPs in parallel",
    "timm.models.eva.EvaBlockPostNorm": "norms behind the branches instead of in front of them",
    "timm.models.swin_transformer.SwinTransformerBlock": "attention in shifted windows",
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": "attention in shifted windows",
    "torchvision.models.swin_transformer.SwinTransformerBlock": "attention in shifted windows",
    "torchvision.models.swin_transformer.SwinTransformerBlockV2": "attention in shifted windows",
    "transformers.models.swin.modeling_swin.SwinLayer": "attention in shifted windows",
}
