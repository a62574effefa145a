"""torchvision's VisionTransformer."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .slots import BLOCK, Slot, check, gather, refuse, scatter, with_leaves

__all__ = ["timm_to_torchvision", "torchvision_to_timm"]

_TOP = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    **with_leaves(
        {
            "conv_proj": "patch_embed.proj",
            "encoder.ln": "norm",
            "heads.pre_logits": "pre_logits.fc",
            "heads.head": "head",
        }
    ),
}
_LAYER = {
    **with_leaves(
        {
            "ln_1": "norm1",
            "self_attention.out_proj": "attn.proj",
            "ln_2": "norm2",
            "mlp.0": "mlp.fc1",
            "mlp.3": "mlp.fc2",
        }
    ),
    "self_attention.in_proj_weight": "attn.qkv.weight",
    "self_attention.in_proj_bias": "attn.qkv.bias",
}
# Files written before torchvision's MLPBlock became an MLP have these names, and torchvision still reads them.
_OLD_LAYER = with_leaves({"mlp.linear_1": "mlp.fc1", "mlp.linear_2": "mlp.fc2"})
_THEIR_BLOCK = re.compile(r"encoder\.layers\.encoder_layer_(\d+)\.(.+)")

_FROM_TOP = {ours: theirs for theirs, ours in _TOP.items()}
_FROM_LAYER = {ours: theirs for theirs, ours in _LAYER.items()}


def _to_timm(name: str) -> Slot | None:
    block = _THEIR_BLOCK.fullmatch(name)
    if block is None:
        return Slot(_TOP[name]) if name in _TOP else None
    ours = _LAYER.get(block[2]) or _OLD_LAYER.get(block[2])
    return Slot(f"blocks.{block[1]}.{ours}") if ours else None


def _from_timm(name: str) -> list[str] | None:
    block = BLOCK.fullmatch(name)
    if block is None:
        return [_FROM_TOP[name]] if name in _FROM_TOP else None
    theirs = _FROM_LAYER.get(block[2])
    return [f"encoder.layers.encoder_layer_{block[1]}.{theirs}"] if theirs else None


def torchvision_to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of torchvision's VisionTransformer under the names of timm's; shapes and tensors are the same.

    With D the width, M the MLP's, N patches, C classes:

        class_token [1, 1, D]                            cls_token
        conv_proj.weight [D, 3, P, P], .bias             patch_embed.proj.weight, .bias
        encoder.pos_embedding [1, 1 + N, D]              pos_embed
        encoder.layers.encoder_layer_L.
            ln_1, ln_2 .weight, .bias [D]                blocks.L.norm1, norm2
            self_attention.in_proj_weight [3 D, D]       blocks.L.attn.qkv.weight
            self_attention.in_proj_bias [3 D]            blocks.L.attn.qkv.bias
            self_attention.out_proj [D, D], [D]          blocks.L.attn.proj
            mlp.0 (once mlp.linear_1) [M, D], [M]        blocks.L.mlp.fc1
            mlp.3 (once mlp.linear_2) [D, M], [D]        blocks.L.mlp.fc2
        encoder.ln [D]                                   norm
        heads.pre_logits [R, D], [R], if there is one    pre_logits.fc (vit_engine's ViTConfig(head="pretrain"))
        heads.head [C, D], [C]                           head

    eps is 1e-6 in both. Raises ValueError naming every tensor without a place (of a convolutional stem, for example),
    TypeError if something is no tensor.
    """
    check("torchvision_to_timm", state_dict)
    tensors, left = gather(state_dict, _to_timm)
    refuse("torchvision_to_timm", "timm's layout", left)
    return tensors


def timm_to_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of torchvision_to_timm, which has the table.

    Class token and patches must have position embeddings, as torchvision adds them to both. Raises ValueError naming
    every tensor without a place there, such as register tokens, LayerScale and attention pooling; TypeError if
    something is no tensor.
    """
    check("timm_to_torchvision", state_dict)
    tensors, left = scatter(state_dict, _from_timm)
    refuse("timm_to_torchvision", "torchvision's layout", left)
    return tensors
