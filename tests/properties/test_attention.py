"""Properties of `attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vit_kernels import attention_tiles, reference

from ..kernels.common import attention, same_bits
from ..kernels.test_attention import draw_qkv
from ..weights import Draw
from .strategies import (
    SPOILT,
    Arguments,
    Layout,
    batches,
    dtypes,
    judge_among,
    laid_out,
    layouts,
    refuses,
    seeds,
    sizes,
    spoilt,
    tiled,
)

# Interpreted, kernels are numpy: exp may overflow to infinity, and poisoned examples are full of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

any_tile = st.builds(
    attention_tiles.AttentionTile,
    block_m=st.sampled_from([16, 32]),
    block_n=st.sampled_from([16, 32]),
    num_warps=st.just(4),
    num_stages=st.just(2),
)


@dataclass(frozen=True)
class Mask:
    """kind: "boolean" or "additive", with -inf among its values or not; shape: broadcastable to [B, H, Nq, Nk]."""

    kind: str
    infinite: bool
    shape: tuple[int, ...]
    dtype: torch.dtype

    def build(self, draw: Draw) -> torch.Tensor:
        allowed = draw.chance(0.7, *self.shape)
        if self.kind == "boolean":
            return allowed
        values = draw.normal(*self.shape, std=2.0).to(self.dtype)
        return values.masked_fill(~allowed, -torch.inf) if self.infinite else values


@dataclass(frozen=True)
class Case:
    """One call of `attention`, as data. sizes: images, queries, keys, key heads, query heads per key head, width."""

    dtype: torch.dtype
    seed: int
    sizes: tuple[int, int, int, int, int, int]
    options: dict[str, Any]
    lengths: tuple[int, ...] | None
    integers: torch.dtype
    mask: Mask | None
    layouts: dict[str, Layout]
    tile: attention_tiles.AttentionTile

    def build(self, draw: Draw) -> Arguments:
        """Arguments of the reference, contiguous."""
        batch, queries, keys, heads_k, group, width = self.sizes
        arguments = draw_qkv(draw, batch, queries, keys, heads_k * group, heads_k, width)
        arguments["mask"] = None if self.mask is None else self.mask.build(draw)
        lengths = None if self.lengths is None else torch.tensor(self.lengths, dtype=self.integers).to(draw.device)
        return laid_out(arguments | self.options | {"key_lengths": lengths}, self.layouts)[0]

    def both(self) -> tuple[Arguments, Arguments]:
        """Arguments of the launcher, contiguous and in the drawn layouts."""
        return laid_out(self.build(Draw(self.dtype, self.seed)), self.layouts)

    def run(self, arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
        with tiled(attention=self.tile):
            return attention(**arguments, return_lse=True)


@st.composite
def masks(draw: st.DrawFn, full: tuple[int, ...], dtype: torch.dtype) -> Mask:
    axes = draw(st.sampled_from([4, 3, 2, 1]))
    shape = tuple(1 if draw(st.booleans()) else n for n in full[4 - axes :])
    kind = draw(st.sampled_from(["boolean", "additive"]))
    return Mask(kind, draw(st.booleans()), shape, draw(st.sampled_from([dtype, torch.float32])))


@st.composite
def cases(draw: st.DrawFn, least_batch: int = 0) -> Case:
    batch = draw(batches(least_batch, 2))
    heads_k, group = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (1, 3), (3, 2)]))
    queries, keys = draw(sizes(0, 34)), draw(sizes(0, 50))
    width = draw(st.one_of(sizes(1, 40), st.sampled_from([64, 72, 80, 128])))
    dtype = draw(dtypes)
    full = (batch, heads_k * group, queries, keys)
    mask = draw(st.one_of(st.none(), masks(full, dtype), masks(full, dtype)))
    layout = {name: layouts(4) for name in ("q", "k", "v")}
    layout |= {} if mask is None else {"mask": layouts(len(mask.shape))}
    lengths = st.tuples(*[st.integers(-2, keys + 2)] * batch)
    return Case(
        dtype,
        draw(seeds),
        (batch, queries, keys, heads_k, group, width),
        {"causal": draw(st.booleans()), "scale": draw(st.one_of(st.none(), st.floats(0.02, 1.0)))},
        draw(st.one_of(st.none(), lengths)),
        draw(st.sampled_from([torch.int32, torch.int64])),
        mask,
        {name: draw(strategy) for name, strategy in layout.items()},
        draw(any_tile),
    )


@pytest.mark.sanitize
@given(cases())
def test_agrees_with_the_reference(case: Case) -> None:
    o, lse = case.run(case.both()[1])
    assert o.is_contiguous()
    judge_among(o, reference.attention, case.build, case.dtype, case.seed, pick=0)
    judge_among(lse, reference.attention, case.build, case.dtype, case.seed, pick=1, one_row=True)


@given(cases())
def test_layout_changes_no_bit(case: Case) -> None:
    dense, views = case.both()
    for ours, expected in zip(case.run(views), case.run(dense), strict=True):
        same_bits(ours, expected)


def _some(arguments: Arguments, axis: int, chosen: Any) -> Arguments:
    """The same call for some of the images (axis 0 of everything) or query heads (axis 2 of q, 1 of the mask)."""
    mask = arguments["mask"]
    if mask is not None and mask.ndim >= (4, 0, 3)[axis]:
        at = mask.ndim - (4, 0, 3)[axis]
        mask = mask if mask.shape[at] == 1 else mask.index_select(at, chosen)
    some = {"mask": mask, "q": arguments["q"].index_select(axis, chosen)}
    if axis == 0:
        some |= {name: arguments[name].index_select(0, chosen) for name in ("k", "v")}
        lengths = arguments["key_lengths"]
        some["key_lengths"] = None if lengths is None else lengths.index_select(0, chosen)
    return arguments | some


@given(cases(least_batch=1), st.data())
def test_an_image_alone_is_the_image_in_its_batch(case: Case, data: st.DataObject) -> None:
    arguments = case.both()[0]
    image = torch.tensor([data.draw(st.integers(0, case.sizes[0] - 1), label="image")], device=arguments["q"].device)
    alone = case.run(_some(arguments, 0, image))
    for ours, whole in zip(alone, case.run(arguments), strict=True):
        same_bits(ours, whole.index_select(0, image))


@given(cases(), st.data())
def test_query_heads_in_another_order(case: Case, data: st.DataObject) -> None:
    """Within their groups, and the groups with their key heads."""
    heads_k, group = case.sizes[3:5]
    arguments = case.both()[0]
    order_k = data.draw(st.permutations(range(heads_k)), label="key heads")
    order = [h * group + g for h in order_k for g in data.draw(st.permutations(range(group)), label="query heads")]
    chosen = torch.tensor(order, device=arguments["q"].device)
    keys = {name: arguments[name][:, :, list(order_k)] for name in ("k", "v")}
    o, lse = case.run(_some(arguments, 2, chosen) | keys)
    clean_o, clean_lse = case.run(arguments)
    same_bits(o, clean_o.index_select(2, chosen))
    same_bits(lse, clean_lse.index_select(1, chosen))


@given(cases(), st.data())
def test_queries_do_not_mix(case: Case, data: st.DataObject) -> None:
    arguments = case.both()[0]
    queries = case.sizes[1]
    clean = case.run(arguments)
    query = data.draw(st.integers(0, max(queries - 1, 0)), label="query")
    q = arguments["q"].clone()
    q[:, query : query + 1] = float("nan")
    ours = case.run(arguments | {"q": q})
    others = [i for i in range(queries) if i != query]
    same_bits(ours[0][:, others], clean[0][:, others])
    same_bits(ours[1][..., others], clean[1][..., others])


@given(cases(), st.data())
def test_keys_in_another_order(case: Case, data: st.DataObject) -> None:
    """The sum over the keys has no order, beyond its roundings; so neither has the result, where every key counts."""
    keys = case.sizes[2]
    order = data.draw(st.permutations(range(keys)), label="keys")
    every_key = {"causal": False, "key_lengths": None}
    arguments: Arguments = case.both()[0] | every_key
    shuffled = {name: arguments[name][:, list(order)] for name in ("k", "v")}
    mask = arguments["mask"]
    if mask is not None and mask.shape[-1] == keys:
        shuffled["mask"] = mask[..., list(order)]
    o, _ = case.run(arguments | shuffled)
    judge_among(o, reference.attention, lambda draw: case.build(draw) | every_key, case.dtype, case.seed, pick=0)


@given(cases(), st.integers(1, 40))
def test_keys_beyond_the_length_do_not_exist(case: Case, more: int) -> None:
    """However many there are, and NaN all of them. (With causal order the diagonal would move with their number.)"""
    batch, _, keys, heads_k, _, width = case.sizes
    arguments: Arguments = case.both()[0] | {"causal": False}
    if arguments["key_lengths"] is None:
        arguments["key_lengths"] = torch.full((batch,), keys, dtype=torch.int32, device=arguments["q"].device)
    arguments["key_lengths"] = arguments["key_lengths"].clamp(max=keys)
    beyond = arguments["k"].new_full((batch, more, heads_k, width), float("nan"))
    padded = {name: torch.cat([arguments[name], beyond], 1) for name in ("k", "v")}
    mask = arguments["mask"]
    if mask is not None and mask.shape[-1] != 1:
        padded["mask"] = torch.cat([mask, mask.new_ones(*mask.shape[:-1], more)], -1)
    for ours, expected in zip(case.run(arguments | padded), case.run(arguments), strict=True):
        same_bits(ours, expected)


@given(st.sampled_from(("q", "k", "v", "mask", "key_lengths")), st.sampled_from(SPOILT), st.data())
def test_refuses_a_spoilt_argument(name: str, how: str, data: st.DataObject) -> None:
    # Two of each, so that one more is never a size that broadcasts or divides.
    draw = Draw(torch.float32)
    good = draw_qkv(draw, 2, 2, 2, 2, 2, data.draw(st.integers(1, 5))) | {"mask": draw.normal(2, 2, 2, 2)}
    good["key_lengths"] = torch.ones(2, dtype=torch.int64, device=good["q"].device)
    axis = data.draw(st.integers(0, good[name].ndim - 1), label="axis")
    refuses(attention, good, name, spoilt(good[name], how, axis), how)
