"""attention against float64: shapes, masks, head widths, layouts."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from vit_bench.tolerance import check
from vit_kernels import attention_tiles, reference

from ..rung import DEVICE
from ..weights import Draw, nan_framed
from .common import (
    IEEE_ERROR,
    attention,
    every_dtype,
    in_float64,
    judge,
    same_bits,
    sanitize_bfloat16,
    sanitize_every_dtype,
)


def draw_qkv(draw: Draw, batch: int, nq: int, nk: int, heads: int, heads_k: int, width: int) -> dict[str, Any]:
    return {
        "q": draw.normal(batch, nq, heads, width),
        "k": draw.normal(batch, nk, heads_k, width),
        "v": draw.normal(batch, nk, heads_k, width),
    }


def judge_attention(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel, judges both results and returns them."""
    o, lse = attention(**arguments, return_lse=True)
    assert o.shape == arguments["q"].shape
    assert o.is_contiguous()
    assert lse.dtype == torch.float32
    judge(o, reference.attention, arguments, pick=0)
    eager, truth = reference.attention(**arguments)[1], reference.attention(**in_float64(arguments))[1]
    # One row of all: a log-sum-exp near zero is a difference of numbers as large as the others.
    check(*(x.reshape(1, -1) for x in (lse, eager, truth)), name="lse")
    return o, lse


@sanitize_every_dtype
@pytest.mark.parametrize(
    ("batch", "n", "heads", "width"),
    [
        pytest.param(1, 1, 3, 64, id="1-token"),
        pytest.param(3, 15, 2, 64, id="15-tokens-batch-3"),
        pytest.param(2, 17, 3, 64, id="17-tokens"),
        pytest.param(1, 50, 5, 64, id="50-tokens-5-heads"),
        pytest.param(1, 197, 1, 64, id="197-tokens"),
        pytest.param(1, 64, 1, 64, id="exactly-one-tile"),
        pytest.param(1, 129, 1, 64, id="one-more-than-two-tiles"),
    ],
)
def test_token_counts(dtype, batch, n, heads, width):
    judge_attention(draw_qkv(Draw(dtype, seed=n), batch, n, n, heads, heads, width))


@every_dtype
@pytest.mark.parametrize("tokens", [257, 577])
def test_many_tokens(dtype, tokens):
    judge_attention(draw_qkv(Draw(dtype, seed=tokens), 1, tokens, tokens, 1, 1, 64))


@sanitize_bfloat16
@pytest.mark.parametrize("width", [16, 32, 40, 64, 72, 80, 88, 96, 128])
def test_head_widths(dtype, width):
    judge_attention(draw_qkv(Draw(dtype, seed=width), 1, 20, 70, 1, 1, width))


@sanitize_bfloat16
@pytest.mark.parametrize("width", [1, 7, 33, 65, 127])
def test_odd_head_widths(dtype, width):
    judge_attention(draw_qkv(Draw(dtype, seed=width), 1, 5, 19, 1, 1, width))


@sanitize_bfloat16
@pytest.mark.parametrize(
    ("nq", "nk"),
    [
        pytest.param(1, 197, id="one-query"),
        pytest.param(17, 130, id="fewer-queries"),
        pytest.param(130, 17, id="more-queries"),
        pytest.param(33, 1, id="one-key"),
        pytest.param(70, 70, id="as-many"),
    ],
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_queries_and_keys_of_different_number(dtype, nq, nk, causal):
    o, lse = judge_attention(draw_qkv(Draw(dtype, seed=nq), 2, nq, nk, 1, 1, 32) | {"causal": causal})
    if causal and nq > nk:
        assert torch.equal(o[:, : nq - nk], torch.zeros_like(o[:, : nq - nk]))
        assert torch.isneginf(lse[:, :, : nq - nk]).all()
        assert torch.isfinite(lse[:, :, nq - nk :]).all()


@sanitize_bfloat16
@pytest.mark.parametrize("rest", [0, 5, 20, 40], ids=["none", "16-wide", "32-wide", "64-wide"])
@pytest.mark.parametrize("width", [40, 64])
@pytest.mark.parametrize("whole", [0, 1, 2])
def test_keys_left_over_by_whole_blocks(dtype, whole, width, rest, monkeypatch):
    """They come first, in a block of 16, 32 or 64, and NaN beyond them is not read; scores grow along the keys."""
    tile = attention_tiles.AttentionTile(16, 64, 4, 2)
    monkeypatch.setattr(attention_tiles, "choose_attention", lambda *a, **k: tile)
    keys = 64 * whole + rest
    if keys == 0:
        pytest.skip("no keys at all")
    arguments = draw_qkv(Draw(dtype, seed=keys), 2, 19, keys, 2, 1, width)
    arguments["k"] *= torch.linspace(0.3, 3.0, keys, device=DEVICE)[None, :, None, None].to(dtype)
    o, lse = judge_attention(arguments)
    framed = attention(**{name: nan_framed(x) for name, x in arguments.items()}, return_lse=True)
    same_bits(framed[0], o)
    same_bits(framed[1], lse)


@sanitize_bfloat16
@pytest.mark.parametrize(
    ("causal", "integers"),
    [pytest.param(False, torch.int32, id="full-int32"), pytest.param(True, torch.int64, id="causal-int64")],
)
def test_key_lengths(dtype, causal, integers):
    """Nothing, one key, an odd number, a whole tile, all of them."""
    lengths = [0, 1, 37, 64, 100]
    arguments = draw_qkv(Draw(dtype, seed=1), 5, 17, 100, 1, 1, 32)
    arguments |= {"causal": causal, "key_lengths": torch.tensor(lengths, dtype=integers, device=DEVICE)}
    o, lse = judge_attention(arguments)
    assert torch.equal(o[0], torch.zeros_like(o[0]))
    assert torch.isneginf(lse[0]).all()


@sanitize_bfloat16
def test_key_lengths_are_clamped(dtype):
    arguments = draw_qkv(Draw(dtype, seed=2), 2, 20, 70, 2, 2, 32)
    outside = attention(**arguments, key_lengths=torch.tensor([-5, 1000], device=DEVICE))
    same_bits(outside, attention(**arguments, key_lengths=torch.tensor([0, 70], device=DEVICE)))


MASK_SHAPES = [
    pytest.param((5, 20), id="queries-keys"),
    pytest.param((1, 1, 5, 20), id="1-1-queries-keys"),
    pytest.param((2, 1, 5, 20), id="batch-1-queries-keys"),
    pytest.param((1, 3, 5, 20), id="1-heads-queries-keys"),
    pytest.param((2, 3, 5, 20), id="batch-heads-queries-keys"),
    pytest.param((3, 5, 20), id="heads-queries-keys"),
    pytest.param((2, 1, 1, 20), id="batch-1-1-keys"),
    pytest.param((2, 3, 1, 20), id="batch-heads-1-keys"),
    pytest.param((20,), id="keys"),
    pytest.param((2, 1, 5, 1), id="batch-1-queries-1"),
    pytest.param((3, 1, 1), id="heads-1-1"),
    pytest.param((1,), id="one"),
]


def draw_boolean(draw: Draw, shape: tuple[int, ...]) -> torch.Tensor:
    return draw.normal(*shape) > -0.5


@sanitize_bfloat16
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_boolean_mask(dtype, shape):
    draw = Draw(dtype, seed=3)
    judge_attention(draw_qkv(draw, 2, 5, 20, 3, 3, 16) | {"mask": draw_boolean(draw, shape)})


@sanitize_bfloat16
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_additive_mask(dtype, shape):
    draw = Draw(dtype, seed=4)
    judge_attention(draw_qkv(draw, 2, 5, 20, 3, 3, 16) | {"mask": draw.normal(*shape, std=2.0)})


@sanitize_bfloat16
def test_additive_mask_of_another_dtype(dtype):
    """A float32 bias beside 16-bit queries is used as it is, not rounded."""
    draw = Draw(dtype, seed=5)
    mask = Draw(torch.float32, seed=6).normal(5, 20, std=2.0)
    judge_attention(draw_qkv(draw, 2, 5, 20, 3, 3, 16) | {"mask": mask})


@sanitize_bfloat16
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_rows_without_an_allowed_key(dtype, kind):
    """The first image has them at both ends of its tiles, the second has none allowed at all."""
    draw = Draw(dtype, seed=7)
    allowed = draw_boolean(draw, (2, 1, 70, 70))
    allowed[0, 0, [0, 3, 63, 64, 69]] = False
    allowed[0, 0, 5, :64] = False
    allowed[1] = False
    mask = allowed if kind == "boolean" else torch.zeros(allowed.shape, device=DEVICE).masked_fill(~allowed, -torch.inf)
    o, lse = judge_attention(draw_qkv(draw, 2, 70, 70, 1, 1, 32) | {"mask": mask})
    for gone in (o[0, [0, 3, 63, 64, 69]], o[1]):
        assert torch.equal(gone, torch.zeros_like(gone))
    assert torch.isneginf(lse[0][:, [0, 3, 63, 64, 69]]).all()
    assert torch.isneginf(lse[1]).all()
    assert torch.isfinite(lse[0, :, 5]).all()


@sanitize_bfloat16
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks_over_many_tiles(dtype, kind, causal, monkeypatch):
    """Blocks of keys inside the sequence are computed apart from those at its end, and the last tile of queries has
    rows past the end: masks hold everywhere, also for a row without an allowed key in the first blocks.
    """
    tile = attention_tiles.AttentionTile(16, 16, 4, 2)
    monkeypatch.setattr(attention_tiles, "choose_attention", lambda *a, **k: tile)
    draw = Draw(dtype, seed=20)
    allowed = draw_boolean(draw, (2, 2, 21, 50))
    allowed[0, 0, 3] = False
    allowed[1, :, 20, :32] = False
    mask = allowed if kind == "boolean" else draw.normal(*allowed.shape).masked_fill(~allowed, -torch.inf)
    judge_attention(draw_qkv(draw, 2, 21, 50, 2, 1, 40) | {"mask": mask, "causal": causal})


@sanitize_bfloat16
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_conditions_add_up(dtype, kind):
    """Mask, causal order and key lengths together."""
    draw = Draw(dtype, seed=8)
    mask = draw_boolean(draw, (2, 1, 17, 70)) if kind == "boolean" else draw.normal(2, 1, 17, 70)
    lengths = torch.tensor([33, 70], device=DEVICE)
    judge_attention(draw_qkv(draw, 2, 17, 70, 2, 1, 32) | {"mask": mask, "causal": True, "key_lengths": lengths})


@sanitize_bfloat16
@pytest.mark.parametrize("heads_k", [1, 2, 6])
def test_grouped_heads(dtype, heads_k):
    judge_attention(draw_qkv(Draw(dtype, seed=9), 2, 17, 35, 6, heads_k, 32))


@every_dtype
@pytest.mark.parametrize("scale", [0.02, 1.0, 3.0])
def test_scale(dtype, scale):
    judge_attention(draw_qkv(Draw(dtype, seed=10), 1, 17, 70, 2, 2, 32) | {"scale": scale})


@sanitize_bfloat16
def test_large_scores(dtype):
    """Scores of several hundred: only a running maximum keeps the exponentials finite, and it grows along the keys."""
    arguments = draw_qkv(Draw(dtype, seed=11), 1, 17, 200, 1, 1, 32)
    arguments["k"] *= torch.linspace(0.1, 30.0, 200, device=DEVICE)[None, :, None, None].to(dtype)
    arguments["q"] *= 10
    o, lse = attention(**arguments, return_lse=True)
    assert lse.max() > 500
    check(o, *(reference.attention(**a)[0] for a in (arguments, in_float64(arguments))))


@sanitize_bfloat16
@pytest.mark.parametrize(
    ("batch", "nq", "nk"),
    [pytest.param(0, 5, 7, id="batch-0"), pytest.param(2, 0, 7, id="no-queries"), pytest.param(2, 5, 0, id="no-keys")],
)
def test_nothing_to_do(dtype, batch, nq, nk):
    o, lse = attention(**draw_qkv(Draw(dtype), batch, nq, nk, 2, 2, 32), return_lse=True)
    assert o.shape == (batch, nq, 2, 32)
    assert lse.shape == (batch, 2, nq)
    assert torch.equal(o, torch.zeros_like(o))
    assert torch.isneginf(lse).all()


@sanitize_bfloat16
@pytest.mark.parametrize("width", [64, 40])
def test_packed_projection_by_strides(dtype, width):
    """q, k, v as views of [B, N, 3, H, D]: no copy, and the same bits as from tensors of their own."""
    qkv = Draw(dtype, seed=12).normal(2, 50, 3, 2, width)
    q, k, v = qkv.unbind(2)
    same_bits(attention(q, k, v), attention(q.contiguous(), k.contiguous(), v.contiguous()))


@sanitize_bfloat16
@pytest.mark.parametrize("width", [64, 40])
def test_foreign_values_change_no_bit(dtype, width, monkeypatch):
    """NaN on every side of every tensor: beyond the tokens, the heads, the head width and the mask. No descriptor can
    load a tensor in such a frame, and the kernel must be the same without one."""
    monkeypatch.setattr(importlib.import_module("vit_kernels.attention"), "heads_adjoin", lambda x: False)
    draw = Draw(dtype, seed=13)
    arguments = draw_qkv(draw, 2, 17, 70, 1, 1, width)
    masks = {"none": None, "boolean": draw_boolean(draw, (2, 1, 17, 70)), "additive": draw.normal(2, 1, 17, 70)}
    for name, mask in masks.items():
        clean = attention(**arguments, mask=mask)
        framed_mask = mask if mask is None or name == "boolean" else nan_framed(mask)
        same_bits(attention(**{n: nan_framed(x) for n, x in arguments.items()}, mask=framed_mask), clean)


@every_dtype
def test_heads_first_layout(dtype):
    """[B, H, N, D] in memory, as Hugging Face keeps it, seen as [B, N, H, D]."""
    arguments = draw_qkv(Draw(dtype, seed=14), 2, 17, 35, 3, 3, 32)
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in arguments.items()}
    same_bits(attention(**views), attention(**arguments))


@sanitize_bfloat16
def test_keys_beyond_the_length_are_never_read(dtype):
    """They hold NaN, and so do the keys that no query of a causal tile may see."""
    lengths = [0, 1, 37, 64, 100]
    arguments = draw_qkv(Draw(dtype, seed=15), 5, 17, 100, 1, 1, 32)
    arguments["key_lengths"] = torch.tensor(lengths, device=DEVICE)
    clean = attention(**arguments, return_lse=True)
    poisoned = arguments | {name: arguments[name].clone() for name in ("k", "v")}
    for image, length in enumerate(lengths):
        poisoned["k"][image, length:] = float("nan")
        poisoned["v"][image, length:] = float("nan")
    for ours, expected in zip(attention(**poisoned, return_lse=True), clean, strict=True):
        same_bits(ours, expected)


@every_dtype
@pytest.mark.parametrize("parameter", ["q", "k", "v", "mask"])
def test_a_zeroed_argument_is_noticed(dtype, parameter):
    draw = Draw(dtype, seed=16)
    arguments = draw_qkv(draw, 2, 17, 35, 2, 2, 32) | {"mask": draw.normal(17, 35)}
    o = attention(**arguments | {parameter: torch.zeros_like(arguments[parameter])})
    with pytest.raises(AssertionError, match="over the allowed"):
        judge(o, reference.attention, arguments, pick=0)


@sanitize_every_dtype
def test_the_smallest_tile(dtype, monkeypatch):
    """Several tiles of queries and several blocks of keys in every case, whatever the tile choice prefers."""
    tile = attention_tiles.AttentionTile(16, 32, 4, 2)
    monkeypatch.setattr(attention_tiles, "choose_attention", lambda *a, **k: tile)
    for causal in (False, True):
        judge_attention(draw_qkv(Draw(dtype, seed=19), 1, 40, 100, 2, 2, 40) | {"causal": causal})


@every_dtype
def test_log_sum_exp_is_only_an_extra(dtype):
    arguments = draw_qkv(Draw(dtype, seed=18), 1, 17, 35, 2, 2, 32)
    same_bits(attention(**arguments), attention(**arguments, return_lse=True)[0])


def test_float32_is_computed_at_ieee_precision():
    arguments = draw_qkv(Draw(torch.float32, seed=17), 1, 17, 35, 2, 2, 64)
    assert judge(attention(**arguments), reference.attention, arguments, pick=0).row < IEEE_ERROR


@pytest.mark.sanitize
def test_tf32_on_request():
    """Only a GPU and the sanitizer round to tf32; it must be allowed everywhere, and be far from wrong."""
    arguments = draw_qkv(Draw(torch.float32, seed=17), 1, 17, 35, 2, 2, 32)
    exact = reference.attention(**in_float64(arguments))[0]
    assert (attention(**arguments, tf32=True).double() - exact).norm() / exact.norm() < 2e-3


@sanitize_bfloat16
@pytest.mark.parametrize("odd", ["q", "k", "v"])
def test_strides_that_8_divides_beside_some_that_it_does_not(dtype, odd):
    """The kernel is told of 8 only where it divides the strides of all three; here one lies in rows of 9."""
    arguments = draw_qkv(Draw(dtype, seed=18), 2, 17, 35, 3, 3, 8)
    apart = torch.full((*arguments[odd].shape[:3], 9), float("nan"), dtype=dtype, device=DEVICE)[..., :8]
    same_bits(attention(**{**arguments, odd: apart.copy_(arguments[odd])}), attention(**arguments))
