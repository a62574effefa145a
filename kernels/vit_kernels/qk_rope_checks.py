"""What `qk_rope` accepts, and its tables as strided views."""

from __future__ import annotations

import torch

from .checks import (
    check_choice,
    check_eps,
    check_flag,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_vector,
)

MAX_HEAD_DIM = 128

Tables = tuple[torch.Tensor, torch.Tensor]


def check_qk_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    norm: str,
    q_weight: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    prefix: int,
) -> Tables | None:
    """Checks the arguments of `qk_rope`; returns (cos, sin) as views [B, H, N - prefix, D], None without them."""
    check_floating("q", q, 4)
    check_floating("k", k, 4)
    check_same_dtype("k", k, "q", q.dtype)
    batch, tokens, _, width = q.shape
    if not 1 <= width <= MAX_HEAD_DIM:
        raise ValueError(f"q must have a head width from 1 to {MAX_HEAD_DIM}; got shape {tuple(q.shape)}")
    if (*k.shape[:2], k.shape[3]) != (batch, tokens, width):
        raise ValueError(f"k must have shape ({batch}, {tokens}, key heads, {width}) to fit q; got {tuple(k.shape)}")
    check_choice("norm", norm, ("none", "layer", "rms"))
    check_eps(eps)
    vectors = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    for name, vector in vectors.items():
        if norm == "none" and vector is not None:
            raise ValueError(f"{name} belongs to norm='layer' or 'rms'; got it with norm='none'")
        check_vector(name, vector, width, "D, the head width")
    check_flag("interleaved", interleaved)
    if not isinstance(prefix, int) or isinstance(prefix, bool):
        raise TypeError(f"prefix must be an integer; got {prefix!r}")
    if not 0 <= prefix <= tokens:
        raise ValueError(f"prefix must be from 0 to the {tokens} tokens of q; got {prefix}")
    tables = _check_tables(q, k, cos, sin, prefix)
    check_same_device("q", q, {"k": k, **vectors, "cos": cos, "sin": sin})
    return tables


def _check_tables(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, prefix: int
) -> Tables | None:
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        raise ValueError(f"cos and sin must be given together; got only {'sin' if cos is None else 'cos'}")
    batch, tokens, heads, width = q.shape
    if width % 2:
        raise ValueError(f"q must have an even head width where cos and sin are given; got shape {tuple(q.shape)}")
    shape = (batch, max(heads, k.shape[2]), tokens - prefix, width)
    own = heads == k.shape[2]
    return _expanded("cos", cos, shape, own), _expanded("sin", sin, shape, own)


def _expanded(name: str, table: torch.Tensor, shape: tuple[int, int, int, int], own: bool) -> torch.Tensor:
    """The table as a view of the full shape: axes along which it is shared have stride 0. own: heads may have one."""
    check_floating(name, table, getattr(table, "ndim", 0))
    batch, heads, tokens, width = shape
    view = table[(None,) * (4 - table.ndim)] if 2 <= table.ndim <= 4 else None
    fits = view is not None and view.shape[0] in (1, batch) and view.shape[1] in ((1, heads) if own else (1,))
    if view is None or not fits or tuple(view.shape[2:]) != (tokens, width):
        per_head = f"1 or {heads}" if own else "1"
        raise ValueError(
            f"{name} must have shape (N - prefix, D) = ({tokens}, {width}), ({per_head}, {tokens}, {width}) or "
            f"(1 or {batch}, {per_head}, {tokens}, {width}); got {tuple(table.shape)}"
        )
    return view.expand(shape)
