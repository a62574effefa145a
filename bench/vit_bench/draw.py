"""Inputs and weights for correctness cases, drawn so that every parameter matters.

A library's own initialisation has zero biases, unit gammas and tiny tokens: a kernel could drop them unnoticed. Here
biases and betas are N(0, 0.5), gammas lie in 1 +- 0.5, LayerScale in 0.1 to 1, tokens and positions are N(0, 1),
weights are N(0, 1/K), and rows of the residual stream have one channel a hundred times the others and a common
offset.
"""

from __future__ import annotations

import torch


class Draw:
    """A seeded source of tensors of one dtype on one device.

    Numbers come from a CPU generator in fp32 and are rounded afterwards, so that a seed gives the same values up to
    rounding everywhere. Every tensor owns exactly its storage: a sanitizer's bounds are those of the storage.
    """

    def __init__(self, dtype: torch.dtype, device: str | torch.device, seed: int = 0) -> None:
        self.dtype = dtype
        self.device = device
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype).contiguous().clone().to(self.device)

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        """N(0, std^2): tokens, positions, images, queries, keys, values."""
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

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Uniform integers in [low, high)."""
        return torch.randint(low, high, shape, dtype=dtype, generator=self.generator).to(self.device)

    def chance(self, probability: float, *shape: int) -> torch.Tensor:
        """Booleans that are True with this probability."""
        return (torch.rand(shape, generator=self.generator) < probability).to(self.device)
