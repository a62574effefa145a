"""attention_packed against float64 and against attention: sequences of any length, none sees its neighbours."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from vit_kernels import attention_tiles, reference

from ..rung import DEVICE
from ..weights import Draw, nan_framed
from .common import attention, attention_packed, every_dtype, judge, same_bits, sanitize_bfloat16, sanitize_every_dtype

LENGTHS = [5, 0, 37, 1, 64, 0, 17]


def draw_packed(draw: Draw, lengths: list[int], heads: int = 1, heads_k: int = 1, width: int = 32) -> dict[str, Any]:
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)
    return {
        "q": draw.normal(total, heads, width),
        "k": draw.normal(total, heads_k, width),
        "v": draw.normal(total, heads_k, width),
        "cu_seqlens": bounds,
        "max_seqlen": max(lengths, default=0),
    }


@pytest.fixture(autouse=True)
def _small_tile(monkeypatch):
    """Several tiles of queries and blocks of keys in some sequences, a part of one in others."""
    tile = attention_tiles.AttentionTile(32, 16, 4, 2)
    monkeypatch.setattr(attention_tiles, "choose_attention", lambda *a, **k: tile)


@sanitize_every_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_lengths(dtype, causal):
    arguments = draw_packed(Draw(dtype, seed=1), LENGTHS) | {"causal": causal}
    o = attention_packed(**arguments)
    assert o.shape == arguments["q"].shape
    assert o.is_contiguous()
    judge(o, reference.attention_packed, arguments)


@sanitize_bfloat16
@pytest.mark.parametrize("width", [16, 40, 64, 128])
def test_head_widths_and_grouped_heads(dtype, width):
    judge(*both(draw_packed(Draw(dtype, seed=width), [20, 3, 40], 4, 2, width) | {"scale": 0.2}))


def both(arguments: dict[str, Any]) -> tuple[torch.Tensor, Any, dict[str, Any]]:
    return attention_packed(**arguments), reference.attention_packed, arguments


@sanitize_bfloat16
def test_64_bit_bounds_and_a_generous_maximum(dtype):
    arguments = draw_packed(Draw(dtype, seed=2), LENGTHS)
    o = attention_packed(**arguments)
    same_bits(attention_packed(**arguments | {"max_seqlen": 200}), o)
    same_bits(attention_packed(**arguments | {"cu_seqlens": arguments["cu_seqlens"].long()}), o)


@sanitize_bfloat16
@pytest.mark.parametrize("spoilt", [0, 2, 4, 6])
def test_neighbours_change_no_bit(dtype, spoilt):
    """All rows of one sequence are NaN; the others come out as they were."""
    arguments = draw_packed(Draw(dtype, seed=3), LENGTHS)
    clean = attention_packed(**arguments)
    rows = slice(*arguments["cu_seqlens"][spoilt : spoilt + 2].tolist())
    for name in ("q", "k", "v"):
        arguments[name][rows] = float("nan")
    ours = attention_packed(**arguments)
    assert torch.isnan(ours[rows]).all()
    same_bits(torch.cat([ours[: rows.start], ours[rows.stop :]]), torch.cat([clean[: rows.start], clean[rows.stop :]]))


@sanitize_bfloat16
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [1, 32, 50])
def test_one_sequence_is_attention(dtype, length, causal):
    arguments = draw_packed(Draw(dtype, seed=4), [length]) | {"causal": causal}
    q, k, v = (arguments[name][None] for name in ("q", "k", "v"))
    alone = attention(q, k, v, causal=causal, key_lengths=torch.tensor([length], device=DEVICE))
    same_bits(attention_packed(**arguments)[None], alone)


@every_dtype
def test_strides(dtype):
    """Views of a packed projection [T, 3, H, D], and foreign values on every side."""
    arguments = draw_packed(Draw(dtype, seed=5), LENGTHS)
    clean = attention_packed(**arguments)
    tensors = [arguments[name] for name in ("q", "k", "v")]
    views = dict(zip("qkv", torch.stack(tensors, 1).unbind(1), strict=True))
    same_bits(attention_packed(**arguments | views), clean)
    framed = {name: nan_framed(x) for name, x in zip("qkv", tensors, strict=True)}
    same_bits(attention_packed(**arguments | framed), clean)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=["no-sequence", "empty", "two-empty"])
def test_nothing_to_do(lengths):
    arguments = draw_packed(Draw(torch.float32), lengths)
    assert attention_packed(**arguments).shape == (0, 1, 32)


def test_rows_of_no_sequence_are_left_alone(monkeypatch):
    """Before the first and behind the last sequence."""
    arguments = draw_packed(Draw(torch.float32, seed=6), [7, 20, 9])
    inner = arguments | {"cu_seqlens": arguments["cu_seqlens"][1:3].contiguous()}
    module = importlib.import_module("vit_kernels.attention_packed")
    monkeypatch.setattr(module, "allocate", lambda like, shape: torch.full(shape, 7.0, device=like.device))
    o = attention_packed(**inner)
    assert (o[:7] == 7.0).all()
    assert (o[27:] == 7.0).all()
    same_bits(o[7:27], attention_packed(**arguments)[7:27])


BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("q", torch.ones(10, 32), ValueError, "q must have 3 dimensions"),
    ("k", torch.ones(9, 1, 32), ValueError, "k must have as many rows as q, 10"),
    ("cu_seqlens", [0, 10], TypeError, "cu_seqlens must be a torch.Tensor; got list"),
    ("cu_seqlens", torch.tensor([0.0, 10.0]), TypeError, "cu_seqlens must have dtype int32 or int64; got float32"),
    ("cu_seqlens", torch.zeros(0, dtype=torch.int32), ValueError, "cu_seqlens must be contiguous, with the shape"),
    ("cu_seqlens", torch.arange(4, dtype=torch.int32)[::2], ValueError, "cu_seqlens must be contiguous"),
    ("max_seqlen", 3.0, TypeError, "max_seqlen must be an int; got 3.0"),
    ("max_seqlen", True, TypeError, "max_seqlen must be an int; got True"),
    ("max_seqlen", -1, ValueError, "max_seqlen must not be negative; got -1"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD)
def test_errors(name, value, error, message):
    arguments = draw_packed(Draw(torch.float32), [4, 6])
    value = value.to(DEVICE) if isinstance(value, torch.Tensor) else value
    with pytest.raises(error, match=message):
        attention_packed(**arguments | {name: value})
