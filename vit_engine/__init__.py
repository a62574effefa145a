"""Vision Transformer forward passes through fused Triton kernels.

Importing this package loads neither PyTorch nor Triton and touches no GPU: names are looked up on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artefacts import load_kernels
    from .checkpoint import load_checkpoint, load_model, save_checkpoint
    from .config import ViTConfig
    from .converters import (
        convert,
        dinov2_to_timm,
        google_to_timm,
        timm_to_google,
        timm_to_torchvision,
        timm_to_transformers,
        torchvision_to_timm,
        transformers_to_timm,
    )
    from .dropin.api import accelerate, explain, refresh, restore, use_tuned
    from .dropin.transformers_attention import register_attention
    from .vit import ViT

__version__ = "0.1.0"

__all__ = [
    "ViT",
    "ViTConfig",
    "__version__",
    "accelerate",
    "convert",
    "dinov2_to_timm",
    "explain",
    "google_to_timm",
    "load_checkpoint",
    "load_kernels",
    "load_model",
    "refresh",
    "register_attention",
    "restore",
    "save_checkpoint",
    "timm_to_google",
    "timm_to_torchvision",
    "timm_to_transformers",
    "torchvision_to_timm",
    "transformers_to_timm",
    "use_tuned",
]

_HOME = {
    "restore": "dropin.api",
    "refresh": "dropin.api",
    "explain": "dropin.api",
    "accelerate": "dropin.api",
    "use_tuned": "dropin.api",
    "ViT": "vit",
    "ViTConfig": "config",
    "convert": "converters",
    "dinov2_to_timm": "converters",
    "google_to_timm": "converters",
    "load_checkpoint": "checkpoint",
    "load_kernels": "artefacts",
    "load_model": "checkpoint",
    "register_attention": "dropin.transformers_attention",
    "save_checkpoint": "checkpoint",
    "timm_to_google": "converters",
    "timm_to_torchvision": "converters",
    "timm_to_transformers": "converters",
    "torchvision_to_timm": "converters",
    "transformers_to_timm": "converters",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .triton_needed import triton_needed

    with triton_needed(f"{__name__}.{name}"):
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
