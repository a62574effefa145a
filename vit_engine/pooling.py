"""Pooling by attention: the MAP head of "Scaling Vision Transformers" (arXiv 2106.04560), as SigLIP has it."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ViTConfig
from .layers import Mlp, init_linear

__all__ = ["AttentionPool"]


class AttentionPool(nn.Module):
    """One learned query, the probe p, attends to all tokens x: a = MHA(p W_q, x W_k, x W_v), y = a + MLP(LN(a)).

    Multi-head attention pooling (MAP) after "Set Transformer" (arXiv 1810.00825), the head of big_vision's ViTs and of
    SigLIP (arXiv 2303.15343), with the parameter names of timm's AttentionPoolLatent: latent [1, 1, D] (the probe),
    q [D, D], kv [2 D, D] (all key rows, then all value rows, each head by head), proj [D, D], norm [D], mlp.fc1 [M, D]
    and mlp.fc2 [D, M]. All of them have biases, whatever config.qkv_bias says of the blocks. Number of heads, M,
    activation and eps are those of the blocks; there is no dropout in it, in training mode either.

    These are PyTorch's own operators; on the kernels, `attention_pool.run_pool` computes the same in five launches.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.scale = self.head_dim**-0.5
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(dataclasses.replace(config, dropout=0.0))
        deviation = dim**-0.5
        nn.init.trunc_normal_(self.latent, std=deviation, a=-2 * deviation, b=2 * deviation)
        for layer in (self.q, self.kv, self.proj):
            init_linear(layer)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, D]."""
        batch, tokens, width = x.shape
        q = self.q(self.latent).reshape(1, 1, self.num_heads, self.head_dim).transpose(1, 2).expand(batch, -1, -1, -1)
        k, v = self.kv(x).reshape(batch, tokens, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        a = self.proj(a.reshape(batch, width))
        return a + self.mlp(self.norm(a))
