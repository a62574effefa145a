"""A linear layer with everything that may stand around it in a Vision Transformer block."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .norm import layer_norm


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x), Phi the normal distribution function (arXiv 1606.08415)."""
    return F.gelu(x) if x.dtype != torch.float64 else 0.5 * x * torch.special.erfc(-x / math.sqrt(2.0))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the same as x sigmoid(2 sqrt(2/pi) (...)) without
    cancellation.
    """
    if x.dtype != torch.float64:
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(1.702 x), in the three operations that CLIP's and timm's modules are made of."""
    return x * torch.sigmoid(1.702 * x)


def _silu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x)."""
    return F.silu(x) if x.dtype != torch.float64 else x * torch.sigmoid(x)


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) up, where x [..., 2N] holds the gates first (timm's SwiGLUPacked) -> [..., N] (arXiv 2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return _silu(gate) * up


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "silu": _silu,
    "swiglu": _swiglu,
}


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The named activation of every element; "swiglu" halves the last axis."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return ACTIVATIONS[activation](x)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: str = "none",
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    layer_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = residual + layer_scale * act(norm(x) W^T + b)

    x [M, K]; weight [N, K] ([2N, K] for swiglu, gate rows first); bias [N] or [2N]; norm_weight, norm_bias [K];
    layer_scale [N]; residual [M, N] -> [M, N]. Below float64 every line rounds its result to the dtype of x, as eager
    modules do.
    """
    h = x if norm == "none" else layer_norm(x, norm_weight, norm_bias, eps, norm)  # [M, K]
    h = F.linear(h, weight, bias)  # [M, N], or [M, 2N]
    h = activate(h, activation)  # [M, N]
    h = h if layer_scale is None else h * layer_scale
    return h if residual is None else residual + h
