"""Properties of `linear`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vit_kernels import gemm_tiles, reference, row_stats

from ..kernels.common import in_float64, linear, same_bits
from ..kernels.test_linear import draw_linear
from ..weights import Draw
from .strategies import (
    SPOILT,
    Arguments,
    Layout,
    any_gemm_tile,
    dtypes,
    folded,
    in_dtype,
    judge_among,
    judge_emitted,
    laid_out,
    layouts,
    partial_stats,
    poisons,
    refuses,
    seeds,
    several,
    sizes,
    spoilt,
    tiled,
)

# Interpreted, kernels are numpy: exp may overflow to infinity, and poisoned examples are full of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@dataclass(frozen=True)
class Case:
    """One call of `linear`, as data. vectors: the dtype of bias and LayerScale; partial: x comes with the statistics
    that its producer emitted, one partial per 64 columns."""

    dtype: torch.dtype
    seed: int
    shape: tuple[int, int, int]
    options: dict[str, Any]
    layouts: dict[str, Layout]
    vectors: torch.dtype
    partial: bool
    emit_stats: bool
    tile: gemm_tiles.GemmTile

    def build(self, draw: Draw) -> Arguments:
        """Arguments of the reference, contiguous."""
        return laid_out(draw_linear(draw, *self.shape, **self.options), self.layouts)[0]

    def both(self) -> tuple[Arguments, Arguments]:
        """Arguments of the launcher, contiguous and in the drawn layouts."""
        arguments = folded(self.build(Draw(self.dtype, self.seed)))
        arguments = in_dtype(arguments, ("bias", "layer_scale"), self.vectors)
        return laid_out(self.with_rows(arguments, arguments["x"]) | {"emit_stats": self.emit_stats}, self.layouts)

    def with_rows(self, arguments: Arguments, x: torch.Tensor) -> Arguments:
        """The same call for this x and its statistics."""
        if self.options["norm"] == "none":
            return arguments | {"x": x}
        return arguments | {"x": x, "stats": (partial_stats if self.partial else row_stats)(x)}

    def run(self, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        with tiled(gemm=self.tile):
            return several(linear(**arguments))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    norm = draw(st.sampled_from(["none", "layer", "rms"]))
    options = {"norm": norm, "activation": draw(st.sampled_from(sorted(reference.ACTIVATIONS)))}
    options |= {name: draw(st.booleans()) for name in ("bias", "layer_scale", "residual")}
    # A row to normalise must vary, and a folded weight or bias is a tensor of fold_norm's own making.
    repeatable = None if norm == "none" else ()
    layout = {"x": layouts(2, None if norm == "none" else (0,)), "weight": layouts(2, repeatable)}
    layout |= {"bias": layouts(1, repeatable), "layer_scale": layouts(1), "residual": layouts(2)}
    dtype = draw(dtypes)
    return Case(
        dtype,
        draw(seeds),
        (draw(sizes(0, 40)), draw(sizes(1 if norm == "none" else 2, 70)), draw(sizes(1, 70))),
        options,
        {name: draw(strategy) for name, strategy in layout.items()},
        # What fold_norm makes of a bias is float32 and stays it.
        draw(st.sampled_from([dtype, torch.float32])) if norm == "none" else torch.float32,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(any_gemm_tile),
    )


@pytest.mark.sanitize
@given(cases())
def test_agrees_with_the_reference(case: Case) -> None:
    y, *stats = case.run(case.both()[1])
    assert y.is_contiguous()
    judge_among(y, reference.linear, case.build, case.dtype, case.seed)
    if stats and y.numel():
        judge_emitted(stats[0], y)


@given(cases())
def test_layout_changes_no_bit(case: Case) -> None:
    dense, views = case.both()
    for ours, expected in zip(case.run(views), case.run(dense), strict=True):
        same_bits(ours, expected)


@given(cases(), poisons, st.data())
def test_rows_do_not_mix(case: Case, poison: float, data: st.DataObject) -> None:
    """NaN and infinity in one row of x change no other row."""
    arguments = case.both()[0]
    m = case.shape[0]
    clean = case.run(arguments)[0]
    row = data.draw(st.integers(0, max(m - 1, 0)), label="row")
    x = arguments["x"].clone()
    x[row : row + 1] = poison
    others = [i for i in range(m) if i != row]
    same_bits(case.run(case.with_rows(arguments, x))[0][others], clean[others])


@given(cases(), st.data())
def test_fewer_rows_are_the_first_rows(case: Case, data: st.DataObject) -> None:
    arguments = case.both()[0]
    few = data.draw(st.integers(0, case.shape[0]), label="few")
    residual = arguments["residual"]
    fewer = case.with_rows(arguments, arguments["x"][:few]) | {"residual": None if residual is None else residual[:few]}
    same_bits(case.run(fewer)[0], case.run(arguments)[0][:few])


@given(cases(), st.data())
def test_columns_do_not_mix(case: Case, data: st.DataObject) -> None:
    """NaN in one row of the weight changes no other column of y; for swiglu that is a gate's row or a value's."""
    arguments = case.both()[0]
    n = case.shape[2]
    clean = case.run(arguments)[0]
    row = data.draw(st.integers(0, len(arguments["weight"]) - 1), label="row")
    weight = arguments["weight"].clone()
    weight[row] = float("nan")
    ours = case.run(arguments | {"weight": weight})[0]
    others = [i for i in range(n) if i != row % n]
    same_bits(ours[:, others], clean[:, others])
    assert torch.isnan(ours[:, row % n]).all()


@pytest.mark.sanitize
@given(sizes(1, 40), sizes(1, 70), sizes(1, 70), dtypes, seeds, any_gemm_tile)
def test_tf32_rounds_the_operands_at_most(m, k, n, dtype, seed, tile) -> None:
    """Each operand of a product to 10 bits of mantissa: 2^-11 of it. 16-bit operands have no more bits to lose."""
    arguments = draw_linear(Draw(dtype, seed), m, k, n, bias=False)
    with tiled(gemm=tile):
        exact, ours = (linear(**folded(arguments), tf32=tf32) for tf32 in (False, True))
    if dtype != torch.float32:
        same_bits(ours, exact)
        return
    wide = in_float64(arguments)
    magnitude = wide["x"].abs() @ wide["weight"].abs().t()
    # The third 2^-11 is for the product of both, float32's roundings and what is left of them.
    assert ((ours.double() - reference.linear(**wide)).abs() <= 3 * 2.0**-11 * magnitude).all()


TENSORS = ("x", "weight", "bias", "layer_scale", "residual", "stats", "column_sum")


@given(st.sampled_from(TENSORS), st.sampled_from(SPOILT), st.data())
def test_refuses_a_spoilt_argument(name: str, how: str, data: st.DataObject) -> None:
    m, k, n = (data.draw(st.integers(1, 5)) for _ in range(3))
    draw = Draw(torch.float32)
    good = folded(draw_linear(draw, m, k, n, norm="layer", layer_scale=True, residual=True))
    good["stats"] = row_stats(good["x"])
    axis = data.draw(st.integers(0, good[name].ndim - 1), label="axis")
    refuses(linear, good, name, spoilt(good[name], how, axis), how)
