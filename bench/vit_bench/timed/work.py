"""FLOP and bytes of a case: what has to be computed and moved, whoever does it.

By the rules of `vit_bench.roofline`: products only, a multiply-add being two; every operand and result of a launcher
call once. A forward pass is the sum of its calls, so what one call writes and the next reads counts twice. Of a model
whose head reads the class token alone, the last block counts for that token only, whoever computes more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vit_bench.recording import recording
from vit_bench.roofline import attention_flops, gemm_flops, mlp_flops, operand_bytes
from vit_bench.timed.shapes import Case
from vit_bench.tuning_problems import LauncherCall, flattened, nothing_launched, taken_apart
from vit_kernels.device import H100


def launcher_calls(case: Case, dtype: torch.dtype) -> list[tuple[LauncherCall, int]]:
    """The launcher calls of a case with their arguments by name, and how often a forward pass makes each."""
    calls = [(taken_apart(call.kernel, call.label, *flattened(call.run)), call.times) for call in case.calls(dtype)]
    return calls if case.suite == "model" else [(call, 1) for call, _ in calls]


def call_flops(kernel: str, arguments: Mapping[str, Any]) -> int:
    """FLOP of one launcher call, from its arguments. Raises KeyError for a launcher without a formula here."""
    a = arguments
    if kernel == "attention":
        batch, queries, heads, width = a["q"].shape
        return attention_flops(batch, heads, queries, a["k"].shape[1], width)
    if kernel == "patch_embed":
        batch, channels, height, width = a["images"].shape
        features, _, patch_h, patch_w = a["weight"].shape
        patches = batch * (height // patch_h) * (width // patch_w)
        return gemm_flops(patches, features, channels * patch_h * patch_w)
    if kernel == "linear":
        return gemm_flops(a["x"].shape[0], *a["weight"].shape)
    if kernel == "mlp":
        gated = a["activation"] == "swiglu"
        hidden = a["fc2_weight"].shape[1]
        rows, width = a["x"].shape
        return mlp_flops(rows, width, hidden, gated=gated)
    return {"layer_norm": 0, "row_stats": 0, "qk_rope": 0}[kernel]


def _results(call: LauncherCall) -> list[torch.Tensor]:
    import vit_kernels

    result = getattr(vit_kernels, call.kernel)(**call.arguments)
    return list(result) if isinstance(result, tuple) else [result]


def work(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """(FLOP, bytes) of one call of a case. Nothing is executed, compiled or allocated."""
    flops = nbytes = 0
    # Which GPU it is does not matter: results have the same shapes everywhere.
    with recording(H100, torch_device="meta"), nothing_launched():
        for call, times in launcher_calls(case, dtype):
            given = [value for value in call.arguments.values() if isinstance(value, torch.Tensor)]
            flops += times * call_flops(call.kernel, call.arguments)
            nbytes += times * operand_bytes([*given, *_results(call)])
    return flops, nbytes
