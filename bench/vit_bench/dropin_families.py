"""The models that `vit_engine.accelerate` takes, by family: a small one of the same classes, and the full-size one.

A small model has two blocks of width 48 and random weights that all matter, so that it runs in Triton's interpreter in
a second; a full-size one has the library's own configuration and no values. timm's names are sorted into families by
`timm_family`, so that every name of a timm module is accounted for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_bench.whole_model import redraw

__all__ = ["FAMILIES", "TIMM_MODULES", "Family", "inputs", "small_model", "timm_family", "timm_names"]

TIMM_MODULES = ("vision_transformer", "deit", "eva", "beit")
WIDTH, HEADS = 48, 2


@dataclass(frozen=True)
class Family:
    """library, name: for the table. small, full: builders, the second called on the meta device. covers: the models'
    names, where they are not timm's. more: what forward() needs beside images, from how many of them there are and the
    model; patches: images come as rows of patches; video: several of them at a time.
    """

    library: str
    name: str
    small: Callable[[], nn.Module]
    full: Callable[[], nn.Module]
    full_name: str
    covers: tuple[str, ...] = ()
    more: Callable[[int, Any], dict[str, Tensor]] | None = None
    patches: bool = False
    video: bool = False

    def __str__(self) -> str:
        return f"{self.library}: {self.name}"


def small_model(family: Family, seed: int = 0) -> nn.Module:
    """The family's small model in eval mode and float32, every parameter redrawn."""
    torch.manual_seed(seed)
    model = family.small().eval()
    redraw(model, seed)
    return model


def image_size(model: Any) -> tuple[int, int]:
    """Height and width of the images that a model of any of the libraries was made for."""
    if hasattr(model, "patch_embed"):
        height, width = model.patch_embed.img_size or (224, 224)
        return height, width
    size = getattr(model, "image_size", None) or model.config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def inputs(family: Family, model: Any, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """What the model's forward() is called with: "images", to be given first, and the rest by name; float32."""
    generator = torch.Generator().manual_seed(seed)
    more = family.more(batch, model) if family.more else {}
    if family.patches:
        config = model.config
        shape = (batch, config.num_patches, config.num_channels * config.patch_size**2)
    else:
        frames = (model.config.num_frames,) if family.video else ()
        shape = (batch, *frames, 3, *image_size(model))
    return {"images": torch.randn(shape, generator=generator), **more}


# --- timm ----------------------------------------------------------------------------------------------------------

# The first pattern that a name matches says which family it belongs to; "refused" are those without kernels.
_TIMM_PATTERNS = {
    "vision_transformer": {
        "refused": r"_18x2_|_rpn_|_xp_|vit_d?pwee|vit_dwee|vit_dlittle",
        "AIMv2: RMSNorm, SwiGLU": r"aimv2",
        "BEiT-3: norms inside the branches": r"beit3",
        "CLIP: norm before the blocks, no patch bias": r"_clip_",
        "SigLIP 1 and 2: attention pooling or average": r"siglip",
        "DINOv2, TIPSv2: LayerScale, registers": r"(small|base|large|so400m)_patch14_(dinov2|reg\d_)",
        "DINOv2, TIPSv2 giant: packed SwiGLU": r"giant_patch14_(dinov2|reg\d_)",
        "RADIO: no final norm": r"radio",
        "FlexiViT": r"flexivit",
        "SBB: registers, average pooling, LayerScale": r"reg\d_(gap|map)",
        "ViT, AugReg, MAE, DINO, SAM, EVA plain": r"",
    },
    "deit": {"DeiT distilled": r"distilled", "DeiT, DeiT-3": r""},
    "eva": {
        "refused": r"eva02_enormous",
        "DINOv3, LingBot: rotary, LayerScale": r"dinov3|lingbot",
        "Sapiens2: grouped heads, RMSNorm": r"sapiens2",
        "Perception Encoder": r"_pe_",
        "ViT with RoPE": r"_rope_",
        "EVA-02: SwiGLU, norms inside the branches": r"eva02",
        "EVA giant": r"eva_giant",
    },
    "beit": {"BEiT, BEiT v2: relative position bias": r""},
}


def timm_family(module: str, name: str) -> str:
    """The family of a timm model name, "refused" where there are no kernels for its blocks."""
    return next(family for family, pattern in _TIMM_PATTERNS[module].items() if re.search(pattern, name))


def timm_names(module: str, family: str) -> tuple[str, ...]:
    """timm's names of one family, as the installed version lists them."""
    import timm

    return tuple(name for name in timm.list_models(module=module) if timm_family(module, name) == family)


def _timm(module: str, family: str, example: str, **more: Any) -> Family:
    def build(**arguments: Any) -> nn.Module:
        import timm

        return timm.create_model(example, **arguments)

    patch = int(match[1]) if (match := re.search(r"patch(\d+)", example)) else 16
    small = {"depth": 2, "embed_dim": WIDTH, "num_heads": HEADS, "num_classes": 5, "img_size": 2 * patch, **more}
    return Family("timm", family, lambda: build(**small), build, example)


_TIMM = [
    _timm("vision_transformer", "ViT, AugReg, MAE, DINO, SAM, EVA plain", "vit_base_patch16_224"),
    _timm("vision_transformer", "CLIP: norm before the blocks, no patch bias", "vit_base_patch16_clip_quickgelu_224"),
    _timm("vision_transformer", "SigLIP 1 and 2: attention pooling or average", "vit_base_patch16_siglip_224"),
    _timm("vision_transformer", "DINOv2, TIPSv2: LayerScale, registers", "vit_base_patch14_reg4_dinov2"),
    _timm("vision_transformer", "DINOv2, TIPSv2 giant: packed SwiGLU", "vit_giant_patch14_reg4_dinov2"),
    _timm("vision_transformer", "SBB: registers, average pooling, LayerScale", "vit_betwixt_patch16_reg4_gap_256"),
    _timm("vision_transformer", "FlexiViT", "flexivit_base"),
    _timm("vision_transformer", "RADIO: no final norm", "vit_base_patch16_radio_v3"),
    _timm("vision_transformer", "AIMv2: RMSNorm, SwiGLU", "aimv2_large_patch14_224"),
    _timm("vision_transformer", "BEiT-3: norms inside the branches", "beit3_base_patch16_224"),
    _timm("deit", "DeiT, DeiT-3", "deit3_base_patch16_224"),
    _timm("deit", "DeiT distilled", "deit_base_distilled_patch16_224"),
    _timm("eva", "EVA-02: SwiGLU, norms inside the branches", "eva02_base_patch14_224"),
    _timm("eva", "EVA giant", "eva_giant_patch14_224"),
    _timm("eva", "DINOv3, LingBot: rotary, LayerScale", "vit_base_patch16_dinov3"),
    _timm("eva", "Perception Encoder", "vit_pe_core_base_patch16_224"),
    _timm("eva", "ViT with RoPE", "vit_base_patch16_rope_mixed_224"),
    _timm("eva", "Sapiens2: grouped heads, RMSNorm", "vit_base_patch16_sapiens2", num_kv_heads=(1, 2)),
    _timm("beit", "BEiT, BEiT v2: relative position bias", "beit_base_patch16_224"),
]


# --- torchvision ---------------------------------------------------------------------------------------------------


def _torchvision_small() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, num_layers=2, num_heads=HEADS, hidden_dim=WIDTH, mlp_dim=96, num_classes=5)


def _torchvision_full() -> nn.Module:
    from torchvision.models import vit_b_16

    return vit_b_16()


_TORCHVISION_NAMES = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
_TORCHVISION = [
    Family("torchvision", "ViT", _torchvision_small, _torchvision_full, "vit_b_16", _TORCHVISION_NAMES)
]


# --- transformers --------------------------------------------------------------------------------------------------

_SMALL_CONFIG = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}


def _transformers(
    name: str, model: str, config: str, covers: tuple[str, ...], full: dict[str, Any] | None = None,
    inputs: Callable[[int, Any], dict[str, Tensor]] | None = None, patches: bool = False, video: bool = False,
    **more: Any,
) -> Family:  # fmt: skip
    def build(**settings: Any) -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return Family(
        "transformers",
        name,
        lambda: build(**{**_SMALL_CONFIG, **more}),
        lambda: build(**(full or {})),
        model,
        covers=covers,
        more=inputs,
        patches=patches,
        video=video,
    )


def _noise(batch: int, model: Any) -> dict[str, Tensor]:
    """ViTMAE shuffles patches by noise of its own unless it is given some."""
    patches = (model.config.image_size // model.config.patch_size) ** 2
    return {"noise": torch.linspace(1, 0, patches).expand(batch, patches)}


def _shapes(batch: int, model: Any) -> dict[str, Tensor]:
    """SigLIP 2 takes images of different shapes as rows of patches, padded: the last one here lacks a row."""
    side = math.isqrt(model.config.num_patches)
    shapes = torch.tensor([[side, side]] * (batch - 1) + [[side - 1, side]])
    used = shapes.prod(1, keepdim=True)
    return {"pixel_attention_mask": (torch.arange(side * side) < used).long(), "spatial_shapes": shapes}


_DINO: dict[str, Any] = {"mlp_ratio": 2}
_TRANSFORMERS = [
    _transformers("ViT", "ViTForImageClassification", "ViTConfig", ("ViT*",), num_labels=5),
    _transformers("DeiT", "DeiTModel", "DeiTConfig", ("DeiT*",)),
    _transformers("DINOv2", "Dinov2Model", "Dinov2Config", ("Dinov2*",), **_DINO, use_swiglu_ffn=True),
    _transformers(
        "DINOv2 with registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", ("Dinov2WithRegisters*",),
        **_DINO, num_register_tokens=2,
    ),
    _transformers(
        "DINOv3", "DINOv3ViTModel", "DINOv3ViTConfig", ("DINOv3ViT*",), num_register_tokens=2, use_gated_mlp=True,
        hidden_act="silu",
    ),
    _transformers("CLIP vision", "CLIPVisionModel", "CLIPVisionConfig", ("CLIPVisionModel*", "CLIPModel")),
    _transformers("MetaCLIP 2 vision", "MetaClip2VisionModel", "MetaClip2VisionConfig", ("MetaClip2*",)),
    _transformers("ViT-MSN", "ViTMSNModel", "ViTMSNConfig", ("ViTMSN*",)),
    _transformers("I-JEPA", "IJepaModel", "IJepaConfig", ("IJepa*",)),
    _transformers("OWL-ViT vision", "OwlViTVisionModel", "OwlViTVisionConfig", ("OwlViT*",)),
    _transformers("OWLv2 vision", "Owlv2VisionModel", "Owlv2VisionConfig", ("Owlv2*",)),
    _transformers("BLIP vision", "BlipVisionModel", "BlipVisionConfig", ("BlipVisionModel", "BlipModel", "BlipFor*")),
    _transformers("VideoMAE", "VideoMAEModel", "VideoMAEConfig", ("VideoMAE*",), video=True, num_frames=4),
    _transformers("SigLIP vision", "SiglipVisionModel", "SiglipVisionConfig", ("SiglipVisionModel", "SiglipModel")),
    _transformers(
        "SigLIP 2 vision", "Siglip2VisionModel", "Siglip2VisionConfig", ("Siglip2VisionModel", "Siglip2Model"),
        inputs=_shapes, patches=True, num_patches=16,
    ),
    _transformers(
        "ViTMAE encoder", "ViTMAEModel", "ViTMAEConfig", ("ViTMAEModel", "ViTMAEForPreTraining"),
        inputs=_noise, mask_ratio=0.5,
    ),
    _transformers(
        "BEiT", "BeitModel", "BeitConfig", ("Beit*",), use_relative_position_bias=True, use_mean_pooling=True,
        layer_scale_init_value=0.5, full={"use_relative_position_bias": True},
    ),
]

FAMILIES: tuple[Family, ...] = (*_TIMM, *_TORCHVISION, *_TRANSFORMERS)
