"""Launches go to the tensors' own device and to the current stream, whatever else is current."""

from __future__ import annotations

import pytest
import torch

import vit_kernels
from vit_bench import tolerance
from vit_bench.draw import Draw
from vit_bench.whole_model import SMALL, redraw
from vit_engine import ViT
from vit_kernels import reference

pytestmark = pytest.mark.gpu

CYCLES = 200_000_000  # about a tenth of a second


def _inputs(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    draw = Draw(torch.float16, device)
    return draw.normal(64, 128), draw.weight(96, 128)


def _judge(ours: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    x, weight = x.cpu(), weight.cpu()
    truth = reference.linear(x.double(), weight.double())
    tolerance.check(ours.cpu(), reference.linear(x, weight), truth)


def test_a_launch_waits_for_its_stream() -> None:
    """The input is filled late, on a side stream: a launch on any other stream would read zeros."""
    x, weight = _inputs("cuda")
    vit_kernels.linear(x, weight)  # compiled and loaded, so that nothing waits for the GPU below
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        late.copy_(x)
        y = vit_kernels.linear(late, weight)
    side.synchronize()
    assert isinstance(y, torch.Tensor)
    _judge(y, x, weight)


def test_a_model_waits_for_its_stream() -> None:
    model = ViT(SMALL).eval()
    redraw(model)
    model = model.cuda()
    images = Draw(torch.float32, "cuda", 1).normal(2, 3, *SMALL.image_hw)
    with torch.inference_mode():
        for _ in range(3):
            expected = model(images)
        late = torch.zeros_like(images)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(CYCLES)
            late.copy_(images)
            logits = model(late)
        side.synchronize()
    assert torch.equal(logits, expected)


def test_tensors_on_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs; there is {torch.cuda.device_count()}")
    x, weight = _inputs("cuda:1")
    with torch.cuda.device(0):
        y = vit_kernels.linear(x, weight)
        assert torch.cuda.current_device() == 0
    assert isinstance(y, torch.Tensor) and y.device == x.device
    _judge(y, x, weight)
