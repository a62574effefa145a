"""The feed-forward half of an encoder block (arXiv 2010.11929, equation 3)."""

from __future__ import annotations

import torch

from .linear import linear


def mlp(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None = None,
    norm: str = "layer",
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "gelu",
    layer_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = residual + layer_scale * (act(norm(x) W1^T + b1) W2^T + b2)

    x [M, K]; fc1_weight [F, K] ([2F, K] for swiglu); fc2_weight [N, F]; residual [M, N] -> [M, N].
    """
    hidden = linear(x, fc1_weight, fc1_bias, norm, norm_weight, norm_bias, eps, activation)  # [M, F]
    return linear(hidden, fc2_weight, fc2_bias, layer_scale=layer_scale, residual=residual)  # [M, N]
