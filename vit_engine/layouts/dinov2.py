"""facebookresearch/dinov2's DinoVisionTransformer."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .slots import Slot, check, gather, refuse, with_leaves

__all__ = ["dinov2_to_timm", "from_dinov2", "is_dinov2"]

_TOP = {name: name for name in ("cls_token", "pos_embed", *with_leaves({"patch_embed.proj": "", "norm": ""}))}
_TOP["register_tokens"] = "reg_token"
_SAME = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_LAYER = {
    **with_leaves({**{name: name for name in _SAME}, "mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}),
    **{f"ls{i}.gamma": f"ls{i}.gamma" for i in (1, 2)},
}
# Blocks may lie in chunks; the second number counts through all of them.
_BLOCK = re.compile(r"blocks\.(?:\d+\.)?(\d+)\.(\D.*)")


def is_dinov2(names: Mapping[str, object]) -> bool:
    """Whether these are the names of DINOv2's own files: they alone have these tokens at top level."""
    return "mask_token" in names or "register_tokens" in names


def _place(name: str) -> Slot | None:
    block = _BLOCK.fullmatch(name)
    if block is None:
        return Slot(_TOP[name]) if name in _TOP else None
    ours = _LAYER.get(block[2])
    return Slot(f"blocks.{block[1]}.{ours}") if ours else None


def from_dinov2(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """timm's tensors, and why others were left (by their names in the file); see dinov2_to_timm."""
    tensors, left = gather({name: tensor for name, tensor in state_dict.items() if name != "mask_token"}, _place)
    cls, position = tensors.get("cls_token"), tensors.get("pos_embed")
    if "reg_token" in tensors and cls is not None and position is not None:
        if cls.dim() == position.dim() == 3 and cls.shape[2] == position.shape[2] and position.shape[1] > 1:
            tensors["cls_token"] = cls + position[:, :1]
            tensors["pos_embed"] = position[:, 1:].clone()
        else:
            left["pos_embed"] = f"beside register_tokens it should be [1, 1 + N, D], not {list(position.shape)}"
            del tensors["pos_embed"]
    return tensors, left


def dinov2_to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of facebookresearch/dinov2's models under the names of timm's.

    With D the width, M the MLP's, N patches, R registers:

        cls_token [1, 1, D], patch_embed.proj, norm             the same
        pos_embed [1, 1 + N, D]                                 the same, without registers
        register_tokens [1, R, D]                               reg_token
        mask_token [1, D]                                       left out: it stands for patches hidden in training
        blocks.L., or in chunks blocks.K.L.                     blocks.L.
            norm1, attn.qkv, attn.proj, ls1.gamma, norm2,           the same
                mlp.fc1, mlp.fc2, ls2.gamma
            mlp.w12 [2 M, D], mlp.w3 [D, M] (giant), with bias      mlp.fc1 (gate first), mlp.fc2 (timm's SwiGLUPacked)

    With registers, which have no position embeddings, timm's models have none for the class token either
    (no_embed_class): its row is added to cls_token, which changes nothing in what is computed.

    Raises ValueError naming every tensor without a place, TypeError if something is no tensor.
    """
    check("dinov2_to_timm", state_dict)
    tensors, left = from_dinov2(state_dict)
    refuse("dinov2_to_timm", "timm's layout", left)
    return tensors
