"""Attention alone, by our kernel and by every other library that is installed.

A problem is (q, k, v), each [B, N, H, D]: views of one packed projection, as a model has them. All results are
[B, N, H, D]. A library that wants heads first gets transposed views, and whatever that costs is part of its time, as in
a model.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import vit_kernels
from vit_bench.results import OURS
from vit_bench.timed.contenders import Contender, Run

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def _ours(problem: Problem) -> Run:
    return lambda: vit_kernels.attention(*problem)  # type: ignore[return-value]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _default(problem: Problem) -> Run:
    return lambda: _sdpa(*problem)


def _with(backend: SDPBackend, problem: Problem) -> Run:
    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return _sdpa(*problem)

    return run


def _flash_attn(problem: Problem) -> Run:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    return lambda: flash_attn_func(*problem)


def _xformers(problem: Problem) -> Run:
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    return lambda: memory_efficient_attention(*problem)


_GPU = ("cuda",)
ATTENTIONS = (
    Contender(OURS, _ours, ("vit-engine", "triton"), {"layout": "packed views, no copy"}, _GPU),
    Contender("PyTorch SDPA", _default, settings={"backend": "PyTorch's choice"}),
    *(
        Contender(f"PyTorch SDPA, {name}", functools.partial(_with, backend), settings={"backend": name}, devices=_GPU)
        for name, backend in BACKENDS.items()
    ),
    Contender("flash-attn", _flash_attn, ("flash-attn", "torch"), {"function": "flash_attn_func"}, _GPU),
    Contender("xFormers", _xformers, ("xformers", "torch"), {"function": "memory_efficient_attention"}, _GPU),
)
