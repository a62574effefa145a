"""transformers' ViT, DeiT and DINOv2 (with registers too), in the names of its version 5 and in those of version 4."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .slots import BLOCK, Slot, check, gather, refuse, scatter, with_leaves

__all__ = ["FAMILIES", "LAYOUTS", "timm_to_transformers", "transformers_to_timm"]

FAMILIES = ("vit", "deit", "dinov2")
LAYOUTS = ("v5", "v4")

# A model with a head keeps the rest under one of these.
_PREFIX = re.compile(r"(?:vit|deit|dinov2|dinov2_with_registers)\.")
_THEIR_BLOCK = re.compile(r"(?:layers|encoder\.layer)\.(\d+)\.(.+)")
_MASK = "embeddings.mask_token"

_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    **with_leaves({"embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm"}),
}
_POOLER = with_leaves({"pooler.dense": "pre_logits.fc"})
_HEAD = with_leaves({"classifier": "head"})
_DISTILLED_HEADS = with_leaves({"cls_classifier": "head", "distillation_classifier": "head_dist"})
_ANY_HEAD = {**_HEAD, **_DISTILLED_HEADS}

_QKV_V5 = {f"attention.{part}_proj": Slot("attn.qkv", i, 3) for i, part in enumerate("qkv")}
_QKV_V4 = {f"attention.attention.{part}": Slot("attn.qkv", i, 3) for i, part in enumerate(("query", "key", "value"))}
_PROJ = {"v5": {"attention.o_proj": Slot("attn.proj")}, "v4": {"attention.output.dense": Slot("attn.proj")}}
_NORMS_VIT = {"layernorm_before": Slot("norm1"), "layernorm_after": Slot("norm2")}
_NORMS_DINOV2 = {"norm1": Slot("norm1"), "norm2": Slot("norm2")}
_MLP = {"mlp.fc1": Slot("mlp.fc1"), "mlp.fc2": Slot("mlp.fc2")}
_MLP_VIT_V4 = {"intermediate.dense": Slot("mlp.fc1"), "output.dense": Slot("mlp.fc2")}
_SWIGLU_V5 = {
    "mlp.gate_proj": Slot("mlp.fc1", 0, 2),
    "mlp.up_proj": Slot("mlp.fc1", 1, 2),
    "mlp.down_proj": Slot("mlp.fc2"),
}
_SWIGLU_V4 = {"mlp.weights_in": Slot("mlp.fc1"), "mlp.weights_out": Slot("mlp.fc2")}
_SCALES = {f"layer_scale{i}.lambda1": Slot(f"ls{i}.gamma") for i in (1, 2)}

_ANY_LAYER = {
    **with_leaves(
        {
            **_QKV_V5, **_QKV_V4, **_PROJ["v5"], **_PROJ["v4"], **_NORMS_VIT, **_NORMS_DINOV2,
            **_MLP, **_MLP_VIT_V4, **_SWIGLU_V5, **_SWIGLU_V4,
        }
    ),
    **_SCALES,
}  # fmt: skip


def _to_timm(name: str) -> Slot | None:
    if name in _ANY_HEAD:
        return Slot(_ANY_HEAD[name])
    name = name[prefix.end() :] if (prefix := _PREFIX.match(name)) else name
    block = _THEIR_BLOCK.fullmatch(name)
    if block is None:
        ours = _TOP.get(name) or _POOLER.get(name)
        return Slot(ours) if ours else None
    slot = _ANY_LAYER.get(block[2])
    return slot and slot._replace(name=f"blocks.{block[1]}.{slot.name}")


def transformers_to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a ViT, DeiT or DINOv2 model of transformers under the names and in the shapes of timm's.

    All names below may have "vit.", "deit.", "dinov2." or "dinov2_with_registers." in front. With D the width, M the
    MLP's, N patches, R registers, C classes; names of version 4 in parentheses:

        embeddings.cls_token [1, 1, D]                                     cls_token
        embeddings.distillation_token [1, 1, D]                            dist_token
        embeddings.register_tokens [1, R, D]                               reg_token
        embeddings.position_embeddings [1, 1 + N or 2 + N, D]              pos_embed
        embeddings.patch_embeddings.projection [D, 3, P, P], [D]           patch_embed.proj
        layers.L (encoder.layer.L; DINOv2 has that in version 5, too)      blocks.L
            layernorm_before, layernorm_after (DINOv2: norm1, norm2) [D]       norm1, norm2
            attention.q_proj, k_proj, v_proj                                   attn.qkv [3 D, D], [3 D]
                (attention.attention.query, key, value), each [D, D], [D]
            attention.o_proj (attention.output.dense) [D, D], [D]              attn.proj
            layer_scale1.lambda1, layer_scale2.lambda1 [D]                     ls1.gamma, ls2.gamma
            mlp.fc1, mlp.fc2 (intermediate.dense, output.dense)                mlp.fc1 [M, D], mlp.fc2 [D, M]
            mlp.gate_proj, up_proj [M, D] each (together mlp.weights_in),      mlp.fc1 [2 M, D], gate first,
                mlp.down_proj (mlp.weights_out) [D, M]                             mlp.fc2 (timm's SwiGLUPacked)
        layernorm [D]                                                      norm
        pooler.dense [D, D], [D], with tanh                                pre_logits.fc (ViTConfig(head="pretrain"))
        classifier, or cls_classifier and distillation_classifier [C, D]   head, head_dist

    With register tokens, timm's models have no position embedding for the class token (no_embed_class): its row is
    added to cls_token, which changes nothing in what is computed, and pos_embed keeps the N others.

    embeddings.mask_token is left out: it stands for patches that are hidden in training. eps is no tensor and differs:
    1e-12 in transformers' ViT and DeiT, 1e-6 in its DINOv2 and in timm.

    Raises ValueError naming every tensor without a place (the classifier of DINOv2 is one: it reads the class token and
    the mean of the patches side by side), or with its q, k or v missing; TypeError if something is no tensor.
    """
    check("transformers_to_timm", state_dict)
    kept = {name: tensor for name, tensor in state_dict.items() if _PREFIX.sub("", name, count=1) != _MASK}
    tensors, left = gather(kept, _to_timm)
    if any(name.endswith(".ls1.gamma") for name in tensors):
        wide = [name for name in kept if name in _HEAD]
        left |= dict.fromkeys(wide, "it reads class token and mean side by side, as no head of timm's does")
    if "reg_token" in tensors:
        cls, position = tensors.get("cls_token"), tensors.get("pos_embed")
        if cls is None or position is None or position.dim() != 3 or position.shape[1] < 2:
            name = next(name for name in kept if name.endswith("embeddings.register_tokens"))
            left[name] = "beside it there must be a class token and position embeddings [1, 1 + N, D]"
        else:
            tensors["cls_token"] = cls + position[:, :1]
            tensors["pos_embed"] = position[:, 1:].clone()
    refuse("transformers_to_timm", "timm's layout", left)
    return tensors


def _layer_names(family: str, layout: str, gated: bool) -> dict[str, list[str]]:
    """For each tensor of timm's block its name or names there."""
    qkv = _QKV_V5 if layout == "v5" else _QKV_V4
    norms = _NORMS_DINOV2 if family == "dinov2" else _NORMS_VIT
    if gated and family == "dinov2":
        mlp = _SWIGLU_V5 if layout == "v5" else _SWIGLU_V4
    else:
        mlp = _MLP_VIT_V4 if layout == "v4" and family != "dinov2" else _MLP
    table = with_leaves({**qkv, **_PROJ[layout], **norms, **mlp})
    if family == "dinov2":
        table |= _SCALES
    names: dict[str, list[str]] = {}
    for theirs, slot in table.items():
        names.setdefault(slot.name, []).append(theirs)
    return names


def timm_to_transformers(
    state_dict: Mapping[str, Tensor], family: str = "vit", layout: str = "v5", prefix: str | None = None
) -> dict[str, Tensor]:
    """The inverse of transformers_to_timm, which has the table.

    family: "vit", "deit" (with or without a distillation token), or "dinov2" (with or without registers).
    layout: "v5", what the models of transformers 5.24 have, or "v4", what earlier models and all its files have
        (save_pretrained still writes that). Either loads with from_pretrained.
    prefix: what to put in front of everything but the classifiers, such as "dinov2."; None is "vit." or "deit." if
        there is a head (transformers' ...ForImageClassification) and nothing otherwise (...Model).

    For DINOv2, embeddings.mask_token is made of zeros, as transformers does for a new model. With register tokens the
    position embedding of the class token is zero: timm's cls_token has it added already. pos_embed must then be that of
    a square grid of patches alone (no_embed_class).

    Raises ValueError naming every tensor without a place in that family, or the argument; TypeError if something is no
    tensor.
    """
    check("timm_to_transformers", state_dict)
    for name, value, allowed in (("family", family, FAMILIES), ("layout", layout, LAYOUTS)):
        if value not in allowed:
            options = ", ".join(map(repr, allowed))
            raise ValueError(f"timm_to_transformers: {name} must be one of {options}, got {value!r}")
    if not isinstance(prefix, str | None):
        raise TypeError(f"timm_to_transformers: prefix must be a str or None, got {prefix!r}")
    tensors = dict(state_dict)
    heads = family != "dinov2" and "head.weight" in tensors
    if prefix is None:
        prefix = f"{family}." if heads else ""
    apart = _DISTILLED_HEADS if "head_dist.weight" in tensors else _HEAD
    outside = {ours: theirs for theirs, ours in apart.items()} if heads else {}
    inside = {ours: theirs for theirs, ours in {**_TOP, **({} if heads else _POOLER)}.items()}
    for token, home in (("dist_token", "deit"), ("reg_token", "dinov2")):
        if family != home:
            del inside[token]
    gated = {block[1]: _is_gated(tensors, block[1]) for name in tensors if (block := BLOCK.fullmatch(name))}
    tables = {gate: _layer_names(family, layout, gate) for gate in (False, True)}

    def place(name: str) -> list[str] | None:
        if name in outside:
            return [outside[name]]
        if name in inside:
            return [prefix + inside[name]]
        block = BLOCK.fullmatch(name)
        theirs = tables[gated[block[1]]].get(block[2]) if block else None
        if block is None or theirs is None:
            return None
        folder = "layers" if layout == "v5" and family != "dinov2" else "encoder.layer"
        return [f"{prefix}{folder}.{block[1]}.{leaf}" for leaf in theirs]

    renamed, left = scatter(tensors, place)
    if "reg_token" in tensors and family == "dinov2":
        left |= _unfold_class_position(renamed, prefix)
    refuse("timm_to_transformers", f"transformers' layout of family {family!r}", left)
    cls = tensors.get("cls_token")
    if family == "dinov2" and cls is not None:
        renamed[prefix + _MASK] = cls.new_zeros(1, cls.shape[-1])
    return renamed


def _is_gated(tensors: Mapping[str, Tensor], block: str) -> bool:
    """Whether the block's fc1 holds gate and value: twice as many rows as fc2 has columns."""
    first, second = (tensors.get(f"blocks.{block}.mlp.fc{i}.weight") for i in (1, 2))
    if first is None or second is None or first.dim() != 2 or second.dim() != 2:
        return False
    return first.shape[0] == 2 * second.shape[1]


def _unfold_class_position(renamed: dict[str, Tensor], prefix: str) -> dict[str, str]:
    """Puts a row of zeros for the class token in front of the patches' position embeddings; why not, if it cannot."""
    name = f"{prefix}embeddings.position_embeddings"
    position = renamed.get(name)
    if position is None:
        return {}
    side = round(position.shape[1] ** 0.5) if position.dim() == 3 else 0
    if not side or side * side != position.shape[1]:
        return {"pos_embed": f"beside reg_token it must be [1, N, D] of a square grid, not {list(position.shape)}"}
    renamed[name] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
    return {}
