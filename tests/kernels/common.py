"""What the kernel tests share: judging a result by the references, and judging emitted row statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import vit_kernels
from vit_bench.tolerance import Errors, check, ulp

from ..rung import DTYPES
from ..weights import moments

# The launchers as tests call them, with dictionaries of arguments: what they return depends on those, which no type
# checker can follow.
attention: Any = vit_kernels.attention
attention_packed: Any = vit_kernels.attention_packed
layer_norm: Any = vit_kernels.layer_norm
linear: Any = vit_kernels.linear
mlp: Any = vit_kernels.mlp
patch_embed: Any = vit_kernels.patch_embed
qk_rope: Any = vit_kernels.qk_rope


def _parametrize_dtype(*sanitized: torch.dtype, among: Sequence[torch.dtype] = DTYPES) -> pytest.MarkDecorator:
    cases = []
    for dtype in among:
        marks = [pytest.mark.sanitize] if dtype in sanitized else []
        cases.append(pytest.param(dtype, id=str(dtype).removeprefix("torch."), marks=marks))
    return pytest.mark.parametrize("dtype", cases)


# A test in every dtype of the rung. The sanitizer compiles every variant of a kernel anew, so under `-m sanitize` all
# three dtypes go through the tests that switch each feature of a kernel, and bfloat16, which the interpreter cannot do,
# through the others.
every_dtype = _parametrize_dtype()
sanitize_every_dtype = _parametrize_dtype(torch.float32, torch.float16, torch.bfloat16)
sanitize_bfloat16 = _parametrize_dtype(torch.bfloat16)
# What only operands of 16 bits go through.
HALF_DTYPES = [dtype for dtype in DTYPES if dtype.itemsize == 2]
sanitize_half = _parametrize_dtype(*HALF_DTYPES, among=HALF_DTYPES)

# With IEEE dots a float32 kernel is this close to float64, whatever the inputs of these tests; a tf32 dot would be off
# by 1e-4 to 1e-3. Tests with ordinary inputs ask for IEEE_ERROR.
FLOAT32_ROW_ERROR = 1e-5
IEEE_ERROR = 1.5e-6


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with every floating-point tensor widened: what the truth is computed from."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def judge(
    ours: torch.Tensor, reference: Callable[..., Any], arguments: dict[str, Any], *, pick: int | None = None
) -> Errors:
    """Holds a kernel's result against reference(**arguments), in its own dtype and in float64, by the tolerance rule.

    pick: which result of a reference that returns several.
    """
    eager, truth = reference(**arguments), reference(**in_float64(arguments))
    if pick is not None:
        eager, truth = eager[pick], truth[pick]
    errors = check(ours, eager, truth, name=getattr(reference, "__name__", "result"))
    if ours.dtype == torch.float32 and ours.numel():
        assert errors.row <= FLOAT32_ROW_ERROR, f"float32 is not computed at IEEE precision: {errors}"
    return errors


def judge_stats(stats: torch.Tensor, y: torch.Tensor) -> None:
    """Holds emitted row statistics against those of the result as it was stored, in float64.

    The mean of a row may be off by a few float32 roundings of values of the row's size; M2, a sum of squares of at
    least that relative precision, by a few relative roundings.
    """
    assert stats.dtype == torch.float32
    assert stats.shape[0] == 2
    assert stats.shape[2] == y.shape[0]
    mean, m2 = moments(stats, y.shape[1])
    truth = y.double()
    true_mean = truth.mean(1)
    true_m2 = (truth - true_mean[:, None]).square().sum(1)
    assert torch.isfinite(stats).all()
    largest = truth.abs().amax(1)
    mean_error = (mean - true_mean).abs() / ulp(largest, torch.float32)
    assert mean_error.max() <= 8, f"row mean is off by {mean_error.max():.1f} ulp of the row's largest value"
    m2_error = (m2 - true_m2).abs() / (true_m2 + ulp(largest, torch.float32).square() * y.shape[1])
    assert m2_error.max() <= 2e-5, f"relative error of the sum of squared deviations is {m2_error.max():.2e}"


def same_bits(ours: torch.Tensor, clean: torch.Tensor) -> None:
    """Equal in every bit; NaN would not equal itself otherwise, and -0.0 would equal 0.0."""
    assert ours.dtype == clean.dtype
    assert ours.shape == clean.shape
    integer = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    different = ours.contiguous().view(integer) != clean.contiguous().view(integer)
    assert not different.any(), f"{int(different.sum())} of {different.numel()} values differ from the clean run"
