"""The kernels as PyTorch custom operators: FakeTensor, torch.compile and torch.export see each launch as one op.

The functions below take the arguments of the launchers of the same name in `vit_kernels`, whose docstrings give
formula, shapes, dtypes and errors. An argument of another Python type than the launcher's (a list for a tensor) is
refused by PyTorch itself, with a RuntimeError that names it. They are for inference: asking for a gradient through one
of them, backward or in forward mode, raises NotImplementedError.
"""

# No `from __future__ import annotations` here: torch.library reads the schemas from the annotations themselves.
# An operator's schema cannot say "one result or two", so the ones that may emit row statistics return a list.

from typing import Any

import torch
from torch import Tensor

import vit_kernels

from .tangents import without_tangents

__all__ = ["attention", "attention_packed", "layer_norm", "linear", "mlp", "patch_embed", "qk_rope", "row_stats"]

Result = Tensor | tuple[Tensor, Tensor]


def _as_list(result: Result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _as_result(tensors: list[Tensor]) -> Result:
    return tensors[0] if len(tensors) == 1 else (tensors[0], tensors[1])


def _emitted_stats(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty((2, (columns + 63) // 64, rows), dtype=torch.float32)


@torch.library.custom_op("vit_engine::patch_embed", mutates_args=())
def _patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor | None,
    position: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    emit_stats: bool,
    tf32: bool,
) -> list[Tensor]:
    return _as_list(
        vit_kernels.patch_embed(
            images, weight, bias, prefix, position, mean=mean, std=std, emit_stats=emit_stats, tf32=tf32
        )
    )


@_patch_embed.register_fake
def _(images, weight, bias, prefix, position, mean, std, emit_stats, tf32):
    batch, _, height, width = images.shape
    features, _, ph, pw = weight.shape
    tokens = (height // ph) * (width // pw) + (0 if prefix is None else prefix.shape[0])
    out = weight.new_empty((batch, tokens, features))
    return [out, _emitted_stats(out, batch * tokens, features)] if emit_stats else [out]


@torch.library.custom_op("vit_engine::qk_rope", mutates_args=())
def _qk_rope(
    q: Tensor,
    k: Tensor,
    norm: str,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    prefix: int,
) -> list[Tensor]:
    return _as_list(
        vit_kernels.qk_rope(
            q, k, norm=norm, q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias, eps=eps, cos=cos,
            sin=sin, interleaved=interleaved, prefix=prefix,
        )
    )  # fmt: skip


@_qk_rope.register_fake
def _(q, k, norm, q_weight, q_bias, k_weight, k_bias, eps, cos, sin, interleaved, prefix):
    return [q.new_empty(q.shape), k.new_empty(k.shape)]


@torch.library.custom_op("vit_engine::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    return_lse: bool,
    tf32: bool,
) -> list[Tensor]:
    return _as_list(
        vit_kernels.attention(
            q, k, v, scale=scale, causal=causal, key_lengths=key_lengths, mask=mask, return_lse=return_lse, tf32=tf32
        )
    )


@_attention.register_fake
def _(q, k, v, scale, causal, key_lengths, mask, return_lse, tf32):
    batch, queries, heads, _ = q.shape
    out = q.new_empty(q.shape)
    return [out, q.new_empty((batch, heads, queries), dtype=torch.float32)] if return_lse else [out]


@torch.library.custom_op("vit_engine::attention_packed", mutates_args=())
def _attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None, causal: bool, tf32: bool
) -> Tensor:
    return vit_kernels.attention_packed(q, k, v, cu_seqlens, max_seqlen, scale=scale, causal=causal, tf32=tf32)


@_attention_packed.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, scale, causal, tf32):
    return q.new_empty(q.shape)


@torch.library.custom_op("vit_engine::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: str,
    stats: Tensor | None,
    column_sum: Tensor | None,
    eps: float,
    activation: str,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    emit_stats: bool,
    tf32: bool,
) -> list[Tensor]:
    return _as_list(
        vit_kernels.linear(
            x, weight, bias, norm=norm, stats=stats, column_sum=column_sum, eps=eps, activation=activation,
            layer_scale=layer_scale, residual=residual, emit_stats=emit_stats, tf32=tf32,
        )
    )  # fmt: skip


@_linear.register_fake
def _(x, weight, bias, norm, stats, column_sum, eps, activation, layer_scale, residual, emit_stats, tf32):
    columns = weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]
    out = x.new_empty((x.shape[0], columns))
    return [out, _emitted_stats(out, x.shape[0], columns)] if emit_stats else [out]


@torch.library.custom_op("vit_engine::mlp", mutates_args=())
def _mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    norm: str,
    stats: Tensor | None,
    column_sum: Tensor | None,
    eps: float,
    activation: str,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    emit_stats: bool,
    fused: bool | None,
    tf32: bool,
) -> list[Tensor]:
    return _as_list(
        vit_kernels.mlp(
            x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm=norm, stats=stats, column_sum=column_sum, eps=eps,
            activation=activation, layer_scale=layer_scale, residual=residual, emit_stats=emit_stats, fused=fused,
            tf32=tf32,
        )
    )  # fmt: skip


@_mlp.register_fake
def _(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm, stats, column_sum, eps, activation, layer_scale, residual,
    emit_stats, fused, tf32,
):  # fmt: skip
    out = x.new_empty(x.shape)
    return [out, _emitted_stats(out, x.shape[0], x.shape[1])] if emit_stats else [out]


@torch.library.custom_op("vit_engine::row_stats", mutates_args=())
def _row_stats(x: Tensor) -> Tensor:
    return vit_kernels.row_stats(x)


@_row_stats.register_fake
def _(x):
    return x.new_empty((2, 1, x.shape[0]), dtype=torch.float32)


@torch.library.custom_op("vit_engine::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    return vit_kernels.layer_norm(x, weight, bias, eps=eps, kind=kind)


@_layer_norm.register_fake
def _(x, weight, bias, eps, kind):
    return x.new_empty(x.shape)


def _refuse_gradient(name: str) -> Any:
    def backward(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError(
            f"vit_engine.ops.{name} has no backward pass: run the forward pass under torch.no_grad() or "
            "torch.inference_mode(), or train with the 'torch' backend"
        )

    return backward


for _name, _op in {
    "patch_embed": _patch_embed,
    "qk_rope": _qk_rope,
    "attention": _attention,
    "attention_packed": _attention_packed,
    "linear": _linear,
    "mlp": _mlp,
    "row_stats": _row_stats,
    "layer_norm": _layer_norm,
}.items():
    _op.register_autograd(_refuse_gradient(_name))


@without_tangents
def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    emit_stats: bool = False,
    tf32: bool = False,
) -> Result:
    """`vit_kernels.patch_embed` as one operator."""
    return _as_result(_patch_embed(images, weight, bias, prefix, position, mean, std, emit_stats, tf32))


@without_tangents
def qk_rope(
    q: Tensor,
    k: Tensor,
    *,
    norm: str = "none",
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    prefix: int = 0,
) -> tuple[Tensor, Tensor]:
    """`vit_kernels.qk_rope` as one operator."""
    q, k = _qk_rope(q, k, norm, q_weight, q_bias, k_weight, k_bias, eps, cos, sin, interleaved, prefix)
    return q, k


@without_tangents
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
    tf32: bool = False,
) -> Result:
    """`vit_kernels.attention` as one operator."""
    return _as_result(_attention(q, k, v, scale, causal, key_lengths, mask, return_lse, tf32))


@without_tangents
def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    tf32: bool = False,
) -> Tensor:
    """`vit_kernels.attention_packed` as one operator."""
    return _attention_packed(q, k, v, cu_seqlens, max_seqlen, scale, causal, tf32)


@without_tangents
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "none",
    stats: Tensor | None = None,
    column_sum: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    emit_stats: bool = False,
    tf32: bool = False,
) -> Result:
    """`vit_kernels.linear` as one operator."""
    return _as_result(
        _linear(x, weight, bias, norm, stats, column_sum, eps, activation, layer_scale, residual, emit_stats, tf32)
    )


@without_tangents
def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None = None,
    *,
    norm: str = "layer",
    stats: Tensor | None = None,
    column_sum: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "gelu",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    emit_stats: bool = False,
    fused: bool | None = None,
    tf32: bool = False,
) -> Result:
    """`vit_kernels.mlp` as one operator."""
    return _as_result(
        _mlp(
            x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm, stats, column_sum, eps, activation, layer_scale,
            residual, emit_stats, fused, tf32,
        )
    )  # fmt: skip


@without_tangents
def row_stats(x: Tensor) -> Tensor:
    """`vit_kernels.row_stats` as one operator."""
    return _row_stats(x)


@without_tangents
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6, kind: str = "layer"
) -> Tensor:
    """`vit_kernels.layer_norm` as one operator."""
    return _layer_norm(x, weight, bias, eps, kind)
