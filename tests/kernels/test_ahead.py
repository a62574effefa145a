"""What is asked of the L2 cache ahead of a launch's turn: all of the weights, once, and nothing else."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
import triton

from vit_bench import sanitizer
from vit_kernels.ahead import fetch_ahead, fetchable

from ..rung import DEVICE, RUNG


@triton.jit
def asking_kernel(ptr, rows, columns):
    fetch_ahead(ptr, rows, columns, OVERLAP=True)  # type: ignore[reportArgumentType]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(address, bytes left of the share) of each round of 128 threads, as the sanitizer meets them."""
    ops: Any = importlib.import_module("ttsem.ops")
    found: list[tuple[int, int]] = []

    def note(address: Any, left: Any) -> list[np.ndarray]:
        found.append((int(address), int(left)))
        return [np.zeros((), np.int32)]

    monkeypatch.setitem(ops.PTX_FRAGMENTS, ops._norm_asm(sanitizer.FETCH), (note, None))
    return found


@pytest.mark.sanitize
@pytest.mark.skipif(RUNG != "sanitized", reason="only the sanitizer says what the assembly was given")
@pytest.mark.parametrize(
    ("shape", "programs", "bytes_of_each"),
    [
        ((64, 96), 2, [6144, 6144]),
        ((8, 40), 3, [256, 256, 128]),  # 640 bytes: 5 lines of 128
        ((1, 24), 3, [48, 0, 0]),
        ((600, 128), 1, [128 * 1024]),  # of 150 KiB
    ],
)
def test_each_program_asks_for_its_share(
    shape: tuple[int, int], programs: int, bytes_of_each: list[int], asked: list[tuple[int, int]]
) -> None:
    weight = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
    kernel: Any = asking_kernel
    kernel[(programs,)](weight, *shape, num_warps=4)
    begin, pieces = asked[0][0], []
    for share in bytes_of_each:
        pieces += [(begin + start, share - start) for start in range(0, share, 128 * 32)]
        begin += share
    assert asked == pieces


def test_weights_can_be_asked_for_in_whole_pieces_of_16_bytes() -> None:
    weight = torch.zeros(9, 40, dtype=torch.float16)
    assert fetchable(weight) is weight
    assert fetchable(weight[1:]) is not None and fetchable(weight.view(-1)[8:]) is not None
    assert fetchable(weight.T) is None and fetchable(weight[:, :32]) is None
    assert fetchable(weight.view(-1)[1:]) is None, "begins between two pieces"
    assert fetchable(weight[:, :20].contiguous().view(-1)[:20]) is None, "ends in the middle of one"
