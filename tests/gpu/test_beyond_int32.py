"""Tensors of more than 2^31 elements: the last rows come out as they do in a small problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vit_kernels
from vit_bench.draw import Draw

pytestmark = pytest.mark.gpu

DEVICE, BEYOND, DTYPE = "cuda", 2**31, torch.bfloat16
GIB = 2**30

Problem = tuple[tuple[int, ...], Callable[[torch.Tensor], Any], float]


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def _problem(kernel: str) -> Problem:
    """(shape of one row of the input, launch on rows [rows, *shape], elements written per element read)."""
    draw = Draw(DTYPE, DEVICE)
    gamma, bias = draw.gamma(64), draw.bias(64)
    if kernel == "row_stats":
        return (64,), lambda x: vit_kernels.row_stats(x).movedim(-1, 0), 0.1
    if kernel == "layer_norm":
        return (64,), lambda x: vit_kernels.layer_norm(x, gamma, bias), 1.0
    if kernel == "linear":
        weight = draw.weight(64, 64)
        return (64,), lambda x: vit_kernels.linear(x, weight, bias), 1.0
    if kernel == "mlp":
        fc1, fc2, hidden = draw.weight(128, 64), draw.weight(64, 128), draw.bias(128)
        return (64,), lambda x: vit_kernels.mlp(x, fc1, hidden, fc2, bias, norm="none", residual=x), 1.0
    if kernel == "attention":
        return (197, 3, 4, 64), lambda x: vit_kernels.attention(*x.unbind(2)), 0.4
    if kernel == "qk_rope":
        return (50, 2, 2, 64), lambda x: vit_kernels.qk_rope(*x.unbind(2), norm="rms"), 1.0
    weight, position = draw.weight(64, 3, 16, 16), draw.normal(16, 64)
    return (3, 64, 64), lambda x: vit_kernels.patch_embed(x, weight, bias, None, position), 0.1


@pytest.mark.parametrize("kernel", ["row_stats", "layer_norm", "linear", "mlp", "attention", "patch_embed", "qk_rope"])
def test_the_last_rows(kernel: str) -> None:
    shape, launch, written = _problem(kernel)
    rows, tail = BEYOND // torch.Size(shape).numel() + 3, 3
    # The result once, and once more for an MLP's intermediate result or a second pass.
    needed = int((1 + 3 * written) * rows * torch.Size(shape).numel() * DTYPE.itemsize) + GIB
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / GIB:.0f} GiB of free GPU memory; {free / GIB:.1f} are free")
    last = Draw(DTYPE, DEVICE, 1).normal(tail, *shape)
    x = torch.zeros(rows, *shape, dtype=DTYPE, device=DEVICE)
    x[-tail:] = last
    ours = _first(launch(x))[-tail:]
    expected = _first(launch(last))
    assert ours.shape == expected.shape and bool(expected.float().abs().sum() > 1)
    # A large problem may get another tile, which sums in another order.
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)
