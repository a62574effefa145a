"""Properties of `qk_rope`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vit_kernels import qk_rope_tiles, reference

from ..kernels.common import qk_rope, same_bits
from ..weights import Draw
from .strategies import (
    SPOILT,
    Arguments,
    Layout,
    batches,
    dtypes,
    in_dtype,
    judge_among,
    laid_out,
    layouts,
    poisons,
    refuses,
    seeds,
    sizes,
    spoilt,
)

# Interpreted, kernels are numpy: poisoned examples are full of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

VECTORS = ("q_weight", "q_bias", "k_weight", "k_bias")
TABLES = ("cos", "sin")


@dataclass(frozen=True)
class Case:
    """One call of `qk_rope` as data. table: "none" or what has a table of its own: "all" heads and images share one."""

    dtype: torch.dtype
    seed: int
    batch: int
    tokens: int
    heads: tuple[int, int]
    half_width: int
    norm: str
    vectors: tuple[bool, bool, bool, bool]
    table: str
    interleaved: bool
    prefix: int
    layouts: dict[str, Layout]
    tables: torch.dtype
    tile: tuple[int, int]

    def build(self, draw: Draw) -> Arguments:
        """Arguments of the reference, contiguous."""
        width = 2 * self.half_width
        arguments: Arguments = {
            side: draw.normal(self.batch, self.tokens, heads, width)
            for side, heads in zip("qk", self.heads, strict=True)
        }
        arguments |= {"norm": self.norm, "interleaved": self.interleaved, "prefix": self.prefix}
        for name, given_too in zip(VECTORS, self.vectors, strict=True):
            vector = draw.gamma(width) if name.endswith("weight") else draw.bias(width)
            arguments[name] = vector if given_too and self.norm != "none" else None
        # The first axes of a table of four; a table of each head needs as many of both.
        images, heads = (self.batch if "image" in self.table else 1), (self.heads[0] if "head" in self.table else 1)
        for name in TABLES:
            table = draw.normal(images, heads, self.tokens - self.prefix, width)
            arguments[name] = None if self.table == "none" else table
        return laid_out(arguments, self.layouts)[0]

    def both(self) -> tuple[Arguments, Arguments]:
        """Arguments of the launcher, contiguous and in the drawn layouts."""
        arguments = self.build(Draw(self.dtype, self.seed))
        return laid_out(in_dtype(arguments, (*VECTORS, *TABLES), self.tables), self.layouts)

    def run(self, arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            tile = qk_rope_tiles.QkRopeTile(*self.tile, num_warps=4)
            patch.setattr(qk_rope_tiles, "choose_qk_rope", lambda *a, **k: tile)
            return qk_rope(**arguments)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype, tokens = draw(dtypes), draw(sizes(1, 19))
    heads = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    own = ["head", "image and head"] if heads[0] == heads[1] else []
    layout: dict[str, Any] = {"q": layouts(4, (0, 1, 2)), "k": layouts(4, (0, 1, 2))}
    layout |= dict.fromkeys(VECTORS, layouts(1, ())) | dict.fromkeys(TABLES, layouts(4, (0, 1, 2)))
    return Case(
        dtype,
        draw(seeds),
        draw(batches(0, 2)),
        tokens,
        heads,
        draw(st.one_of(st.integers(2, 20), st.sampled_from([32, 40, 64]))),
        draw(st.sampled_from(["layer", "rms", "none"])),
        draw(st.tuples(*[st.booleans()] * 4)),
        draw(st.sampled_from(["all", "image", "none", *own])),
        draw(st.booleans()),
        draw(st.integers(0, min(tokens, 5))),
        {name: draw(strategy) for name, strategy in layout.items()},
        draw(st.sampled_from([dtype, torch.float32])),
        draw(st.sampled_from([(8, 2), (16, 1), (32, 4)])),
    )


@pytest.mark.sanitize
@given(cases())
def test_agrees_with_the_reference(case: Case) -> None:
    for pick, ours in enumerate(case.run(case.both()[1])):
        assert ours.is_contiguous()
        judge_among(ours, reference.qk_rope, case.build, case.dtype, case.seed, pick=pick)


@given(cases())
def test_layout_changes_no_bit(case: Case) -> None:
    dense, views = case.both()
    for ours, clean in zip(case.run(views), case.run(dense), strict=True):
        same_bits(ours, clean)


@given(cases(), poisons, st.data())
def test_heads_of_tokens_do_not_mix(case: Case, poison: float, data: st.DataObject) -> None:
    """NaN and infinity in one head of one token of q change nothing else, and k not at all."""
    arguments = case.both()[0]
    at = tuple(data.draw(st.integers(0, max(n - 1, 0))) for n in arguments["q"].shape[:3])
    q = arguments["q"].clone()
    others = torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)
    if case.batch:
        q[at] = poison
        others[at] = False
    (ours, ours_k), (clean, clean_k) = case.run(arguments | {"q": q}), case.run(arguments)
    same_bits(ours[others], clean[others])
    same_bits(ours_k, clean_k)


@given(st.sampled_from(("q", "k", *VECTORS, *TABLES)), st.sampled_from(SPOILT), st.data())
def test_refuses_a_spoilt_argument(name: str, how: str, data: st.DataObject) -> None:
    batch, tokens, heads, half = (data.draw(st.integers(2, 4)) for _ in range(4))
    draw = Draw(torch.float32)
    good: Arguments = {side: draw.normal(batch, tokens, heads, 2 * half) for side in "qk"} | {"norm": "layer"}
    good |= {vector: draw.bias(2 * half) for vector in VECTORS}
    good |= {table: draw.normal(batch, heads, tokens, 2 * half) for table in TABLES}
    axis = data.draw(st.integers(0, good[name].ndim - 1), label="axis")
    refuses(qk_rope, good, name, spoilt(good[name], how, axis), how)
