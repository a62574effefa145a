"""Properties of `layer_norm` and `row_stats`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vit_kernels import reference, row_stats, tiles

from ..kernels.common import layer_norm, same_bits
from ..weights import Draw
from .strategies import (
    SPOILT,
    Arguments,
    Layout,
    dtypes,
    in_dtype,
    judge_among,
    judge_emitted,
    laid_out,
    layouts,
    poisons,
    refuses,
    seeds,
    sizes,
    spoilt,
    tiled,
)

# Interpreted, kernels are numpy: exp may overflow to infinity, and poisoned examples are full of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

rows_tiles = st.builds(
    tiles.RowsTile,
    block_m=st.sampled_from([2, 4, 1]),
    block_n=st.sampled_from([16, 32, 64]),
    num_warps=st.just(4),
)


@dataclass(frozen=True)
class Case:
    """One call of `layer_norm`, and of `row_stats` on the same rows, as data."""

    dtype: torch.dtype
    seed: int
    shape: tuple[int, int]
    kind: str
    eps: float
    weight: bool
    bias: bool
    layouts: dict[str, Layout]
    vectors: torch.dtype
    tile: tiles.RowsTile

    def build(self, draw: Draw) -> Arguments:
        """Arguments of the reference, contiguous."""
        m, n = self.shape
        arguments = {"x": draw.rows(m, n), "kind": self.kind, "eps": self.eps}
        arguments |= {"weight": draw.gamma(n) if self.weight else None, "bias": draw.bias(n) if self.bias else None}
        return laid_out(arguments, self.layouts)[0]

    def both(self) -> tuple[Arguments, Arguments]:
        """Arguments of the launcher, contiguous and in the drawn layouts."""
        arguments = self.build(Draw(self.dtype, self.seed))
        return laid_out(in_dtype(arguments, ("weight", "bias"), self.vectors), self.layouts)

    def norm(self, arguments: Arguments) -> torch.Tensor:
        with tiled(rows=self.tile):
            return layer_norm(**arguments)

    def stats(self, x: torch.Tensor) -> torch.Tensor:
        with tiled(rows=self.tile):
            return row_stats(x)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(dtypes)
    layout = {"x": layouts(2, (0,)), "weight": layouts(1), "bias": layouts(1)}
    return Case(
        dtype,
        draw(seeds),
        (draw(sizes(0, 9)), draw(sizes(2, 70))),
        draw(st.sampled_from(["layer", "rms"])),
        draw(st.sampled_from([0.0, 1e-6, 1e-5, 1.0])),
        draw(st.booleans()),
        draw(st.booleans()),
        {name: draw(strategy) for name, strategy in layout.items()},
        draw(st.sampled_from([dtype, torch.float32])),
        draw(rows_tiles),
    )


@pytest.mark.sanitize
@given(cases())
def test_layer_norm_agrees_with_the_reference(case: Case) -> None:
    y = case.norm(case.both()[1])
    assert y.is_contiguous()
    judge_among(y, reference.layer_norm, case.build, case.dtype, case.seed)


@pytest.mark.sanitize
@given(cases())
def test_row_stats_are_those_of_the_rows(case: Case) -> None:
    x = case.both()[1]["x"]
    stats = case.stats(x)
    assert stats.shape == (2, 1, len(x))
    if len(x):
        judge_emitted(stats, x)


@given(cases())
def test_layout_changes_no_bit(case: Case) -> None:
    dense, views = case.both()
    same_bits(case.norm(views), case.norm(dense))
    same_bits(case.stats(views["x"]), case.stats(dense["x"]))


@given(cases(), poisons, st.data())
def test_rows_do_not_mix(case: Case, poison: float, data: st.DataObject) -> None:
    """NaN and infinity in one row of x change no other row."""
    arguments = case.both()[0]
    m = case.shape[0]
    row = data.draw(st.integers(0, max(m - 1, 0)), label="row")
    x = arguments["x"].clone()
    x[row : row + 1] = poison
    others = [i for i in range(m) if i != row]
    same_bits(case.norm(arguments | {"x": x})[others], case.norm(arguments)[others])
    same_bits(case.stats(x)[..., others], case.stats(arguments["x"])[..., others])


@given(cases(), st.integers(1, 3))
def test_a_row_does_not_depend_on_how_many_there_are(case: Case, times: int) -> None:
    arguments = case.both()[0]
    x = arguments["x"].repeat(times, 1)
    same_bits(case.norm(arguments | {"x": x}), case.norm(arguments).repeat(times, 1))
    same_bits(case.stats(x), case.stats(arguments["x"]).repeat(1, 1, times))


@given(st.sampled_from(("x", "weight", "bias")), st.sampled_from(SPOILT), st.data())
def test_refuses_a_spoilt_argument(name: str, how: str, data: st.DataObject) -> None:
    m, n = (data.draw(st.integers(1, 5)) for _ in range(2))
    draw = Draw(torch.float32)
    good = {"x": draw.rows(m, n), "weight": draw.gamma(n), "bias": draw.bias(n)}
    # An x with more rows is as good as any.
    axis = data.draw(st.integers(1 if name == "x" else 0, good[name].ndim - 1), label="axis")
    refuses(layer_norm, good, name, spoilt(good[name], how, axis), how)
