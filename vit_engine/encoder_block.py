"""One pre-norm encoder block on the kernels, whoever's modules hold its parameters.

    x += gamma1 * proj(subnorm(attention(qkv(norm1(x)))))       equation 2 of arXiv 2010.11929, and its variants
    x += gamma2 * fc2(subnorm(act(fc1(norm2(x)))))              equation 3

    linear(norm1 folded)         packed qkv
    qk_rope                      only where queries and keys are normalised or rotated
    attention                    o, straight from the packed qkv
    linear(+ x, LayerScale)      x and its row statistics
    mlp(norm2 folded, + x, LayerScale), one or two launches: x and its row statistics

A `BlockPlan` says where the tensors are; they are read anew by every pass, so a parameter may be replaced at any time.
The rows of x are normalised nowhere on their own: each producer leaves the row statistics behind and each consumer
applies them (see vit_kernels/folding.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_kernels import fold_norm

from . import ops
from .derived import DerivedCache

__all__ = [
    "AttentionInputs", "BlockPlan", "MlpPlan", "Norm", "Source", "Stack", "apply_norm", "joined", "one_partial",
    "queries_apart", "read", "run_block", "run_mlp", "stats_of_few",
]  # fmt: skip

Source = tuple[nn.Module, str]  # the tensor is getattr(module, name)


def read(source: Source | None) -> Tensor | None:
    """The tensor at that place now, None where there is none."""
    return None if source is None else getattr(source[0], source[1])


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm module. kind: "layer" or "rms", as the kernels name them."""

    module: nn.Module
    kind: str = "layer"

    @property
    def weight(self) -> Tensor | None:
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def eps(self) -> float:
        return self.module.eps  # type: ignore[return-value]


@dataclass(frozen=True)
class Stack:
    """Linear layers of one input as a single one: the rows of `weights` on top of each other, and of `biases`.

    There are as many biases as weights, None for zeros; or one weight and the biases of its parts one after the other.
    """

    weights: tuple[Source, ...]
    biases: tuple[Source | None, ...]

    def sources(self) -> list[Tensor | None]:
        return [read(source) for source in (*self.weights, *self.biases)]

    def weight(self) -> Tensor:
        parts: list[Tensor] = [read(source) for source in self.weights]  # type: ignore[misc]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def bias(self) -> Tensor | None:
        parts = [read(source) for source in self.biases]
        if all(part is None for part in parts):
            return None
        if len(parts) == 1:
            return parts[0]
        filled = []
        for number, part in enumerate(parts):
            if part is None:
                rows: Tensor = read(self.weights[number])  # type: ignore[assignment]
                part = rows.new_zeros(rows.shape[0])
            filled.append(part)
        return torch.cat(filled)


@dataclass(frozen=True, kw_only=True)
class MlpPlan:
    """Where the parameters of x + gamma2 MLP(norm2(x)) are.

    fc1: with activation "swiglu" the gate's rows first. mlp_norm: of the hidden features. gamma2: LayerScale.
    """

    norm2: Norm
    fc1: Stack
    activation: str
    fc2: Stack
    mlp_norm: Norm | None = None
    gamma2: Source | None = None


@dataclass(frozen=True, kw_only=True)
class BlockPlan(MlpPlan):
    """Where the parameters of one block are, and its settings.

    qkv: [(heads + 2 heads_k) * head_dim, D] in this order. heads, heads_k, head_dim, scale: of the attention.
    q_norm, k_norm: over head_dim, both or neither. interleaved: pairs of rotary embeddings are neighbours.
    attention_norm: on the attention's output. gamma1: LayerScale.
    """

    norm1: Norm
    qkv: Stack
    heads: int
    heads_k: int
    head_dim: int
    scale: float
    proj: Stack
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    interleaved: bool = False
    attention_norm: Norm | None = None
    gamma1: Source | None = None


@dataclass(frozen=True)
class AttentionInputs:
    """What a pass brings to the attention beside the tokens.

    mask: boolean (True: may attend) or additive, broadcastable to [B, H, N, N]. cos, sin: tables of `ops.qk_rope` for
    the last rows of each image.
    """

    mask: Tensor | None = None
    causal: bool = False
    cos: Tensor | None = None
    sin: Tensor | None = None


PLAIN = AttentionInputs()


def apply_norm(rows: Tensor, norm: Norm) -> Tensor:
    """rows [M, D] -> normalised rows, one launch."""
    return ops.layer_norm(rows, norm.weight, norm.bias, eps=norm.eps, kind=norm.kind)


def run_block(
    plan: BlockPlan,
    x: Tensor,
    stats: Tensor | None,
    batch_tokens: tuple[int, int],
    derived: DerivedCache,
    name: str,
    inputs: AttentionInputs = PLAIN,
    fold: bool = True,
    first_token: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows x [B * N, D] of the residual stream through one block; returns the next rows and their statistics.

    stats: row statistics of x, None to compute them. derived: keeps the folded weights under keys that start with name.
    fold: False normalises in launches of their own instead, with the parameters as they are: two more launches a block
        and no copies of weights (biases stored in parts are still put together).
    first_token: only the first token of each image comes out, rows [B, D]. It attends to all tokens, so keys and values
        are those of all; queries, projection and MLP of the others are read by nobody and left out. For the last block
        in front of a head that reads the class token (equation 4). Not with a mask or a causal order.
    """
    if first_token and (inputs.mask is not None or inputs.causal):
        raise ValueError("first_token must be False with a mask or a causal order; got True")
    # Each half in a call of its own: what it makes on the way is freed before the other half needs the memory.
    x, x_stats = _attend(plan, x, stats, batch_tokens, derived, name, inputs, fold, first_token)
    if first_token:
        x_stats = stats_of_few(x, x_stats)
    return run_mlp(plan, x, x_stats, derived, name, fold)


def _attend(
    plan: BlockPlan, x: Tensor, stats: Tensor | None, batch_tokens: tuple[int, int], derived: DerivedCache, name: str,
    inputs: AttentionInputs, fold: bool, first_token: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    changed = plan.q_norm is not None or inputs.cos is not None
    # qk_rope takes as many queries as keys, and three layers are not put together without fold.
    may = first_token and not changed and (fold or len(plan.qkv.weights) == 1)
    apart = may and queries_apart(x.shape[0], plan.heads * plan.head_dim, x.shape[1])
    project = _project_apart if apart else _project
    q, k, v = project(plan, x, stats, batch_tokens, derived, name, fold)
    if changed:
        q, k = _normalise_and_rotate(plan, q, k, inputs)
    if first_token:
        q, x = q[:, :1], _first_rows(x, batch_tokens)
    o = ops.attention(q, k, v, scale=plan.scale, causal=inputs.causal, mask=inputs.mask)
    assert isinstance(o, Tensor)
    del q, k, v
    o = o.view(x.shape[0], plan.heads * plan.head_dim)
    return _normed_linear(
        o, None, plan.attention_norm, plan.proj, derived, f"{name}.proj", fold,
        layer_scale=read(plan.gamma1), residual=x, emit_stats=True,
    )  # fmt: skip


def _project(
    plan: BlockPlan, x: Tensor, stats: Tensor | None, batch_tokens: tuple[int, int], derived: DerivedCache, name: str,
    fold: bool,
) -> list[Tensor]:  # fmt: skip
    """Queries [B, N, H, D], keys and values [B, N, Hk, D], each a view."""
    heads = (plan.heads, plan.heads_k, plan.heads_k)
    if not fold and len(plan.qkv.weights) == 3:
        rows = apply_norm(x, plan.norm1)
        parts = [
            ops.linear(rows, read(weight), read(bias))  # type: ignore[arg-type]
            for weight, bias in zip(plan.qkv.weights, plan.qkv.biases, strict=True)
        ]
        return [part.view(*batch_tokens, h, plan.head_dim) for part, h in zip(parts, heads, strict=True)]  # type: ignore[union-attr]
    packed = _normed_linear(x, stats, plan.norm1, plan.qkv, derived, f"{name}.qkv", fold)
    assert isinstance(packed, Tensor)
    return list(packed.view(*batch_tokens, sum(heads), plan.head_dim).split(heads, dim=2))


def queries_apart(rows: int, queries: int, width: int) -> bool:
    """Whether queries of the first tokens alone are worth two launches more than queries of all rows.

    They are where those of all rows cost more than about 10 us on an H100 (modelled): in ViT-B/16 from batch 38 on.
    """
    return rows * queries * width >= 1 << 32


def one_partial(dtype: torch.dtype, width: int) -> bool:
    """Whether products of few rows take their statistics as one partial: in fp32, the tiles of few rows have no
    registers for the loop over more than 16 of 64 columns each."""
    return dtype == torch.float32 and width > 16 * 64


def stats_of_few(x: Tensor, stats: Tensor) -> Tensor:
    """Statistics of few rows x, as a product takes them: those that are known, or, in a launch more, as one partial."""
    return ops.row_stats(x) if one_partial(x.dtype, x.shape[1]) else stats


def _first_rows(x: Tensor, batch_tokens: tuple[int, int]) -> Tensor:
    """Rows [B * N, D] -> those of the first token of each image, [B, D], a view."""
    return x.view(*batch_tokens, x.shape[1])[:, 0]


def _project_apart(
    plan: BlockPlan, x: Tensor, stats: Tensor | None, batch_tokens: tuple[int, int], derived: DerivedCache, name: str,
    fold: bool,
) -> list[Tensor]:  # fmt: skip
    """Queries [B, 1, H, D] of the first token of each image, keys and values [B, N, Hk, D] of all, each a view."""
    queries, key = plan.heads * plan.head_dim, f"{name}.qkv"
    first = _first_rows(x, batch_tokens)
    q = _normed_linear(first, None, plan.norm1, plan.qkv, derived, key, fold, part=slice(0, queries))
    kv = _normed_linear(x, stats, plan.norm1, plan.qkv, derived, key, fold, part=slice(queries, None))
    q = q.view(batch_tokens[0], 1, plan.heads, plan.head_dim)
    return [q, *kv.view(*batch_tokens, 2 * plan.heads_k, plan.head_dim).split(plan.heads_k, dim=2)]


def _normalise_and_rotate(plan: BlockPlan, q: Tensor, k: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    q_norm, k_norm = plan.q_norm, plan.k_norm
    prefix = 0 if inputs.cos is None else q.shape[1] - inputs.cos.shape[-2]
    if q_norm is None or k_norm is None:
        return ops.qk_rope(q, k, cos=inputs.cos, sin=inputs.sin, interleaved=plan.interleaved, prefix=prefix)
    return ops.qk_rope(
        q, k, norm=q_norm.kind, q_weight=q_norm.weight, q_bias=q_norm.bias, k_weight=k_norm.weight, k_bias=k_norm.bias,
        eps=q_norm.eps, cos=inputs.cos, sin=inputs.sin, interleaved=plan.interleaved, prefix=prefix,
    )  # fmt: skip


def run_mlp(
    plan: MlpPlan, x: Tensor, stats: Tensor, derived: DerivedCache, name: str, fold: bool
) -> tuple[Tensor, Tensor]:
    """Rows x [M, D] and their statistics to those behind the MLP."""
    finish = {"layer_scale": read(plan.gamma2), "residual": x, "emit_stats": True}
    if plan.mlp_norm is not None:
        hidden = _normed_linear(
            x, stats, plan.norm2, plan.fc1, derived, f"{name}.fc1", fold, activation=plan.activation, emit_stats=fold
        )
        rows, hidden_stats = hidden if isinstance(hidden, tuple) else (hidden, None)
        return _normed_linear(rows, hidden_stats, plan.mlp_norm, plan.fc2, derived, f"{name}.fc2", fold, **finish)
    if fold:
        weight, column_sum, bias = _folded(plan.norm2, plan.fc1, derived, f"{name}.fc1")
        norm: dict[str, Any] = {"norm": plan.norm2.kind, "stats": stats, "column_sum": column_sum}
        norm["eps"], rows = plan.norm2.eps, x
    else:
        weight, bias = joined(plan.fc1, derived, f"{name}.fc1")
        norm, rows = {"norm": "none"}, apply_norm(x, plan.norm2)
    fc2 = joined(plan.fc2, derived, f"{name}.fc2")
    return ops.mlp(rows, weight, bias, *fc2, activation=plan.activation, **norm, **finish)  # type: ignore[return-value]


def _normed_linear(
    x: Tensor, stats: Tensor | None, norm: Norm | None, layer: Stack, derived: DerivedCache, key: str, fold: bool,
    part: slice | None = None, **options: Any,
) -> Any:  # fmt: skip
    """ops.linear of norm(x): the norm folded into the layer, in a launch of its own (fold=False), or absent.

    part: which of the layer's outputs, None for all.
    """
    if norm is None or not fold:
        rows = x if norm is None else apply_norm(x, norm)
        return ops.linear(rows, *_part(part, *joined(layer, derived, key)), **options)
    weight, column_sum, bias = _part(part, *_folded(norm, layer, derived, key))
    if stats is None:
        stats = ops.row_stats(x)
    return ops.linear(
        x, weight, bias, norm=norm.kind, stats=stats, column_sum=column_sum, eps=norm.eps, **options
    )  # fmt: skip


def _part(part: slice | None, *parameters: Any) -> tuple[Any, ...]:
    """These rows of parameters that may be None."""
    return parameters if part is None else tuple(None if p is None else p[part] for p in parameters)


def _folded(norm: Norm, layer: Stack, derived: DerivedCache, key: str) -> tuple[Any, ...]:
    """(W', column sums or None, bias') of a layer with the norm in front of it folded in."""
    sources = [*layer.sources(), norm.weight, norm.bias]
    # A traced graph folds anew in every pass: without the work that leaves nothing of the sums.
    sums = torch.compiler.is_compiling()

    def build() -> tuple[Tensor | None, ...]:
        return fold_norm(layer.weight(), layer.bias(), norm.weight, norm.bias, kind=norm.kind, sums=sums)

    return derived.get(key, sources, build)


def joined(layer: Stack, derived: DerivedCache, key: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer: its own tensors, or the parts put together once per change of any of them."""
    weight = layer.weight() if len(layer.weights) == 1 else None
    bias = read(layer.biases[0]) if len(layer.biases) == 1 else None
    if weight is None:
        weight = derived.get(f"{key}.weight", [read(s) for s in layer.weights], lambda: (layer.weight(),))[0]
    if len(layer.biases) > 1 and any(read(source) is not None for source in layer.biases):
        bias = derived.get(f"{key}.bias", layer.sources(), lambda: (layer.bias(),))[0]  # type: ignore[arg-type]
    return weight, bias
