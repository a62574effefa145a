"""Encoder layers of transformers' vision models (version 5 and its layout) as plans for the kernels."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..class_code import constant_in_graphs
from ..encoder_block import AttentionInputs, BlockPlan, Source
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
    required_norm,
    source,
    unknown_arguments,
)

__all__ = [
    "TRANSFORMERS_BLOCKS",
    "attention_in_use",
    "collecting_outputs",
    "other_outputs_wanted",
    "outputs_are_collected",
    "refusal",
    "unless_another_attention",
]


@dataclass(frozen=True)
class _Names:
    """How a family names the parts of its layer. prefix: of its class names."""

    prefix: str
    attention: str
    out: str
    norm1: str
    norm2: str
    random: tuple[str, ...] = ()


def _clip(prefix: str) -> _Names:
    return _Names(prefix, "self_attn", "out_proj", "layer_norm1", "layer_norm2")


def _vit(prefix: str, *more_random: str) -> _Names:
    return _Names(prefix, "attention", "o_proj", "layernorm_before", "layernorm_after", ("dropout", *more_random))


def _collector() -> Any:
    capturing = sys.modules.get("transformers.utils.output_capturing")
    return None if capturing is None else capturing._active_collector.get()


def collecting_outputs() -> bool:
    """Whether a model of transformers is collecting what its parts return right now, through hooks on them."""
    return _collector() is not None


def outputs_are_collected() -> bool:
    """Whether that model was asked for any output of its parts, hidden states among them."""
    return bool(_collector())


def other_outputs_wanted() -> str | None:
    """Which outputs beside the hidden states the model is collecting through hooks right now, such as "attentions".

    Hidden states are what a block returns; anything else comes out of parts that the kernels do not call.
    """
    collector = _collector()
    if collector is None:
        return None
    wanted = [key for key in collector if key != "hidden_states" and not key.startswith("_")]
    return f"output_{wanted[0]}: they are not computed by the kernels" if wanted else None


# Where the functions are that compute softmax(scale q k^T + mask) v, however they do it, beside a model's own "eager".
_ATTENTIONS = (
    "transformers.integrations.sdpa_attention",
    "transformers.integrations.flash_attention",
    "transformers.integrations.flex_attention",
    "vit_engine.dropin.transformers_attention",
)
# What the kernel adds to logits; other masks mean what the attention function at hand makes of them.
_ADDED = (torch.float32, torch.float16, torch.bfloat16)
# What models pass on to layers without meaning them: hidden states are collected by hooks on the layers themselves, and
# Trainer's num_items_in_batch scales the loss.
_HARMLESS = ("output_hidden_states", "return_dict", "num_items_in_batch")


@constant_in_graphs
def _own_attention(home: str, chosen: str | None) -> bool:
    """Whether the attention that layers of this module look up under this name is a function of somebody's own.

    Asked of the function, as somebody may have put theirs under a name of transformers'.
    """
    function = _attention_function(home, chosen)
    # Of its code: functools.wraps() copies the name of a module.
    return getattr(function, "__globals__", {}).get("__name__") not in (home, *_ATTENTIONS)


def _attention_function(home: str, chosen: str | None) -> object:
    contents = vars(sys.modules[home])
    usual = contents.get("eager_attention_forward") if chosen in (None, "eager") else None
    return contents.get("ALL_ATTENTION_FUNCTIONS", {}).get(chosen, usual)


def attention_in_use(model: Any) -> object:
    """The function that the layers of a model compute their attention with, as things stand now."""
    home = type(model).__module__
    return _attention_function(home, model.config._attn_implementation) if hasattr(model, "config") else None


def refusal(mask: Tensor | None, rest: tuple[Any, ...], more: dict[str, Any]) -> str | None:
    """Why arguments of a layer need the original code, if they do. rest, more: those that are not known by name."""
    if rest:
        return unknown_arguments(rest, {})
    for name, value in more.items():
        if value is not None and value is not False and name not in _HARMLESS:
            return f"argument {name}={value!r:.40}"
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
        return "an attention mask that is no tensor of 4 dimensions"
    return other_outputs_wanted()


def _mask_refusal(inputs: AttentionInputs | Made, chosen: str | None) -> str | None:
    """Why a mask needs the original code, if it does: "eager" adds whatever it is given, true and false as 1 and 0."""
    mask = inputs.mask if isinstance(inputs, AttentionInputs) else None
    if mask is None or mask.dtype in _ADDED or (mask.dtype == torch.bool and chosen not in (None, "eager")):
        return None
    return f"attn_implementation is {chosen!r}, with an attention mask in {dtype_name(mask.dtype)}"


def unless_another_attention(attention: Any, arguments: Any) -> Any:
    """arguments() of a layer, but for layers whose attention looks up a function of somebody's own."""
    home = type(attention).__module__

    def asked(*args: Any, **kwargs: Any) -> Any:
        # In the configuration, which may change at any time and be shared by all layers.
        chosen = attention.config._attn_implementation
        if _own_attention(home, chosen):
            return f"attn_implementation is {chosen!r}, a function of somebody's own"
        given = arguments(*args, **kwargs)
        return given if isinstance(given, str) else _mask_refusal(given[1], chosen) or given

    return asked


def _arguments(hidden_states: Tensor, attention_mask: Tensor | None = None, *rest: Any, **more: Any) -> Any:
    return refusal(attention_mask, rest, more) or (hidden_states, AttentionInputs(mask=attention_mask))


def _rotary_arguments(
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    *rest: Any,
    **more: Any,
) -> Any:
    if position_embeddings is None:
        return "no position_embeddings"
    cos, sin = position_embeddings
    given = hidden_states, AttentionInputs(mask=attention_mask, cos=cos, sin=sin)
    return refusal(attention_mask, rest, more) or given


def _mlp(block: nn.Module, names: _Names) -> dict[str, Any]:
    home = type(block).__module__
    mlp = expect(block, "mlp", *(f"{home}.{names.prefix}{kind}" for kind in ("MLP", "SwiGLUFFN", "GatedMLP")))
    kind = activation(mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn, "mlp's activation")
    if hasattr(mlp, "fc1"):
        return {"fc1": linear(mlp, "fc1"), "activation": kind, "fc2": linear(mlp, "fc2")}
    fc2 = linear(mlp, "down_proj")
    if not hasattr(mlp, "gate_proj"):
        return {"fc1": linear(mlp, "up_proj"), "activation": kind, "fc2": fc2}
    if kind != "silu":
        raise Unsupported(f"mlp is gated by {kind}, expected SiLU (SwiGLU)")
    return {"fc1": linear(mlp, "gate_proj", "up_proj"), "activation": "swiglu", "fc2": fc2}


def _attention(block: nn.Module, names: _Names) -> tuple[dict[str, Any], tuple[nn.Module, ...]]:
    attention = expect(block, names.attention, f"{type(block).__module__}.{names.prefix}Attention")
    if attention.is_causal:
        raise Unsupported(f"{names.attention}.is_causal is set", changed=True)
    qkv = linear(attention, "q_proj", "k_proj", "v_proj")
    # As many as the projections have room for, as in forward(): pruning leaves the number in the settings as it was.
    rows = {getattr(attention, name).weight.shape[0] for name in ("q_proj", "k_proj", "v_proj")}
    heads, rest = divmod(max(rows), attention.head_dim)
    if len(rows) != 1 or rest:
        raise Unsupported(f"{names.attention} projects to widths {sorted(rows)}, head_dim {attention.head_dim}", True)
    rate = attention.attention_dropout if hasattr(attention, "attention_dropout") else attention.dropout
    fields = {
        "qkv": qkv,
        "heads": heads,
        "heads_k": heads,
        "head_dim": check_head_dim(attention.head_dim),
        "scale": attention.scaling if hasattr(attention, "scaling") else attention.scale,
        "proj": linear(attention, names.out),
    }
    return fields, (attention,) if rate else ()


def _block(
    block: nn.Module, names: _Names, arguments: Any = _arguments, gamma1: Source | None = None,
    gamma2: Source | None = None,
) -> Block:  # fmt: skip
    attention, random = _attention(block, names)
    plan = BlockPlan(
        norm1=required_norm(block, names.norm1),
        norm2=required_norm(block, names.norm2),
        **attention,
        **_mlp(block, names),
        gamma1=gamma1,
        gamma2=gamma2,
    )
    random += dropout(block, *names.random)
    asked = unless_another_attention(getattr(block, names.attention), arguments)
    return Block(plan, asked, random, rotary=arguments is _rotary_arguments)


def _plain(names: _Names) -> Any:
    def describe(block: nn.Module) -> Block:
        return _block(block, names)

    return describe


def _dino(prefix: str, arguments: Any = _arguments) -> Any:
    names = _Names(prefix, "attention", "o_proj", "norm1", "norm2", ("drop_path",))

    def describe(block: nn.Module) -> Block:
        scale = f"{type(block).__module__}.{prefix}LayerScale"
        gammas = [gamma(block, f"layer_scale{i}", scale, tensor="lambda1") for i in (1, 2)]
        return _block(block, names, arguments, *gammas)

    return describe


def _beit(block: Any) -> Block:
    """BeitLayer: a bias per head and relative position, added to the attention's logits."""

    def arguments(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        *rest: Any,
        **more: Any,
    ) -> Any:
        mask = attention_mask
        if block.relative_position_bias is not None:
            if resolution is None or (mask is not None and not mask.is_floating_point()):
                return "relative position bias without a resolution, or with a mask that is not additive"
            window = (resolution[0] // block.patch_size, resolution[1] // block.patch_size)
            relative, interpolate = block.relative_position_bias, bool(interpolate_pos_encoding)
            tokens = hidden_states.shape[1]

            def bias() -> Tensor:
                return relative(window, interpolate, dim_size=tokens)

            if mask is None:
                size = window, interpolate, tokens
                made = Made("relative position bias", [relative.relative_position_bias_table], bias, size)
                return refusal(None, rest, more) or (hidden_states, made)
            mask = bias() + mask
        return refusal(mask, rest, more) or (hidden_states, AttentionInputs(mask=mask))

    if block.relative_position_bias is not None:
        # Another class may have parameters whose changes nobody here would see.
        found, wanted = class_name(block.relative_position_bias), f"{type(block).__module__}.BeitRelativePositionBias"
        if found != wanted:
            raise Unsupported(f"relative_position_bias is {found}, expected {wanted}", changed=True)
    names = _vit("Beit", "drop_path")
    gammas: list[Source | None] = []
    for i in (1, 2):
        factor = getattr(block, f"lambda_{i}")
        if not isinstance(factor, Tensor) and factor != 1.0:
            raise Unsupported(f"lambda_{i} is {factor!r}, expected a parameter or 1.0")
        gammas.append(source(block, f"lambda_{i}") if isinstance(factor, Tensor) else None)
    return _block(block, names, arguments, *gammas)


def _models(name: str, layer: str) -> str:
    return f"transformers.models.{name}.modeling_{name}.{layer}"


TRANSFORMERS_BLOCKS = {
    _models("vit", "ViTLayer"): _plain(_vit("ViT")),
    _models("deit", "DeiTLayer"): _plain(_vit("DeiT")),
    _models("vit_mae", "ViTMAELayer"): _plain(_vit("ViTMAE")),
    _models("beit", "BeitLayer"): _beit,
    _models("dinov2", "Dinov2Layer"): _dino("Dinov2"),
    _models("dinov2_with_registers", "Dinov2WithRegistersLayer"): _dino("Dinov2WithRegisters"),
    _models("dinov3_vit", "DINOv3ViTLayer"): _dino("DINOv3ViT", _rotary_arguments),
    _models("clip", "CLIPEncoderLayer"): _plain(_clip("CLIP")),
    _models("vit_msn", "ViTMSNLayer"): _plain(_vit("ViTMSN")),
    _models("ijepa", "IJepaLayer"): _plain(_vit("IJepa")),
    _models("metaclip_2", "MetaClip2EncoderLayer"): _plain(_clip("MetaClip2")),
    _models("owlvit", "OwlViTEncoderLayer"): _plain(_clip("OwlViT")),
    _models("owlv2", "Owlv2EncoderLayer"): _plain(_clip("Owlv2")),
    _models("siglip", "SiglipEncoderLayer"): _plain(_clip("Siglip")),
    _models("siglip2", "Siglip2EncoderLayer"): _plain(_clip("Siglip2")),
}
