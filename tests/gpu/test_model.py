"""Whole forward passes on the GPU: captured in a graph, without waiting for the GPU, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vit_engine
from vit_bench.draw import Draw
from vit_bench.full.capture import check_engine_graphs, check_replay
from vit_bench.whole_model import redraw
from vit_engine import ViT, ViTConfig

pytestmark = pytest.mark.gpu

MODEL, BATCH = "vit_tiny_patch16_224", 2
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def _model(dtype: torch.dtype) -> ViT:
    model = ViT(ViTConfig.preset(MODEL)).eval()
    redraw(model)
    return model.to(dtype).cuda()


def _images(dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return Draw(dtype, "cuda", seed).normal(BATCH, 3, 224, 224)


@every_dtype
def test_a_captured_pass_replays_bit_for_bit(dtype: torch.dtype) -> None:
    figures = check_replay(_model(dtype), _images(dtype, 1), _images(dtype, 2))
    assert figures["allocations_in_replay"] == 0 and figures["values_compared"] == 3 * BATCH * 1000


@every_dtype
def test_the_engines_graphs_replay_bit_for_bit(dtype: torch.dtype) -> None:
    assert check_engine_graphs(_model(dtype), _images(dtype, 1), _images(dtype, 2))["replays"] == 20


@every_dtype
def test_a_forward_pass_never_waits_for_the_gpu(dtype: torch.dtype) -> None:
    model, images = _model(dtype), _images(dtype)
    with torch.inference_mode():
        model(images)  # compiles, and folds the weights
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                logits = model(images)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert torch.isfinite(logits).all()


def test_waiting_for_the_gpu_would_have_been_noticed() -> None:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _transformers_model() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    model = transformers.Dinov2Model(transformers.Dinov2Config(num_hidden_layers=3)).eval()
    redraw(model)
    return vit_engine.accelerate(model.bfloat16().cuda())


@pytest.mark.parametrize("build", [lambda: _model(torch.bfloat16), _transformers_model], ids=["ViT", "transformers"])
def test_repeated_passes_are_the_first_bit_for_bit_and_take_no_more_memory(build: Callable[[], Any]) -> None:
    """The second pass is noted, later ones are repeated."""
    model, inputs = build(), [_images(torch.bfloat16, seed) for seed in range(2)]
    first: dict[int, torch.Tensor] = {}
    peaks = []
    with torch.inference_mode():
        build()(inputs[0])  # compiles
        for number in range(8):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = model(inputs[number % 2])
            peaks.append(torch.cuda.max_memory_allocated() - before)
            result = result if isinstance(result, torch.Tensor) else result.last_hidden_state
            assert torch.equal(result, first.setdefault(number % 2, result))
    assert peaks[1] <= peaks[0] and max(peaks[2:]) <= peaks[1]


def test_memory_does_not_grow_over_forward_passes() -> None:
    model, images = _model(torch.bfloat16), _images(torch.bfloat16)

    def used() -> tuple[int, int]:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    with torch.inference_mode():
        for _ in range(5):
            model(images)
        settled = used()
        for _ in range(50):
            model(images)
        assert used() == settled
