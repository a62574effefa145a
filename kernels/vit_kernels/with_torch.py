"""The launchers' work by PyTorch's own operators (cuBLAS, fused attention), where a tuned file says they are faster.

Same formulas, arguments and results as the launchers of the same names, which have checked the arguments. They work on
folded weights: with h the normalised row without gamma and beta, norm(x) W^T + b = h W'^T + d (`folding.py`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .launch import by_torch

_settings = threading.Lock()


@contextlib.contextmanager
def _ieee(dtype: torch.dtype) -> Iterator[None]:
    """fp32 products are not rounded to less, as none is in a kernel, whatever this process lets cuBLAS do."""
    cublas: Any = torch.backends.cuda.matmul
    if dtype != torch.float32 or cublas.fp32_precision in ("none", "ieee"):
        yield
        return
    # The setting is the whole process's: threads that change it and put it back take turns.
    with _settings:
        before, cublas.fp32_precision = cublas.fp32_precision, "ieee"
        try:
            yield
        finally:
            cublas.fp32_precision = before


@contextlib.contextmanager
def _as_given(x: torch.Tensor) -> Iterator[None]:
    """Operators compute in the dtypes of their arguments, without gradients, as a kernel does."""
    # A tensor without values has no autocast to switch off.
    own = contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
    with torch.no_grad(), own, _ieee(x.dtype):
        yield


def _launcher(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Notes on a tape that launches are not all that happens, and shields the operators from the caller's modes."""

    @functools.wraps(compute)
    def run(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        by_torch(compute.__name__)
        with _as_given(x):
            return compute(x, *arguments, **options)

    return run


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "swiglu": _swiglu,
}


def _normalise(
    x: torch.Tensor, kind: str, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


@_launcher
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    norm: str,
    eps: float,
    activation: str,
    layer_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """As `vit_kernels.linear` without row statistics: neither those of x, the norms take their own, nor those of y."""
    h = x if norm == "none" else _normalise(x, norm, None, None, eps)
    h = F.linear(h, weight, None if bias is None else bias.to(x.dtype))
    h = _ACTIVATIONS[activation](h)
    if layer_scale is not None:
        scale = layer_scale.to(x.dtype)
        h = h * scale if residual is None else torch.addcmul(residual, h, scale)
    elif residual is not None:
        h = residual + h
    return h.contiguous()


@_launcher
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, *, eps: float, kind: str
) -> torch.Tensor:
    """As `vit_kernels.layer_norm`."""
    gamma, beta = (None if v is None else v.to(x.dtype) for v in (weight, bias))
    return _normalise(x, kind, gamma, beta, eps).contiguous()


def attends(queries: int, keys: int, *, causal: bool, lengths: bool, mask: str, lse: bool) -> bool:
    """Whether scaled_dot_product_attention computes what `vit_kernels.attention` promises.

    It has no key lengths and no log-sum, its causal diagonal begins at the top left, and a query that a mask leaves no
    key is NaN in it.
    """
    return not lengths and mask == "none" and not lse and (not causal or queries == keys)


@_launcher
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, causal: bool) -> torch.Tensor:
    """As `vit_kernels.attention`, for what `attends` allows."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    grouped = q.shape[2] != k.shape[2]
    o = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2).contiguous()
