"""`attention` with all keys of a head in shared memory. It is in Gluon, which has no interpreter: sanitized, or
executed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from vit_kernels import attention_tiles, reference
from vit_kernels.attention_costs import WHOLE
from vit_kernels.attention_tiles import AttentionTile, attention_cycles, choose_attention, may_be_whole
from vit_kernels.device import A100, B200, H100

from ..rung import RUNG
from ..weights import Draw
from .common import attention, judge, sanitize_bfloat16, sanitize_half

attention_module = importlib.import_module("vit_kernels.attention")

compiled_code = pytest.mark.skipif(
    RUNG == "interpreted" or (RUNG == "executed" and torch.cuda.get_device_capability() != (9, 0)),
    reason="a kernel in Gluon for sm_90: no interpreter runs it, and no other GPU",
)


@pytest.fixture
def whole(monkeypatch):
    """Makes launches take a tile whose programs go through so many tiles of 64 queries."""

    def pretend(tiles):
        tile = AttentionTile(64, 64, 4, 2, tiles)
        monkeypatch.setattr(attention_tiles, "choose_attention", lambda *a, **k: tile)

    return pretend


def packed(dtype: torch.dtype, seed: int, batch: int, tokens: int, heads: int) -> dict[str, Any]:
    return dict(zip("qkv", Draw(dtype, seed=seed).normal(batch, tokens, 3, heads, 64).unbind(2), strict=True))


@compiled_code
@sanitize_half
def test_four_tiles_of_queries_go_through_two_slots(dtype, whole):
    """197 tokens: 3 blocks of keys and 5 left over; the last tile of queries has 5 rows, too."""
    whole(4)
    arguments = packed(dtype, 51, 1, 197, 1)
    judge(attention(**arguments), reference.attention, arguments, pick=0)


@compiled_code
@sanitize_bfloat16
def test_several_programs_share_a_head_and_several_heads_an_image(dtype, whole):
    whole(1)
    arguments = packed(dtype, 52, 2, 70, 2)
    arguments["scale"] = 0.3
    judge(attention(**arguments), reference.attention, arguments, pick=0)


@compiled_code
@sanitize_bfloat16
@pytest.mark.parametrize(("queries", "keys"), [(260, 64), (20, 256)], ids=str)
def test_other_queries_than_keys_and_no_key_left_over(dtype, queries, keys, whole):
    whole(2)
    draw = Draw(dtype, seed=53)
    arguments = {"q": draw.normal(1, queries, 1, 64)} | {name: draw.normal(1, keys, 1, 64) for name in "kv"}
    judge(attention(**arguments), reference.attention, arguments, pick=0)


@compiled_code
@sanitize_bfloat16
@pytest.mark.parametrize("key", [3, 66], ids=["in a block", "left over"])
def test_one_key_above_all_others(dtype, key, whole):
    """2^200 is no fp32 number: the maximum must be that of all keys."""
    whole(2)
    arguments = packed(dtype, 56, 1, 70, 1)
    arguments["k"][:, key] = 64 * arguments["q"][:, 5]
    judge(attention(**arguments), reference.attention, arguments, pick=0)


@compiled_code
@sanitize_bfloat16
def test_an_images_neighbours_may_hold_anything(dtype, whole):
    """The rows behind the last key are those of the next image: they must not be read even with a weight of 0."""
    whole(2)
    arguments = packed(dtype, 54, 3, 66, 1)
    for name in "qkv":
        arguments[name][0], arguments[name][2] = float("nan"), float("inf")
    middle = {name: value[1:2] for name, value in arguments.items()}
    judge(attention(**arguments)[1:2], reference.attention, middle, pick=0)


@compiled_code
@pytest.mark.sanitize
@pytest.mark.parametrize("what", ["mask", "causal", "key_lengths", "return_lse", "heads"])
def test_it_refuses_what_it_does_not_compute(what, whole):
    whole(1)
    arguments = packed(torch.float16, 55, 1, 70, 2)
    device = arguments["q"].device
    if what == "heads":
        arguments |= {"k": arguments["k"][:, :, :1], "v": arguments["v"][:, :, :1]}
    options = {
        "mask": torch.ones(70, 70, dtype=torch.bool, device=device), "causal": True, "return_lse": True,
        "key_lengths": torch.full((1,), 70, dtype=torch.int32, device=device),
    }  # fmt: skip
    with pytest.raises(ValueError, match="all keys in shared memory does not fit"):
        attention(**arguments, **({what: options[what]} if what in options else {}))


def test_which_problems_it_may_compute():
    assert all(may_be_whole(keys, 64, 2, H100, described=True) for keys in (64, 197, 256))
    for keys, width, itemsize, device in (
        (63, 64, 2, H100), (257, 64, 2, H100), (197, 80, 2, H100), (197, 64, 4, H100), (197, 64, 2, A100),
        (197, 64, 2, B200),
    ):  # fmt: skip
        assert not may_be_whole(keys, width, itemsize, device, described=True)
        assert not choose_attention(768, 197, keys, width, itemsize, device, described=True).whole
    assert not may_be_whole(197, 64, 2, H100, described=False)
    assert not choose_attention(768, 197, 197, 64, 2, H100).whole


def test_modelled_time_of_heads_that_are_whole():
    """A head of 197 tokens has four tiles, each with three blocks and a rest."""

    def cycles(each, heads, queries=197, keys=197):
        return attention_cycles(AttentionTile(64, 64, 4, 2, each), heads, queries, keys, 64, H100)

    tile = WHOLE.tile + 3 * WHOLE.block + WHOLE.rest
    assert cycles(2, 132) == 2 * WHOLE.start + tile * (4 + 2 * (1 + 4 * WHOLE.longer))
    assert cycles(8, 132) == cycles(4, 132), "no program has more tiles than its head"
    assert cycles(4, 1) == 4 * tile * WHOLE.alone
    assert cycles(1, 132, 64, 128) == pytest.approx(
        WHOLE.start + (WHOLE.tile + 2 * WHOLE.block) * (2 + WHOLE.longer)
    ), "nothing is left over"


@pytest.mark.parametrize(("heads", "tiles"), [(12, 1), (96, 1), (192, 2), (384, 2), (768, 2), (1024, 2)])
def test_programs_take_as_many_tiles_as_was_fastest(heads, tiles):
    """Measured on an H100: bench/measured/h100_sixth.md."""
    assert choose_attention(heads, 197, 197, 64, 2, H100, described=True).whole == tiles


def test_heads_lie_side_by_side_or_not():
    qkv = torch.zeros(2, 9, 3, 4, 64, dtype=torch.float16)
    adjoin = attention_module.heads_adjoin
    assert all(map(adjoin, qkv.unbind(2))) and adjoin(qkv[:, :, 0, :1])
    assert not adjoin(qkv[:, :, 0].transpose(1, 2)) and not adjoin(qkv[:, :, 0, ::2])
    assert not adjoin(qkv[:, :, 0].transpose(2, 3)) and not adjoin(qkv[..., :60])
    assert not adjoin(torch.zeros(8 * 9 * 64 + 1, dtype=torch.float16)[1:].view(2, 9, 4, 64))
