"""`attention` by the kernel whose warps have roles. It is in Gluon, which has no interpreter: sanitized, or
executed."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from vit_kernels import attention_tiles, reference
from vit_kernels.attention_costs import ROLES_TILES
from vit_kernels.attention_tiles import (
    attention_cycles,
    attention_shared_bytes,
    blocks_of_keys,
    choose_attention,
    may_have_roles,
)
from vit_kernels.device import A100, B200, H100

from ..rung import RUNG
from ..weights import Draw
from .common import attention, judge, sanitize_bfloat16

attention_module = importlib.import_module("vit_kernels.attention")

compiled_code = pytest.mark.skipif(
    RUNG == "interpreted" or (RUNG == "executed" and torch.cuda.get_device_capability() != (9, 0)),
    reason="a kernel in Gluon for sm_90: no interpreter runs it, and no other GPU",
)
(TILE,) = ROLES_TILES


@pytest.fixture
def programs(monkeypatch):
    """Makes launches take the tile whose warps have roles, with at most so many programs."""

    def pretend(number):
        device_of = attention_module.device_of
        monkeypatch.setattr(attention_tiles, "choose_attention", lambda *a, **k: TILE)
        monkeypatch.setattr(attention_module, "device_of", lambda x: replace(device_of(x), sm_count=number))

    return pretend


def inputs(dtype: torch.dtype, seed: int, queries: int, keys: int, batch: int = 1, heads: int = 1) -> dict[str, Any]:
    draw = Draw(dtype, seed=seed)
    lengths = {"q": queries, "k": keys, "v": keys}
    return {name: draw.normal(batch, length, heads, 64) for name, length in lengths.items()}


# The sanitizer takes a minute for a kernel of this kind: one dtype, and few kinds.
@compiled_code
@sanitize_bfloat16
def test_whole_blocks_a_half_and_a_rest(dtype, programs):
    """341 keys are 2 x 128 + 64 + 21; of 133 queries the last 5 are alone with their warpgroup.

    Four queries have a key above all others, in the first block, in the second, among the 64 and among the 21. 2^200 is
    no fp32 number: what came before a new maximum has to vanish, and what comes behind it too.
    """
    programs(1)
    arguments = inputs(dtype, 61, 133, 341)
    for query, key in ((5, 3), (7, 200), (9, 300), (11, 335)):
        arguments["k"][:, key] = 64 * arguments["q"][:, query]
    judge(attention(**arguments), reference.attention, arguments, pick=0)


@compiled_code
@sanitize_bfloat16
def test_programs_go_through_several_tiles_of_several_heads(dtype, programs):
    """The second of a head's two tiles has one query, and two warpgroups without any. Four programs have ten tiles: the
    slots for queries and those for keys go round, and not everybody has a tile in the third round."""
    programs(4)
    arguments = inputs(dtype, 62, 193, 257, heads=5)
    arguments["scale"] = 0.3
    judge(attention(**arguments), reference.attention, arguments, pick=0)


@compiled_code
@sanitize_bfloat16
def test_no_key_left_over(dtype, programs):
    programs(1)
    arguments = inputs(dtype, 63, 20, 384)
    judge(attention(**arguments), reference.attention, arguments, pick=0)


@compiled_code
@sanitize_bfloat16
def test_an_images_neighbours_may_hold_anything(dtype, programs):
    """The rows behind the last key are those of the next image: they must not be read even with a weight of 0. Their
    scores of 0 are above all others here."""
    programs(3)
    arguments = inputs(dtype, 64, 66, 266, batch=3)
    arguments["q"], arguments["k"] = arguments["q"].abs() + 1, -arguments["k"].abs() - 1
    for name in "qkv":
        arguments[name][0], arguments[name][2] = float("nan"), float("inf")
    middle = {name: value[1:2] for name, value in arguments.items()}
    judge(attention(**arguments)[1:2], reference.attention, middle, pick=0)


@compiled_code
@pytest.mark.sanitize
@pytest.mark.parametrize("what", ["mask", "causal", "key_lengths", "return_lse", "heads", "few keys"])
def test_it_refuses_what_it_does_not_compute(what, programs):
    programs(1)
    arguments = inputs(torch.float16, 55, 70, 256 if what == "few keys" else 300, heads=2)
    device = arguments["q"].device
    if what == "heads":
        arguments |= {"k": arguments["k"][:, :, :1], "v": arguments["v"][:, :, :1]}
    options = {
        "mask": torch.ones(70, 300, dtype=torch.bool, device=device), "causal": True, "return_lse": True,
        "key_lengths": torch.full((1,), 70, dtype=torch.int32, device=device),
    }  # fmt: skip
    with pytest.raises(ValueError, match="whose warps have roles does not fit"):
        attention(**arguments, **({what: options[what]} if what in options else {}))


def test_which_problems_it_may_compute():
    assert all(may_have_roles(keys, 64, 2, H100, described=True) for keys in (257, 577, 1 << 20))
    for keys, width, itemsize, device in (
        (256, 64, 2, H100), (577, 80, 2, H100), (577, 128, 2, H100), (577, 64, 4, H100), (577, 64, 2, A100),
        (577, 64, 2, B200),
    ):  # fmt: skip
        assert not may_have_roles(keys, width, itemsize, device, described=True)
        assert not choose_attention(768, 577, keys, width, itemsize, device, described=True).roles
    assert not may_have_roles(577, 64, 2, H100, described=False)
    assert not choose_attention(768, 577, 577, 64, 2, H100).roles


def test_which_blocks_keys_come_in():
    found = {keys: blocks_of_keys(keys, 128) for keys in (257, 319, 320, 384, 577, 4096)}
    assert found == {
        257: (2, False, 16), 319: (2, False, 64), 320: (2, True, 0), 384: (3, False, 0), 577: (4, True, 16),
        4096: (32, False, 0),
    }  # fmt: skip
    # Queries of two tiles, and four slots for 128 keys and their values.
    assert attention_shared_bytes(TILE, 64, 2, 577) == (2 * 192 + 4 * 2 * 128) * 64 * 2 + 1024 < H100.shared_memory


def test_modelled_time_of_heads_that_are_long():
    """577 queries are four tiles of three warpgroups, the last with one of them; 132 SMs go through all tiles."""
    tile = 2500 + 4 * 2580 + 1200 + 1500
    for heads, rounds in ((1, 1), (33, 1), (34, 2), (768, 24)):
        cycles = attention_cycles(TILE, heads, 577, 577, 64, H100)
        assert cycles == pytest.approx(2500 + tile + (rounds - 1) * tile * (1 - 0.15 * 2 / 4)), heads
    assert attention_cycles(TILE, 1, 64, 256, 64, H100) == pytest.approx(2500 + (2500 + 2 * 2580) * 0.7)


@pytest.mark.parametrize(
    ("heads", "tokens", "roles"),
    [(12, 577, False), (96, 577, True), (768, 577, True), (384, 1025, True), (128, 4096, True), (768, 257, True)],
)
def test_many_long_heads_have_roles_and_few_do_not(heads, tokens, roles):
    assert choose_attention(heads, tokens, tokens, 64, 2, H100, described=True).roles == roles
