"""Architectures under timm's names, as ViTConfig fields.

Widths and depths are those of the ViT paper's table 1 (B, L, H), of DeiT (Ti, S), of "Scaling Vision Transformers" (g,
G; arXiv 2106.04560), of DINOv2 (arXiv 2304.07193) and of SigLIP (B, L; arXiv 2303.15343, 2502.14786), each as timm's
model of the same name has them. mean, std and num_classes are those of the weights that timm keeps under the name: 1000
classes, or none (0) where those weights are a feature extractor.

timm gives some SigLIP models the exact GELU and others its tanh approximation; the presets follow it name by name.
transformers has the approximation in all of them: ViTConfig.preset(name, activation="gelu_tanh").
"""

from __future__ import annotations

from typing import Any

_INCEPTION = {"mean": 0.5, "std": 0.5}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_FEATURES = {"num_classes": 0}

_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
_GIANT = {"embed_dim": 1408, "depth": 40, "num_heads": 16, "hidden_dim": 6144}
_GIGANTIC = {"embed_dim": 1664, "depth": 48, "num_heads": 16, "hidden_dim": 8192}
_SO400M = {"embed_dim": 1152, "depth": 27, "num_heads": 16, "hidden_dim": 4304}
_DINOV2_GIANT = {"embed_dim": 1536, "depth": 40, "num_heads": 24, "hidden_dim": 8192, "activation": "swiglu"}

_REGISTERS = {"num_register_tokens": 4, "no_embed_class": True}
_TANH = {"activation": "gelu_tanh"}


def _google(architecture: dict[str, Any], patch: int, image: int) -> dict[str, Any]:
    return {**_INCEPTION, **architecture, "patch_size": patch, "image_size": image}


def _dinov2(architecture: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**_IMAGENET, **_FEATURES, **architecture, "patch_size": 14, "image_size": 518, "layer_scale": 1e-5, **more}


def _siglip(architecture: dict[str, Any], patch: int, image: int, **more: Any) -> dict[str, Any]:
    return {**_google(architecture, patch, image), **_FEATURES, "class_token": False, "global_pool": "map", **more}


PRESETS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": _google(_TINY, 16, 224),
    "vit_tiny_patch16_384": _google(_TINY, 16, 384),
    "vit_small_patch8_224": {**_google(_SMALL, 8, 224), **_IMAGENET, **_FEATURES},
    "vit_small_patch16_224": _google(_SMALL, 16, 224),
    "vit_small_patch16_384": _google(_SMALL, 16, 384),
    "vit_small_patch32_224": _google(_SMALL, 32, 224),
    "vit_small_patch32_384": _google(_SMALL, 32, 384),
    "vit_base_patch8_224": _google(_BASE, 8, 224),
    "vit_base_patch16_224": _google(_BASE, 16, 224),
    "vit_base_patch16_384": _google(_BASE, 16, 384),
    "vit_base_patch32_224": _google(_BASE, 32, 224),
    "vit_base_patch32_384": _google(_BASE, 32, 384),
    "vit_large_patch14_224": _google(_LARGE, 14, 224),
    "vit_large_patch16_224": _google(_LARGE, 16, 224),
    "vit_large_patch16_384": _google(_LARGE, 16, 384),
    "vit_large_patch32_224": {**_google(_LARGE, 32, 224), **_FEATURES},
    "vit_large_patch32_384": _google(_LARGE, 32, 384),
    "vit_huge_patch14_224": {**_google(_HUGE, 14, 224), **_FEATURES},
    "vit_giant_patch14_224": _google(_GIANT, 14, 224),
    "vit_gigantic_patch14_224": _google(_GIGANTIC, 14, 224),
    "vit_small_patch14_dinov2": _dinov2(_SMALL),
    "vit_base_patch14_dinov2": _dinov2(_BASE),
    "vit_large_patch14_dinov2": _dinov2(_LARGE),
    "vit_giant_patch14_dinov2": _dinov2(_DINOV2_GIANT),
    "vit_small_patch14_reg4_dinov2": _dinov2(_SMALL, **_REGISTERS),
    "vit_base_patch14_reg4_dinov2": _dinov2(_BASE, **_REGISTERS),
    "vit_large_patch14_reg4_dinov2": _dinov2(_LARGE, **_REGISTERS),
    "vit_giant_patch14_reg4_dinov2": _dinov2(_DINOV2_GIANT, **_REGISTERS),
    "vit_base_patch16_siglip_224": _siglip(_BASE, 16, 224),
    "vit_base_patch16_siglip_256": _siglip(_BASE, 16, 256),
    "vit_base_patch16_siglip_384": _siglip(_BASE, 16, 384),
    "vit_base_patch16_siglip_512": _siglip(_BASE, 16, 512),
    "vit_base_patch32_siglip_256": _siglip(_BASE, 32, 256, **_TANH),
    "vit_large_patch16_siglip_256": _siglip(_LARGE, 16, 256),
    "vit_large_patch16_siglip_384": _siglip(_LARGE, 16, 384),
    "vit_large_patch16_siglip_512": _siglip(_LARGE, 16, 512, **_TANH),
    "vit_so400m_patch14_siglip_224": _siglip(_SO400M, 14, 224),
    "vit_so400m_patch14_siglip_378": _siglip(_SO400M, 14, 378),
    "vit_so400m_patch16_siglip_256": _siglip(_SO400M, 16, 256, **_TANH),
    "vit_so400m_patch16_siglip_384": _siglip(_SO400M, 16, 384, **_TANH),
    "vit_so400m_patch16_siglip_512": _siglip(_SO400M, 16, 512, **_TANH),
}
