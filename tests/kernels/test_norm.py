"""row_stats and layer_norm against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vit_bench.tolerance import check
from vit_kernels import reference, row_stats

from ..rung import DEVICE
from ..weights import Draw, nan_framed
from .common import (
    every_dtype,
    in_float64,
    judge,
    judge_stats,
    layer_norm,
    same_bits,
    sanitize_bfloat16,
    sanitize_every_dtype,
)

SHAPES = [
    pytest.param(1, 192, id="1x192"),
    pytest.param(15, 384, id="15x384"),
    pytest.param(17, 768, id="17x768"),
    pytest.param(3, 1000, id="3x1000"),
    pytest.param(2, 1152, id="2x1152"),
    pytest.param(3, 1280, id="3x1280"),
    pytest.param(7, 333, id="odd-7x333"),
    pytest.param(9, 1, id="one-column"),
    pytest.param(2, 4100, id="wider-than-a-tile"),
    pytest.param(0, 192, id="no-rows"),
]

# One program per row or few rows: many programs, which only the interpreter and the sanitizer find slow.
MANY_ROWS = [
    pytest.param(50, 1000, id="50x1000"),
    pytest.param(197, 192, id="197x192"),
    pytest.param(257, 65, id="257x65"),
    pytest.param(577, 40, id="577x40"),
]


@every_dtype
@pytest.mark.parametrize(("m", "n"), MANY_ROWS)
def test_many_rows(dtype, m, n):
    draw = Draw(dtype, seed=m + n)
    arguments = {"x": draw.rows(m, n), "weight": draw.gamma(n), "bias": draw.bias(n)}
    judge(layer_norm(**arguments), reference.layer_norm, arguments)
    judge_stats(row_stats(arguments["x"]), arguments["x"])


@sanitize_bfloat16
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_layer_norm(dtype, kind, m, n):
    draw = Draw(dtype, seed=m + n)
    arguments = {"x": draw.rows(m, n), "weight": draw.gamma(n), "bias": draw.bias(n), "kind": kind}
    y = layer_norm(**arguments)
    assert y.shape == (m, n)
    assert y.is_contiguous()
    judge(y, reference.layer_norm, arguments)


def test_a_very_wide_row():
    """So wide that the product of two numbers of columns, which the merging of chunks takes, passes 2^31."""
    x = Draw(torch.float32, seed=10).rows(1, 600_000)
    judge_stats(row_stats(x), x)


@sanitize_every_dtype
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(
    ("gamma", "beta"),
    [
        pytest.param(False, False, id="no-gamma-no-beta"),
        pytest.param(True, False, id="gamma"),
        pytest.param(False, True, id="beta"),
    ],
)
def test_layer_norm_without_parameters(dtype, kind, gamma, beta):
    draw = Draw(dtype, seed=3)
    arguments = {
        "x": draw.rows(5, 100),
        "weight": draw.gamma(100) if gamma else None,
        "bias": draw.bias(100) if beta else None,
        "kind": kind,
    }
    judge(layer_norm(**arguments), reference.layer_norm, arguments)


@sanitize_bfloat16
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_layer_norm_eps(dtype, kind):
    """An eps as large as the variance; and constant rows, where it is all that is left of the root."""
    draw = Draw(dtype, seed=4)
    x = draw.normal(6, 100)
    x[3] = 2.0
    arguments = {"x": x, "weight": draw.gamma(100), "bias": draw.bias(100), "eps": 1.0, "kind": kind}
    judge(layer_norm(**arguments), reference.layer_norm, arguments)


@sanitize_bfloat16
def test_layer_norm_with_a_large_common_offset(dtype):
    """E[x^2] - E[x]^2 has no correct digit left in float32 here; the two-pass form loses nothing."""
    draw = Draw(dtype, seed=5)
    x = draw.rows(8, 384, offset=4000.0 if dtype == torch.float32 else 500.0, outlier=1.0)
    arguments: dict[str, Any] = {"x": x, "weight": draw.gamma(384), "bias": draw.bias(384)}
    y = layer_norm(**arguments)
    check(y, reference.layer_norm(**arguments), reference.layer_norm(**in_float64(arguments)))
    judge_stats(row_stats(x), x)


@every_dtype
@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_zeroed_parameter_is_noticed(dtype, kind, parameter):
    draw = Draw(dtype, seed=6)
    arguments = {"x": draw.rows(5, 192), "weight": draw.gamma(192), "bias": draw.bias(192), "kind": kind}
    y = layer_norm(**arguments | {parameter: torch.zeros_like(arguments[parameter])})
    with pytest.raises(AssertionError, match="over the allowed"):
        judge(y, reference.layer_norm, arguments)


def _layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values behind other strides, each with NaN wherever the tensor is not."""
    m, n = x.shape
    every_other = torch.full((2 * m, n), float("nan"), dtype=x.dtype, device=x.device)
    every_other[::2] = x
    spread = torch.full((m, 3 * n), float("nan"), dtype=x.dtype, device=x.device)
    spread[:, ::3] = x
    return {
        "framed-by-nan": nan_framed(x),
        "every-other-row": every_other[::2],
        "every-third-column": spread[:, ::3],
        "transposed": x.t().contiguous().t(),
    }


@sanitize_bfloat16
@pytest.mark.parametrize("layout", ["framed-by-nan", "every-other-row", "every-third-column", "transposed"])
def test_strides_and_foreign_values_change_no_bit(dtype, layout):
    draw = Draw(dtype, seed=7)
    x, gamma, beta = draw.rows(5, 100), draw.gamma(100), draw.bias(100)
    view = _layouts(x)[layout]
    assert torch.equal(view, x)
    same_bits(layer_norm(view, nan_framed(gamma), nan_framed(beta)), layer_norm(x, gamma, beta))
    same_bits(row_stats(view), row_stats(x))


@sanitize_bfloat16
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_row_stats(dtype, m, n):
    x = Draw(dtype, seed=m + n).rows(m, n)
    stats = row_stats(x)
    assert stats.shape == (2, 1, m)
    if m:
        judge_stats(stats, x)


def test_one_row_repeated_by_a_zero_stride():
    x = Draw(torch.float32, seed=8).rows(1, 192)
    same_bits(layer_norm(x.expand(5, 192)), layer_norm(x).repeat(5, 1))


def test_statistics_of_a_row_do_not_depend_on_the_others():
    x = Draw(torch.float32, seed=9).rows(50, 192)
    assert x.device.type == torch.device(DEVICE).type
    same_bits(row_stats(x)[:, :, 7:8], row_stats(x[7:8].clone()))
