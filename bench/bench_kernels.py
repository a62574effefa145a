"""Times of the launchers on a GPU: `pytest bench/bench_kernels.py`.

Skipped without a GPU: neither the interpreter nor a compiler says how fast a kernel is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vit_bench.plan import Call, model_calls
from vit_engine.config import ViTConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times need an NVIDIA GPU; PyTorch finds none")

MODEL, BATCHES, DTYPES = "vit_base_patch16_224", (1, 64), ("float16", "bfloat16")


def _calls() -> list[Any]:
    """One parameter per launcher call of the model; the calls themselves are made on the GPU inside the test."""
    labels = [(call.kernel, call.label) for call in model_calls(ViTConfig.preset(MODEL), 1, torch.float16)]
    return [
        pytest.param(index, batch, dtype, id=f"{kernel}, {label}-b{batch}-{dtype}")
        for index, (kernel, label) in enumerate(labels)
        for batch in BATCHES
        for dtype in DTYPES
    ]


def _call(index: int, batch: int, dtype: str) -> Call:
    calls = list(model_calls(ViTConfig.preset(MODEL), batch, getattr(torch, dtype), device="cuda"))
    return calls[index]


@pytest.mark.parametrize(("index", "batch", "dtype"), _calls())
def test_time(benchmark: Callable[..., Any], index: int, batch: int, dtype: str) -> None:
    call = _call(index, batch, dtype)

    def run() -> None:
        call.run()
        torch.cuda.synchronize()

    run()  # compiles, which is not what is timed
    benchmark(run)
