"""Queries and keys before attention: normalised per head (arXiv 2302.05442) and rotated (arXiv 2104.09864)."""

from __future__ import annotations

import torch

from .norm import layer_norm


def rot(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Each pair of columns (a, b) turned by a right angle, (-b, a): neighbours, or columns that are D/2 apart."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def qk_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    norm: str = "none",
    q_weight: torch.Tensor | None = None,
    q_bias: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
    prefix: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x), and x cos + rot(x) sin for tokens from `prefix` on, of q [B, N, H, D] and k [B, N, Hk, D].

    cos, sin [N - prefix, D], [Hr, N - prefix, D] or [B, Hr, N - prefix, D]. In 16 bits the norm is rounded before the
    rotation, which is computed in the wider dtype of x and the tables: what timm does, product by product.
    """
    results = []
    for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
        y = x if norm == "none" else layer_norm(x, weight, bias, eps, norm).to(x.dtype)  # [B, N, H, D]
        if cos is not None and sin is not None:
            y = y.transpose(1, 2)  # [B, H, N, D]
            patches = y[:, :, prefix:]  # [B, H, N - prefix, D]
            turned = patches * cos + rot(patches, interleaved) * sin  # [B, H, N - prefix, D]
            y = torch.cat([y[:, :, :prefix], turned.to(x.dtype)], 2)  # [B, H, N, D]
            y = y.transpose(1, 2)  # [B, N, H, D]
        results.append(y)
    return results[0], results[1]
