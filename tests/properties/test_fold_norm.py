"""Properties of `fold_norm`. It launches nothing, so every dtype is tested on every rung."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from vit_bench.tolerance import ulp
from vit_kernels import fold_norm, reference

from ..kernels.common import in_float64, same_bits
from ..weights import Draw
from .strategies import SPOILT, Arguments, Layout, in_dtype, laid_out, layouts, refuses, seeds, sizes, spoilt

VECTORS = ("bias", "norm_weight", "norm_bias")


@dataclass(frozen=True)
class Case:
    """One call of `fold_norm`, as data. given: which of the vectors there are."""

    dtype: torch.dtype
    seed: int
    shape: tuple[int, int]
    kind: str
    given: dict[str, bool]
    layouts: dict[str, Layout]
    vectors: torch.dtype

    def both(self) -> tuple[Arguments, Arguments]:
        """Arguments, contiguous and in the drawn layouts."""
        draw = Draw(self.dtype, self.seed)
        n, k = self.shape
        vectors = dict(zip(VECTORS, (draw.bias(n), draw.gamma(k), draw.bias(k)), strict=True))
        given = {name: vector if self.given[name] else None for name, vector in vectors.items()}
        arguments = {"weight": draw.weight(n, k), "kind": self.kind} | in_dtype(given, VECTORS, self.vectors)
        return laid_out(arguments, self.layouts)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    layout = {"weight": layouts(2)} | {name: layouts(1) for name in VECTORS}
    return Case(
        dtype,
        draw(seeds),
        (draw(sizes(1, 40)), draw(sizes(1, 70))),
        draw(st.sampled_from(["layer", "rms"])),
        {name: draw(st.booleans()) for name in VECTORS},
        {name: draw(strategy) for name, strategy in layout.items()},
        draw(st.sampled_from([dtype, torch.float32])),
    )


def _sum_error(terms: torch.Tensor) -> torch.Tensor:
    """What a float32 sum along the last axis may be off by, in any order: so many roundings of the sum of sizes."""
    return (terms.shape[-1] + 1) * ulp(terms.abs().sum(-1), torch.float32)


@given(cases())
def test_pieces_are_what_they_say(case: Case) -> None:
    """W' centred for a layer norm, and rounded once, c the sum of the rounded W', d = W beta + b in float32."""
    arguments = case.both()[1]
    wide = in_float64(arguments)
    weight, gamma, beta, bias = (wide[name] for name in ("weight", "norm_weight", "norm_bias", "bias"))
    folded, column_sum, shift = fold_norm(**arguments, sums=True)
    assert (folded.dtype, column_sum.dtype, shift.dtype) == (case.dtype, torch.float32, torch.float32)
    exact = weight if gamma is None else weight * gamma
    mean = exact.mean(1, keepdim=True) if case.kind == "layer" else torch.zeros_like(exact[:, :1])
    # What float32 rounds on the way: a product, a mean and a difference.
    on_the_way = ulp(exact, torch.float32) + _sum_error(exact)[:, None] + ulp(mean, torch.float32)
    centred = exact - mean
    assert ((folded.double() - centred).abs() <= 0.5 * ulp(centred, case.dtype) + on_the_way).all()
    assert ((column_sum.double() - folded.double().sum(1)).abs() <= _sum_error(folded.double())).all()
    terms = torch.zeros_like(weight) if beta is None else weight * beta
    terms = terms if bias is None else torch.cat([terms, bias[:, None]], 1)
    assert ((shift.double() - terms.sum(1)).abs() <= _sum_error(terms)).all()


@given(cases(), st.integers(1, 5))
def test_folding_leaves_the_formula_as_it_is(case: Case, rows: int) -> None:
    """rstd (x W'^T - mean c) + d is norm(x) W^T + b, up to the roundings of W', c and d, in float64."""
    k = case.shape[1]
    arguments = case.both()[0]
    x = Draw(torch.float32, case.seed + 1).normal(rows, k).double()
    folded, column_sum, shift = (piece.double() for piece in fold_norm(**arguments, sums=True))
    mean = x.mean(1, keepdim=True) if case.kind == "layer" else torch.zeros(rows, 1, dtype=torch.float64).to(x)
    rstd = ((x - mean).square().mean(1, keepdim=True) + 1e-6).rsqrt()
    ours = rstd * (x @ folded.t() - mean * column_sum) + shift
    wide = in_float64(arguments)
    truth = reference.linear(x, wide["weight"], wide["bias"], case.kind, wide["norm_weight"], wide["norm_bias"])
    gamma = torch.ones(k, dtype=torch.float64).to(x) if wide["norm_weight"] is None else wide["norm_weight"]
    beta = torch.zeros_like(gamma) if wide["norm_bias"] is None else wide["norm_bias"]
    size = (rstd * (x - mean)).abs() @ (wide["weight"] * gamma).abs().t()
    roundings = torch.finfo(case.dtype).eps * size + torch.finfo(torch.float32).eps * (k + 1) * (
        rstd * mean.abs() * folded.abs().sum(1) + (wide["weight"] * beta).abs().sum(1) + shift.abs()
    )
    assert ((ours - truth).abs() <= roundings + 1e-12).all()


@given(cases())
def test_layout_changes_no_bit_of_the_weight(case: Case) -> None:
    """(Of the sums it may: PyTorch's order of summation depends on it.) And no argument is written to."""
    dense, views = case.both()
    folded = fold_norm(**views)[0]
    same_bits(folded, fold_norm(**dense)[0])
    for name in case.layouts:
        assert views[name] is None or torch.equal(views[name], dense[name])


@given(st.sampled_from(("weight", *VECTORS)), st.sampled_from(SPOILT), st.data())
def test_refuses_a_spoilt_argument(name: str, how: str, data: st.DataObject) -> None:
    n, k = (data.draw(st.integers(1, 5)) for _ in range(2))
    draw = Draw(torch.float32)
    good = {"weight": draw.weight(n, k), "bias": draw.bias(n), "norm_weight": draw.gamma(k), "norm_bias": draw.bias(k)}
    axis = data.draw(st.integers(0, good[name].ndim - 1), label="axis")
    refuses(fold_norm, good, name, spoilt(good[name], how, axis), how)
