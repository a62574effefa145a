"""What a CUDA graph of a pass is kept by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["described", "key_of"]


def key_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple:
    """What has to be alike for a graph to serve: the arguments but for the values in tensors, and what PyTorch's own
    operators choose their kernels by."""
    given = tuple((name, *_kind(value)) for name, value in (*enumerate(args), *kwargs.items()))
    backends = torch.backends
    chosen = (
        torch.get_float32_matmul_precision(),
        backends.cudnn.allow_tf32,
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )
    return given, chosen


def _kind(value: Any) -> tuple:
    """The class of an argument and what is said of it: of a tensor shape, strides, dtype and device."""
    if isinstance(value, Tensor):
        return Tensor, (tuple(value.shape), value.stride(), value.dtype, value.device)
    return type(value), value


def described(key: tuple) -> str:
    """The arguments of a key as text, such as "[8, 3, 224, 224] bfloat16"."""
    words = []
    for name, kind, what in key[0]:
        text = f"{list(what[0])} {str(what[2]).removeprefix('torch.')}" if kind is Tensor else repr(what)
        words.append(text if isinstance(name, int) else f"{name}={text}")
    return ", ".join(words)
