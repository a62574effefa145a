"""What attention is compared with: each takes q, k, v [B, N, H, D] of any strides and returns o [B, N, H, D]."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Contender:
    """settings: version and how it was set up."""

    name: str
    settings: dict[str, str]
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return importlib.import_module("flash_attn").flash_attn_func(q, k, v)


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return importlib.import_module("xformers.ops").memory_efficient_attention(q, k, v)


_LIBRARIES = {"flash-attn": ("flash_attn", _flash_attn), "xFormers": ("xformers", _xformers)}


def baselines() -> tuple[dict[str, Contender], dict[str, str]]:
    """What is installed, by name; and, for what is not, why it takes no part."""
    found = {
        name: Contender(name, {"torch": torch.__version__, "backend": backend.name}, partial(_sdpa, backend))
        for name, backend in _BACKENDS.items()
    }
    missing = {}
    for name, (package, run) in _LIBRARIES.items():
        try:
            found[name] = Contender(name, {package: version(package)}, run)
        except PackageNotFoundError:
            missing[name] = f"{package} is not installed"
    return found, missing
