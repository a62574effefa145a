"""Weights and inputs for tests, drawn so that every parameter matters.

A library's own initialisation has zero biases, unit gammas and tiny tokens: a kernel could drop them unnoticed. Here
biases and betas are N(0, 0.5), gammas lie in 1 +- 0.5, LayerScale in 0.1 to 1, tokens and positions are N(0, 1),
weights are N(0, 1/K), and rows of the residual stream have one channel a hundred times the others and a common offset.

Every tensor owns exactly its storage: the sanitizer's bounds are those of the storage.
"""

from __future__ import annotations

import torch

from .rung import DEVICE


class Draw:
    """A seeded source of test tensors of one dtype.

    Numbers come from a CPU generator in fp32 and are rounded to the dtype afterwards, so that a seed gives the same
    values on every device, and the same values up to rounding in every dtype.
    """

    def __init__(self, dtype: torch.dtype, seed: int = 0, device: str | torch.device = DEVICE):
        self.dtype = dtype
        self.device = device
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype).contiguous().clone().to(self.device)

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        """N(0, std^2): tokens, positions, queries, keys, values."""
        return self._own(std * torch.randn(shape, generator=self.generator))

    def uniform(self, *shape: int, low: float, high: float) -> torch.Tensor:
        return self._own(low + (high - low) * torch.rand(shape, generator=self.generator))

    def weight(self, *shape: int) -> torch.Tensor:
        """[N, K...] scaled by 1/sqrt(K), so that outputs have the size of inputs."""
        return self.normal(*shape, std=torch.Size(shape[1:]).numel() ** -0.5)

    def bias(self, n: int) -> torch.Tensor:
        return self.normal(n, std=0.5)

    def gamma(self, n: int) -> torch.Tensor:
        return self.uniform(n, low=0.5, high=1.5)

    def layer_scale(self, n: int) -> torch.Tensor:
        return self.uniform(n, low=0.1, high=1.0)

    def rows(self, m: int, k: int, *, offset: float = 4.0, outlier: float = 100.0) -> torch.Tensor:
        """Rows of a residual stream [M, K]: N(0, 1), one channel `outlier` times that, and each row moved by a common
        offset N(offset, 1)."""
        x = torch.randn(m, k, generator=self.generator)
        if k > 1:
            x[:, k // 3] *= outlier
        return self._own(x + offset + torch.randn(m, 1, generator=self.generator))

    def images(self, *shape: int) -> torch.Tensor:
        """Normalised floating-point images [B, C, H, W], roughly N(0, 1)."""
        return self.normal(*shape)

    def bytes(self, *shape: int) -> torch.Tensor:
        """uint8 images [B, C, H, W] over the whole range."""
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator).to(self.device)


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
