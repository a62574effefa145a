"""What eager PyTorch runs in place of each launcher: the library's operators on unfolded weights, as modules call them.

A problem is a case of `vit_bench.cases` with its inputs, drawn for the reference: weights as a model stores them, norms
apart. cuBLAS does the products, everything else is a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vit_bench.timed.contenders import KERNEL_COMPILE_MODES, CannotRunError, Contender, Run, compiled

Tensor = torch.Tensor


@dataclass(frozen=True)
class Operation:
    """inputs: tensors by the reference's argument names; options: those that launcher and reference share."""

    kernel: str
    inputs: dict[str, Any]
    options: dict[str, Any]


def _normalise(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if kind == "none":
        return x
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "swiglu":
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda x: x,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "silu": F.silu,
    }
    return known[kind](x)


def _added(y: Tensor, layer_scale: Tensor | None, residual: Tensor | None) -> Tensor:
    y = y if layer_scale is None else y * layer_scale
    return y if residual is None else residual + y


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: str = "none", norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, eps: float = 1e-6, activation: str = "none", layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    h = F.linear(_normalise(x, norm, norm_weight, norm_bias, eps), weight, bias)
    return _added(_activate(h, activation), layer_scale, residual)


def _mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None = None, *,
    norm: str = "layer", norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, eps: float = 1e-6,
    activation: str = "gelu", layer_scale: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    h = F.linear(_normalise(x, norm, norm_weight, norm_bias, eps), fc1_weight, fc1_bias)
    return _added(F.linear(_activate(h, activation), fc2_weight, fc2_bias), layer_scale, residual)


def _patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, prefix: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The stem of timm's ViT: a convolution, and tokens and positions added to it."""
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if prefix is not None and position is not None and position.shape[0] == tokens.shape[1]:
        tokens, position = tokens + position, None
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens if position is None else tokens + position


def _layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6, kind: str = "layer"
) -> Tensor:
    return _normalise(x, kind, weight, bias, eps)


_FORMULAS: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "mlp": _mlp,
    "patch_embed": _patch_embed,
    "layer_norm": _layer_norm,
}


def eager(operation: Operation) -> Run:
    """The operators of a launcher; CannotRunError for one that has none here."""
    if operation.kernel not in _FORMULAS:
        raise CannotRunError(f"no formula in PyTorch's operators for {operation.kernel}")
    formula, inputs, options = _FORMULAS[operation.kernel], operation.inputs, operation.options
    return lambda: formula(**inputs, **options)


EAGER = Contender("PyTorch eager", eager, settings={"products": "cuBLAS on a GPU", "else": "an operator each"})
OPERATORS = (
    EAGER,
    *(
        Contender(f"torch.compile, {mode}", compiled(eager, mode), settings={"mode": mode}, devices=("cuda",))
        for mode in KERNEL_COMPILE_MODES
    ),
)
