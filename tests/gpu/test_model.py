"""Whole forward passes on the GPU: captured in a graph, without waiting for the GPU, in memory that does not grow."""

from __future__ import annotations

import pytest
import torch

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
