"""From an image to the token sequence the encoder reads (arXiv 2010.11929, equation 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def patch_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> torch.Tensor:
    """tokens = [prefix; patches W^T + b] + position

    images [B, C, H, W], floating, or uint8 (divided by 255); mean, std [C]: pixels become (pixel - mean) / std; weight
    [D, C, Ph, Pw]; bias [D]; prefix [R, D], the class and register tokens; position [R + L, D], or [L, D] for the
    patches alone, L = (H / Ph) (W / Pw) -> [B, R + L, D] in the dtype of weight. Pixels are normalised in fp32 (float64
    with float64 weights) and rounded once to the dtype of weight, as a preprocessing pipeline that hands over a tensor
    does.
    """
    _, channels, patch_h, patch_w = weight.shape
    batch, _, height, width = images.shape
    rows, columns = height // patch_h, width // patch_w

    wide = torch.promote_types(weight.dtype, torch.float32)
    x = images.to(wide) / 255 if images.dtype == torch.uint8 else images.to(wide)  # [B, C, H, W]
    x = x if mean is None else x - mean.to(wide)[:, None, None]
    x = x if std is None else x / std.to(wide)[:, None, None]
    x = x.to(weight.dtype)
    x = x.reshape(batch, channels, rows, patch_h, columns, patch_w)
    x = x.permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, C, Ph, Pw]
    x = x.reshape(batch, rows * columns, channels * patch_h * patch_w)  # [B, L, C Ph Pw]
    tokens = F.linear(x, weight.flatten(1), bias)  # [B, L, D]

    patches_only = position is not None and position.shape[0] == rows * columns
    if position is not None and patches_only:
        tokens = tokens + position
    if prefix is not None:
        tokens = torch.cat([prefix.expand(batch, -1, -1), tokens], dim=1)  # [B, R + L, D]
    if position is not None and not patches_only:
        tokens = tokens + position
    return tokens
