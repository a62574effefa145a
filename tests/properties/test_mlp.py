"""Properties of `mlp`, as one kernel and as two GEMMs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vit_kernels import gemm_tiles, mlp_tiles, reference, row_stats

from ..kernels.common import mlp, same_bits
from ..kernels.test_mlp import draw_mlp
from ..weights import Draw
from .strategies import (
    SPOILT,
    Arguments,
    Layout,
    any_gemm_tile,
    dtypes,
    folded,
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

any_mlp_tile = st.builds(
    mlp_tiles.MlpTile,
    block_m=st.sampled_from([16, 32]),
    block_h=st.sampled_from([16, 32]),
    num_warps=st.just(4),
    num_stages=st.just(1),
)


@dataclass(frozen=True)
class Case:
    """One call of `mlp`, as data. fused: one kernel or two GEMMs, or what the tile choice says (one kernel, here);
    stats: of x, "none" given, for "whole" rows or "partial" ones as a producer emits them."""

    dtype: torch.dtype
    seed: int
    shape: tuple[int, int, int]
    options: dict[str, Any]
    layouts: dict[str, Layout]
    fused: bool | None
    stats: str
    emit_stats: bool
    tile: mlp_tiles.MlpTile
    gemm: gemm_tiles.GemmTile

    def build(self, draw: Draw) -> Arguments:
        """Arguments of the reference, contiguous."""
        return laid_out(draw_mlp(draw, *self.shape, **self.options), self.layouts)[0]

    def both(self) -> tuple[Arguments, Arguments]:
        """Arguments of the launcher, contiguous and in the drawn layouts."""
        arguments = folded(self.build(Draw(self.dtype, self.seed)), "fc1_weight", "fc1_bias")
        arguments |= {"fused": self.fused, "emit_stats": self.emit_stats}
        return laid_out(self.with_rows(arguments, arguments["x"]), self.layouts)

    def with_rows(self, arguments: Arguments, x: torch.Tensor) -> Arguments:
        """The same call for this x and its statistics."""
        if self.options["norm"] == "none" or self.stats == "none":
            return arguments | {"x": x}
        return arguments | {"x": x, "stats": (partial_stats if self.stats == "partial" else row_stats)(x)}

    def run(self, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        with tiled(mlp=self.tile, gemm=self.gemm):
            return several(mlp(**arguments))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    norm = draw(st.sampled_from(["none", "layer", "rms"]))
    options = {"norm": norm, "activation": draw(st.sampled_from(sorted(reference.ACTIVATIONS)))}
    options |= {name: draw(st.booleans()) for name in ("biases", "layer_scale", "residual")}
    # A row to normalise must vary, and a folded weight or bias is a tensor of fold_norm's own making.
    repeatable = None if norm == "none" else ()
    layout = {"x": layouts(2, None if norm == "none" else (0,)), "fc1_weight": layouts(2, repeatable)}
    layout |= {"fc1_bias": layouts(1, repeatable), "fc2_weight": layouts(2), "fc2_bias": layouts(1)}
    layout |= {"layer_scale": layouts(1), "residual": layouts(2)}
    return Case(
        draw(dtypes),
        draw(seeds),
        (draw(sizes(0, 34)), draw(sizes(1 if norm == "none" else 2, 130)), draw(sizes(1, 40))),
        options,
        {name: draw(strategy) for name, strategy in layout.items()},
        draw(st.sampled_from([True, False, None])),
        draw(st.sampled_from(["none", "whole", "partial"])),
        draw(st.booleans()),
        draw(any_mlp_tile),
        draw(any_gemm_tile),
    )


@pytest.mark.sanitize
@given(cases())
def test_agrees_with_the_reference(case: Case) -> None:
    y, *stats = case.run(case.both()[1])
    assert y.is_contiguous()
    judge_among(y, reference.mlp, case.build, case.dtype, case.seed)
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


TENSORS = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale", "residual", "stats", "column_sum")


@given(st.sampled_from(TENSORS), st.sampled_from(SPOILT), st.sampled_from([True, False, None]), st.data())
def test_refuses_a_spoilt_argument(name: str, how: str, fused: bool | None, data: st.DataObject) -> None:
    m, width, hidden = (data.draw(st.integers(1, 5)) for _ in range(3))
    good = folded(draw_mlp(Draw(torch.float32), m, width, hidden), "fc1_weight", "fc1_bias")
    good |= {"stats": row_stats(good["x"]), "fused": fused}
    axis = data.draw(st.integers(0, good[name].ndim - 1), label="axis")
    refuses(mlp, good, name, spoilt(good[name], how, axis), how)
