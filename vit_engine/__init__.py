"""Vision Transformer forward passes through fused Triton kernels.

Importing this package loads neither PyTorch nor Triton and touches no GPU: names are looked up on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint, load_model, save_checkpoint
    from .config import ViTConfig
    from .dropin.transformers_attention import register_attention
    from .vit import ViT

__version__ = "0.1.0"

__all__ = ["ViT", "ViTConfig", "__version__", "load_checkpoint", "load_model", "register_attention", "save_checkpoint"]

_HOME = {
    "ViT": "vit",
    "ViTConfig": "config",
    "load_checkpoint": "checkpoint",
    "load_model": "checkpoint",
    "register_attention": "dropin.transformers_attention",
    "save_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
