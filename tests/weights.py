"""What the tests draw, and what they do to it: widen it, frame it with NaN, and read emitted row statistics."""

from __future__ import annotations

import torch

from vit_bench import draw

from .rung import DEVICE


class Draw(draw.Draw):
    """`vit_bench.draw.Draw` on the device of this test run, and images."""

    def __init__(self, dtype: torch.dtype, seed: int = 0, device: str | torch.device = DEVICE) -> None:
        super().__init__(dtype, device, seed)

    def images(self, *shape: int) -> torch.Tensor:
        """Normalised floating-point images [B, C, H, W], roughly N(0, 1)."""
        return self.normal(*shape)

    def bytes(self, *shape: int) -> torch.Tensor:
        """uint8 images [B, C, H, W] over the whole range."""
        return self.integers(0, 256, *shape, dtype=torch.uint8)


def float64(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The same values in float64: what the truth is computed from."""
    return [x if x is None or not x.is_floating_point() else x.double() for x in tensors]


def nan_framed(x: torch.Tensor, *, before: int = 1, after: int = 2) -> torch.Tensor:
    """The same values as a view into a larger buffer of NaN (255 for bytes): every axis has foreign values on both
    sides.

    What a kernel reads beyond its tensor is then NaN, inside the storage, where no bounds check stops it.
    """
    poison = float("nan") if x.is_floating_point() else 255
    buffer = torch.full([n + before + after for n in x.shape], poison, dtype=x.dtype, device=x.device)
    view = buffer[tuple(slice(before, before + n) for n in x.shape)]
    view.copy_(x)
    return view


def moments(stats: torch.Tensor, columns: int, group: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and M2 of whole rows, float64, from stats [2, T, M]: T = 1 or one partial per `group` columns (Chan's
    formula).
    """
    partials = stats.shape[1]
    assert partials in (1, -(-columns // group)), f"{partials} partials for {columns} columns"
    means, m2s = stats.double()
    widths = [columns] if partials == 1 else [min(group, columns - t * group) for t in range(partials)]
    counts = torch.tensor(widths, dtype=torch.float64, device=stats.device)[:, None]
    mean = (means * counts).sum(0) / columns
    return mean, (m2s + counts * (means - mean).square()).sum(0)
