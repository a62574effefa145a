"""What the strict interpreter refuses, shown on kernels with one fault each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from .strict import round_to_tf32

pytestmark = pytest.mark.interpreted_only


@triton.jit
def _copy(x_ptr, y_ptr, before, reads, writes, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if OTHER:
        x = tl.load(x_ptr + at - before, mask=at < reads, other=7.0)
    else:
        x = tl.load(x_ptr + at - before, mask=at < reads)
    tl.store(y_ptr + at, x, mask=at < writes)


@triton.jit
def _square(x_ptr, y_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x) if PRECISION == "default" else tl.dot(x, x, input_precision=PRECISION))


# As the tests launch them, with plain numbers for constants: pyright takes Triton's annotations at their word.
copy: Any = _copy
square: Any = _square


def copied(reads: int, writes: int, *, before: int = 0, other: bool = True) -> torch.Tensor:
    y = torch.zeros(8)
    copy[(1,)](torch.arange(8.0), y, before, reads, writes, BLOCK=16, OTHER=other)
    return y


def test_what_lies_inside_is_read_and_written():
    assert copied(5, 8).tolist() == [0, 1, 2, 3, 4, 7, 7, 7]


@pytest.mark.parametrize(
    ("before", "reads", "writes", "what"),
    [(0, 9, 8, "load"), (0, 16, 8, "load"), (1, 8, 8, "load"), (0, 8, 9, "store")],
)
def test_one_element_outside_is_refused(before, reads, writes, what):
    with pytest.raises(Exception, match=f"a {what} outside of every tensor"):
        copied(reads, writes, before=before)


def test_masked_elements_without_a_value_are_undefined():
    y = copied(5, 8, other=False)
    assert y[:5].tolist() == [0, 1, 2, 3, 4]
    assert y[5:].isnan().all()


@pytest.mark.parametrize(("precision", "rounded"), [("ieee", False), ("tf32", True), ("default", True)])
def test_products_round_to_tf32_unless_they_say_ieee(precision, rounded):
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.empty_like(x)
    square[(1,)](x, y, N=16, PRECISION=precision)
    error = float((y.double() - x.double() @ x.double()).norm() / y.norm())
    assert (1e-5 < error < 1e-3) if rounded else error < 1e-6


def test_tf32_has_ten_bits():
    step, half = 2.0**-10, 2.0**-11
    x = torch.tensor([1.0, 1.0 + step, 1.0 + half, 1.0 + half + 2.0**-20, -3.3e38, float("inf"), float("nan")])
    found = round_to_tf32(x.numpy()).tolist()
    assert found[:4] == [1.0, 1.0 + step, 1.0, 1.0 + step]
    assert found[4] == pytest.approx(-3.3e38, rel=1e-3) and found[5] == float("inf") and found[6] != found[6]
