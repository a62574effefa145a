"""The checker of every other test: it must pass what the rule allows and fail what it does not."""

from __future__ import annotations

import math

import pytest
import torch

from vit_bench.tolerance import check, ulp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _case(dtype: torch.dtype, outlier: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(truth, eager): eager is truth with errors of about ten ulp, rounded to dtype."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(20, 100, dtype=torch.float64, generator=generator)
    truth[:, 7] *= outlier
    noise = torch.randn(20, 100, dtype=torch.float64, generator=generator) * 10 * torch.finfo(dtype).eps
    return truth, (truth * (1 + noise)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ulp_is_the_distance_to_the_next_value(dtype):
    for value in (1.0, 1.5, 0.9, 3.0, 1000.0, 2.0**-10):
        x = torch.tensor(value, dtype=dtype)
        integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
        above = (x.view(integer) + 1).view(dtype)
        assert ulp(x.double(), dtype) == above.double() - x.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_passes_what_is_as_good_as_eager(dtype):
    truth, eager = _case(dtype)
    check(eager, eager, truth)
    check(truth.to(dtype), eager, truth)
    mirrored = (2 * truth - eager.double()).to(dtype)
    errors = check(mirrored, eager, truth)
    assert errors.largest == pytest.approx(errors.largest_eager, rel=0.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fails_three_times_the_error_of_eager(dtype):
    truth, eager = _case(dtype)
    three_times = (truth + 3.5 * (eager.double() - truth)).to(dtype)
    with pytest.raises(
        AssertionError, match=r"largest absolute error .*eager .*worst row's relative L2 error .*allowed"
    ):
        check(three_times, eager, truth)


def test_fails_one_wrong_element_and_names_it():
    truth, eager = _case(torch.float16)
    ours = eager.clone()
    ours[3, 5] += 0.3
    with pytest.raises(AssertionError, match="at row 3, column 5"):
        check(ours, eager, truth)


def test_fails_one_wrong_row_whose_elements_are_each_allowed():
    """An error just under the largest of eager's, but all over one row."""
    truth, eager = _case(torch.float32)
    largest = (eager.double() - truth).abs().max()
    ours = eager.clone()
    ours[4] = (truth[4] + 1.5 * largest).float()
    with pytest.raises(AssertionError, match="of row 4 is over"):
        check(ours, eager, truth)


def test_a_dominant_channel_hides_nothing():
    """In bfloat16 one ulp of the large channel is 2 to 4 here; the lost bias of another one is 0.5."""
    truth, _ = _case(torch.bfloat16, outlier=300.0)
    eager = truth.bfloat16()
    ours = eager.clone()
    check(ours, eager, truth)
    ours[:, 20] = (truth[:, 20] + 0.5).bfloat16()
    with pytest.raises(AssertionError, match="dominant columns scaled down"):
        check(ours, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_ulp_are_allowed_where_eager_is_exact_and_five_are_not(dtype):
    truth = torch.tensor([[1.0, 1.25, 1.5, 1.75]], dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    check((truth + 2 * eps).to(dtype), truth.to(dtype), truth)
    with pytest.raises(AssertionError, match="is over the allowed"):
        check((truth + 5 * eps).to(dtype), truth.to(dtype), truth)


@pytest.mark.parametrize(
    ("ours", "truth", "passes"),
    [
        pytest.param(math.nan, 1.0, False, id="nan-for-a-number"),
        pytest.param(math.inf, 1.0, False, id="inf-for-a-number"),
        pytest.param(math.inf, 60000.0, False, id="overflow"),
        pytest.param(1.0, -math.inf, False, id="number-for-inf"),
        pytest.param(math.inf, -math.inf, False, id="wrong-sign"),
        pytest.param(math.nan, -math.inf, False, id="nan-for-inf"),
        pytest.param(-math.inf, -math.inf, True, id="same-inf"),
        pytest.param(math.nan, math.nan, True, id="same-nan"),
    ],
)
def test_values_that_are_not_finite(ours, truth, passes):
    right = torch.tensor([[1.0, 2.0, truth]], dtype=torch.float64)
    left = torch.tensor([[1.0, 2.0, ours]], dtype=torch.float16)
    if passes:
        check(left, right.half(), right)
        return
    with pytest.raises(AssertionError, match="not finite, or should not be; the first at row 0, column 2"):
        check(left, right.half(), right)


def test_refuses_to_judge_by_an_eager_result_that_overflowed():
    truth = torch.tensor([[1.0, 70000.0]], dtype=torch.float64)
    with pytest.raises(AssertionError, match="not finite"):
        check(truth.half(), truth.half(), truth)
    with pytest.raises(AssertionError, match="eager itself is not finite"):
        check(truth.float(), torch.tensor([[1.0, math.inf]]), truth)


def test_wrong_shape_dtype_and_truth():
    truth = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shapes differ"):
        check(truth.half()[:1], truth.half(), truth)
    with pytest.raises(AssertionError, match=r"ours is torch.float32, eager is torch.float16"):
        check(truth.float(), truth.half(), truth)
    with pytest.raises(TypeError, match="truth must be float64"):
        check(truth.half(), truth.half(), truth.float())


def test_nothing_to_compare_passes():
    empty = torch.ones(0, 4)
    check(empty, empty, empty.double())
