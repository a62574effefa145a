"""Models for tests: small timm models of every variant, with parameters redrawn so that each of them matters."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vit_bench import whole_model
from vit_engine import ViT, ViTConfig


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter gets values that matter, in place; returns the model (see `vit_bench.whole_model.redraw`)."""
    whole_model.redraw(model, seed)
    return model


SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 7,
}

_TIMM_NAMES = {
    "image_size": "img_size",
    "in_channels": "in_chans",
    "num_register_tokens": "reg_tokens",
    "layer_scale": "init_values",
}
_TIMM_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}


def timm_model(config: ViTConfig, seed: int = 0, **more: Any) -> VisionTransformer:
    """timm's model of this architecture in eval mode, redrawn, in the default dtype. Training rates are left at 0."""
    names = ("image_size", "patch_size", "in_channels", "embed_dim", "depth", "num_heads", "qkv_bias", "num_classes")
    names += ("class_token", "num_register_tokens", "global_pool", "fc_norm", "layer_scale", "no_embed_class")
    arguments: dict[str, Any] = {_TIMM_NAMES.get(name, name): getattr(config, name) for name in names}
    arguments["mlp_ratio"] = config.mlp_hidden / config.embed_dim
    if config.activation == "swiglu":
        arguments["mlp_layer"], arguments["act_layer"] = SwiGLUPacked, nn.SiLU
    else:
        arguments["act_layer"] = _TIMM_ACTIVATIONS[config.activation]
    model = VisionTransformer(**arguments, **more)
    redraw(model, seed)
    return model.eval()


def small_vit(seed: int = 0, **overrides: Any) -> ViT:
    """A redrawn ViT of SMALL with some fields replaced, in eval mode, float64, on the torch backend."""
    model = ViT(ViTConfig(**{**SMALL, **overrides}), backend="torch").double().eval()
    redraw(model, seed)
    return model


def blank(**overrides: Any) -> ViT:
    """A small_vit with weights unlike those that another seed draws."""
    return small_vit(seed=99, **overrides)


def equal(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether both have the same parameters, bit for bit."""
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normalised images, N(0, 1)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(ours: Tensor, truth: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of the truth."""
    assert ours.shape == truth.shape, (ours.shape, truth.shape)
    return ((ours - truth).abs().max() / truth.abs().max()).item()
