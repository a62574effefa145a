"""Attention pooling on the kernels: the MAP head of pooling.py in five launches.

    kv          linear                        keys and values of all tokens; the query depends on parameters alone
    attention   one query an image            o
    proj        linear                        a and its row statistics
    mlp         see encoder_block.py          a + MLP(LN(a))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from . import ops
from .derived import DerivedCache
from .encoder_block import MlpPlan, Source, Stack, joined, read, run_mlp, stats_of_few

__all__ = ["PoolPlan", "run_pool"]


@dataclass(frozen=True, kw_only=True)
class PoolPlan(MlpPlan):
    """Where the parameters of an attention pool are, and its settings.

    latent: [1, 1, D], the probe. q: [heads * head_dim, D]; kv: keys, then values, each [heads * head_dim, D].
    """

    latent: Source
    q: Stack
    kv: Stack
    heads: int
    head_dim: int
    scale: float
    proj: Stack


def run_pool(
    plan: PoolPlan, x: Tensor, derived: DerivedCache, name: str, prefix: int = 0, fold: bool = True
) -> Tensor:  # fmt: skip
    """Tokens x [B, N, D] -> [B, D]: the probe attends to all but the first `prefix` of them, MLP behind it.

    derived, name, fold: as in `run_block`.
    """
    batch, tokens, width = x.shape

    def query() -> tuple[Tensor]:
        latent: Tensor = read(plan.latent)  # type: ignore[assignment]
        return (F.linear(latent[0], plan.q.weight(), plan.q.bias()),)

    q = derived.get(f"{name}.query", [read(plan.latent), *plan.q.sources()], query)[0]
    q = q.view(1, 1, plan.heads, plan.head_dim).expand(batch, -1, -1, -1)
    kv = ops.linear(x.reshape(batch * tokens, width), *joined(plan.kv, derived, f"{name}.kv"))
    assert isinstance(kv, Tensor)
    k, v = kv.view(batch, tokens, 2 * plan.heads, plan.head_dim)[:, prefix:].split(plan.heads, dim=2)
    o = ops.attention(q, k, v, scale=plan.scale)
    assert isinstance(o, Tensor)
    a, stats = ops.linear(
        o.view(batch, plan.heads * plan.head_dim), *joined(plan.proj, derived, f"{name}.proj"), emit_stats=True
    )
    return run_mlp(plan, a, stats_of_few(a, stats), derived, name, fold)[0]
