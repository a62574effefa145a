"""timm's attention pooling on the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention_pool import PoolPlan, run_pool
from .attached import differentiable, wants_gradient
from .describe import Unsupported, activation, check_head_dim, class_name, dropout, expect, linear, required_norm
from .described import Described
from .structure import foreign_code
from .timm_blocks import attention_scale

__all__ = ["TIMM_POOL", "FusedPool"]

TIMM_POOL = "timm.layers.attention_pool.AttentionPoolLatent"
_IDENTITY = "torch.nn.modules.linear.Identity"


def _describe(pool: Any) -> tuple[PoolPlan, tuple[nn.Module, ...]]:
    """Where everything is, and what acts at random in training mode."""
    foreign = foreign_code(pool)
    if foreign is not None:
        raise Unsupported(foreign, changed=True)
    if pool.pos_embed is not None or pool.latent_len != 1 or pool.pool != "token":
        raise Unsupported("it has position embeddings, or more than one latent query")
    if any(class_name(getattr(pool, name)) != _IDENTITY for name in ("q_norm", "k_norm")):
        raise Unsupported("it normalises queries and keys")
    if pool.mlp is None:
        raise Unsupported("it ends with the attention, without an MLP")
    mlp = expect(pool, "mlp", "timm.layers.mlp.Mlp")
    if class_name(mlp.norm) != _IDENTITY:
        raise Unsupported("its MLP has a norm inside")
    plan = PoolPlan(
        latent=(pool, "latent"),
        q=linear(pool, "q"),
        kv=linear(pool, "kv"),
        heads=pool.num_heads,
        head_dim=check_head_dim(pool.head_dim),
        scale=attention_scale(pool, pool.head_dim),
        proj=linear(pool, "proj"),
        norm2=required_norm(pool, "norm"),
        fc1=linear(pool, "mlp.fc1"),
        activation=activation(mlp.act, "mlp.act"),
        fc2=linear(pool, "mlp.fc2"),
    )
    return plan, dropout(pool, "proj_drop", "mlp.drop1", "mlp.drop2")


class FusedPool(Described):
    """Stands in for the forward() of timm's AttentionPoolLatent, as SigLIP has it."""

    def describe(self) -> tuple[PoolPlan, tuple[nn.Module, ...]]:
        return _describe(self.module)

    def why_not(self, x: Tensor) -> str | None:
        if not self.up_to_date():
            return self.refusal
        if any(part.training for part in self.description[1]):
            return "training mode with dropout"
        pool: Any = self.module
        return self.unavailable(x, pool.kv.weight)

    def _run(self, x: Tensor) -> Tensor:
        return run_pool(self.description[0], x, self.state.derived, self.name, fold=self.state.fold)

    def __call__(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        given = {} if attn_mask is None else {"attn_mask": attn_mask}
        if not isinstance(x, Tensor) or x.ndim != 3 or given:
            return self.instead("a mask, or tokens that are no tensor of three dimensions", x, **given)
        why = self.why_not(x)
        if why is not None or (self.module.training and wants_gradient(self.module, x)):
            return self.instead(why or "training: gradients", x)
        if not torch.compiler.is_compiling():
            self.why = None
            if wants_gradient(self.module, x):
                return differentiable(self._run, self.original, self.module, x)
        return self.replays.run("pool", self.module, (x,), lambda: (self._run(x),))[0]

    def report(self) -> tuple[str, str | None]:
        with torch.no_grad():
            return "linear, attention, linear, mlp", self.why_not(self.module.kv.weight) or self.why  # type: ignore[union-attr]
