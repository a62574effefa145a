"""fold_norm: the folded weights, and the identity they are for."""

from __future__ import annotations

import functools

import pytest
import torch

from vit_bench.tolerance import ulp
from vit_kernels import fold_norm, reference

from ..rung import DEVICE
from ..weights import Draw

# No kernel is launched here, so every dtype is tested on every rung.
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@every_dtype
def test_pieces(dtype):
    draw = Draw(dtype, seed=1)
    weight, bias, gamma, beta = draw.weight(50, 192), draw.bias(50), draw.gamma(192), draw.bias(192)
    folded, column_sum, shift = fold_norm(weight, bias, gamma, beta)
    assert (folded.dtype, column_sum.dtype, shift.dtype) == (dtype, torch.float32, torch.float32)
    scaled = weight.double() * gamma.double()
    centred = scaled - scaled.mean(1, keepdim=True)
    # In float32 on the way, and then rounded once.
    assert ((folded.double() - centred).abs() <= 0.51 * ulp(centred, dtype) + 1e-7).all()
    torch.testing.assert_close(column_sum.double(), folded.double().sum(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(fold_norm(weight, bias, gamma, kind="rms")[0], scaled.to(dtype))
    torch.testing.assert_close(shift.double(), weight.double() @ beta.double() + bias.double(), rtol=1e-5, atol=1e-6)


def test_column_sum_is_of_the_rounded_weight():
    """The sum of the unrounded weights, which is nothing, would leave a part of the row's offset behind."""
    draw = Draw(torch.bfloat16, seed=2)
    weight, gamma = draw.weight(50, 192), draw.gamma(192)
    folded, column_sum, _ = fold_norm(weight, None, gamma)
    rounded, scaled = folded.double().sum(1), (weight.double() * gamma.double()).sum(1)
    assert (column_sum.double() - rounded).abs().max() < 1e-5
    assert 1e-3 < rounded.abs().max() < 0.01 * scaled.abs().max()


@pytest.mark.parametrize(
    ("dtype", "k"), [(torch.float16, 64), (torch.float16, 1024), (torch.bfloat16, 64), (torch.bfloat16, 4096)], ids=str
)
def test_rows_of_weights_that_sum_to_nothing(dtype, k):
    draw = Draw(dtype, seed=6)
    weight, gamma, beta = draw.weight(200, k), draw.gamma(k), draw.bias(k)
    nearest, column_sum, shift = fold_norm(weight, None, gamma, beta)
    folded, nothing, same_shift = fold_norm(weight, None, gamma, beta, sums=False)
    assert nothing is None and torch.equal(shift, same_shift)
    last_bit = torch.finfo(dtype).eps * nearest.double().norm(dim=1)
    assert (folded.double().sum(1).abs() < 0.02 * last_bit).all()
    assert column_sum.abs().median() > 0.05 * last_bit.median(), "the nearest would do"
    scaled = weight.double() * gamma.double()
    centred = scaled - scaled.mean(1, keepdim=True)
    moved, largest = folded != nearest, torch.maximum(centred.abs(), nearest.double().abs())
    assert ((folded.double() - centred).abs() <= 1.51 * ulp(largest, dtype) + 1e-7).all()
    assert 2 <= moved.sum(1).double().mean() <= 12 and moved.sum(1).max() <= 32


def test_sums_that_are_kept_or_need_nothing_done():
    """Of few elements none can be chosen; the kernel of fp32 subtracts means first, and RMSNorm has none. Long rows of
    fp16 keep theirs for a compiler's sake."""
    draw = Draw(torch.bfloat16, seed=7)
    few, many = draw.weight(20, 63), draw.weight(20, 64)
    for weight in (few, few.half(), draw.weight(3, 1025).half()):
        for kept, same in zip(fold_norm(weight, None, None, sums=False), fold_norm(weight, None, None), strict=True):
            assert kept is not None and torch.equal(kept, same)
    for weight, kind in ((many.float(), "layer"), (many, "rms")):
        folded, nothing, _ = fold_norm(weight, None, None, kind=kind, sums=False)
        assert nothing is None and torch.equal(folded, fold_norm(weight, None, None, kind=kind)[0])


@every_dtype
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_identity(dtype, kind):
    """rstd (x W'^T - mean c) + d in float64 is norm(x) W^T + b, up to the rounding of W' alone."""
    draw = Draw(dtype, seed=3)
    weight, bias, gamma, beta = draw.weight(50, 192), draw.bias(50), draw.gamma(192), draw.bias(192)
    x = draw.rows(9, 192, offset=100.0).double()
    folded, column_sum, shift = (t.double() for t in fold_norm(weight, bias, gamma, beta, kind=kind))
    mean = x.mean(1, keepdim=True) if kind == "layer" else torch.zeros(9, 1, dtype=torch.float64, device=DEVICE)
    rstd = ((x - mean).square().mean(1, keepdim=True) + 1e-6).rsqrt()
    ours = rstd * (x @ folded.t() - mean * column_sum) + shift
    truth = reference.linear(x, weight.double(), bias.double(), kind, gamma.double(), beta.double())
    error = torch.linalg.vector_norm(ours - truth) / torch.linalg.vector_norm(truth)
    # In float32 it is the rounding of c that shows, times the offset.
    assert error < max(torch.finfo(dtype).eps, 1e-5)


def test_missing_pieces():
    draw = Draw(torch.float32, seed=4)
    weight, bias, gamma, beta = draw.weight(20, 30), draw.bias(20), draw.gamma(30), draw.bias(30)
    plain = (weight, weight.sum(1), torch.zeros(20, device=DEVICE))
    scaled = weight * gamma
    fold = functools.partial(fold_norm, kind="rms")
    torch.testing.assert_close(fold(weight, None, None), plain)
    torch.testing.assert_close(fold(weight, bias, None), (*plain[:2], bias))
    torch.testing.assert_close(fold(weight, None, gamma), (scaled, scaled.sum(1), plain[2]))
    torch.testing.assert_close(fold(weight, None, None, beta), (*plain[:2], weight @ beta))


def test_weights_are_not_changed():
    draw = Draw(torch.float32, seed=5)
    tensors = [draw.weight(20, 30), draw.bias(20), draw.gamma(30), draw.bias(30)]
    copies = [t.clone() for t in tensors]
    for result in fold_norm(*tensors):
        result.zero_()
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
