"""qk_rope against float64, timm and Hugging Face."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat

from vit_kernels import qk_rope_tiles, reference

from ..rung import DTYPES
from ..weights import Draw, nan_framed
from .common import every_dtype, judge, qk_rope, same_bits, sanitize_bfloat16, sanitize_every_dtype

NORMS = pytest.mark.parametrize("norm", ["none", "layer", "rms"])
ROPES = pytest.mark.parametrize("rope", ["no-rope", "halves", "interleaved"])


def angles(draw: Draw, *shape: int) -> dict[str, Any]:
    """cos and sin [*shape] in fp32, of angles that differ in every column."""
    turns = 3 * draw.normal(*shape).float()
    return {"cos": turns.cos(), "sin": turns.sin()}


def arguments_of(
    draw: Draw, width: int, norm: str, rope: str, *, tokens: int = 11, heads: tuple[int, int] = (3, 3), prefix: int = 0
) -> dict[str, Any]:
    """Two images' q and k as views of one packed projection, and everything that these options can have."""
    packed = draw.normal(2, tokens, sum(heads), width)
    arguments: dict[str, Any] = {"q": packed[:, :, : heads[0]], "k": packed[:, :, heads[0] :], "norm": norm}
    if norm != "none":
        arguments |= {name: draw.gamma(width) for name in ("q_weight", "k_weight")}
        arguments |= {name: draw.bias(width) for name in ("q_bias", "k_bias")}
    if rope != "no-rope":
        arguments |= angles(draw, tokens - prefix, width)
        arguments |= {"interleaved": rope == "interleaved", "prefix": prefix}
    return arguments


def judge_both(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    results = qk_rope(**arguments)
    for pick, (ours, given) in enumerate(zip(results, (arguments["q"], arguments["k"]), strict=True)):
        assert ours.shape == given.shape and ours.dtype == given.dtype
        assert ours.is_contiguous()
        judge(ours, reference.qk_rope, arguments, pick=pick)
    return results


@sanitize_every_dtype
@NORMS
@ROPES
def test_every_option(dtype, norm, rope):
    """88 is no power of two: the padded columns must not enter the moments."""
    draw = Draw(dtype, seed=1)
    judge_both(arguments_of(draw, 88, norm, rope, prefix=2))


@every_dtype
@pytest.mark.parametrize(
    ("width", "norm", "rope"),
    [
        (1, "layer", "no-rope"),
        (1, "rms", "no-rope"),
        (7, "layer", "no-rope"),
        (33, "rms", "no-rope"),
        (127, "layer", "no-rope"),
        (2, "layer", "halves"),
        (2, "none", "interleaved"),
        (6, "rms", "halves"),
        (6, "layer", "interleaved"),
        (80, "layer", "halves"),
        (128, "rms", "halves"),
        (128, "rms", "interleaved"),
    ],
)
def test_widths(dtype, norm, rope, width):
    judge_both(arguments_of(Draw(dtype, seed=width), width, norm, rope, heads=(1, 1), prefix=1))


@sanitize_bfloat16
@pytest.mark.parametrize("rope", ["halves", "interleaved"])
@pytest.mark.parametrize("heads", [(4, 2), (1, 3), (5, 1)], ids=str)
def test_heads_of_different_number(dtype, rope, heads):
    judge_both(arguments_of(Draw(dtype, seed=2), 12, "layer", rope, heads=heads, prefix=1))


@sanitize_bfloat16
@pytest.mark.parametrize("tile", [(8, 2), (32, 7)], ids=str)
@pytest.mark.parametrize("rope", ["halves", "interleaved"])
def test_tiles_change_no_bit(dtype, rope, tile, monkeypatch):
    """Several programs along tokens and heads, the last ones cut off; and more rows than there are."""
    arguments = arguments_of(Draw(dtype, seed=3), 16, "rms", rope, tokens=19, heads=(3, 2), prefix=9)
    clean = judge_both(arguments)
    monkeypatch.setattr(qk_rope_tiles, "choose_qk_rope", lambda *a, **k: qk_rope_tiles.QkRopeTile(tile[0], tile[1], 4))
    for ours, expected in zip(qk_rope(**arguments), clean, strict=True):
        same_bits(ours, expected)


@sanitize_bfloat16
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 1), (1, 3), (2, 3), (1, 1)], ids=str)
def test_tables_of_images_and_heads(dtype, leading):
    draw = Draw(dtype, seed=4)
    arguments = arguments_of(draw, 16, "none", "halves", prefix=1) | angles(draw, *leading, 10, 16)
    judge_both(arguments)


@sanitize_bfloat16
@pytest.mark.parametrize("tables", DTYPES, ids=str)
@pytest.mark.parametrize("rope", ["halves", "interleaved"])
def test_all_is_computed_in_fp32_and_rounded_once(dtype, rope, tables):
    arguments = arguments_of(Draw(dtype, seed=5), 16, "none", rope, prefix=1)
    arguments |= {name: arguments[name].to(tables) for name in ("cos", "sin")}
    wide = {name: value.float() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    for ours, expected in zip(qk_rope(**arguments), qk_rope(**arguments | wide), strict=True):
        same_bits(ours, expected.to(dtype))


@sanitize_bfloat16
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("rope", ["halves", "interleaved"])
def test_prefix_tokens_are_only_normalised(dtype, rope):
    """Infinity times a sine of 0 is NaN: a class token must not be turned by an angle of 0 instead."""
    arguments = arguments_of(Draw(dtype, seed=6), 16, "none", rope, prefix=3)
    arguments["q"][:, 1, :, 5] = float("inf")
    arguments["k"][:, 2, :, 0] = -0.0
    for ours, given in zip(qk_rope(**arguments), (arguments["q"], arguments["k"]), strict=True):
        same_bits(ours[:, :3], given[:, :3])
        assert not torch.equal(ours[:, 3:], given[:, 3:])
    every = arguments | {"prefix": 11, "cos": arguments["cos"][:0], "sin": arguments["sin"][:0]}
    for ours, given in zip(qk_rope(**every), (arguments["q"], arguments["k"]), strict=True):
        same_bits(ours, given)


@sanitize_bfloat16
@pytest.mark.parametrize("rope", ["halves", "interleaved"])
def test_strides_and_foreign_values_change_no_bit(dtype, rope):
    arguments = arguments_of(Draw(dtype, seed=7), 10, "layer", rope, prefix=1)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    framed = {name: nan_framed(value) for name, value in tensors.items()}
    # The axes that other libraries' tensors have in memory: heads before tokens.
    turned = {name: nan_framed(tensors[name].transpose(1, 2)).transpose(1, 2) for name in ("q", "k")}
    spread = {name: nan_framed(tensors[name].t()).t() for name in ("cos", "sin")}
    clean = qk_rope(**arguments | {name: value.contiguous() for name, value in tensors.items()})
    for views in (framed, turned | spread):
        for ours, expected in zip(qk_rope(**arguments | views), clean, strict=True):
            same_bits(ours, expected)


@sanitize_bfloat16
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_eps(dtype, norm):
    """An eps as large as the variance, and a head without any."""
    arguments: dict[str, Any] = arguments_of(Draw(dtype, seed=8), 20, norm, "no-rope") | {"eps": 1.0}
    arguments["q"][0, 3] = 2.0
    judge_both(arguments)


@sanitize_bfloat16
def test_a_large_common_offset(dtype):
    """E[x^2] - E[x]^2 has no correct digit left in float32 here."""
    arguments = arguments_of(Draw(dtype, seed=9), 80, "layer", "no-rope")
    offset = 4000.0 if dtype == torch.float32 else 500.0
    arguments |= {name: arguments[name] + offset for name in ("q", "k")}
    ours = qk_rope(**arguments)
    for mine, given, side in zip(ours, (arguments["q"], arguments["k"]), "qk", strict=True):
        x = given.double()
        deviation = x - x.mean(-1, keepdim=True)
        truth = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        truth = truth * arguments[f"{side}_weight"].double() + arguments[f"{side}_bias"].double()
        allowed = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        assert (mine.double() - truth).abs().max() < allowed


@every_dtype
@pytest.mark.parametrize("parameter", ["q_weight", "q_bias", "k_weight", "k_bias", "cos", "sin"])
def test_a_zeroed_parameter_is_noticed(dtype, parameter):
    arguments = arguments_of(Draw(dtype, seed=10), 16, "layer", "halves", heads=(1, 1), prefix=1)
    wrong = qk_rope(**arguments | {parameter: torch.zeros_like(arguments[parameter])})
    pick = 1 if parameter.startswith("k") else 0
    with pytest.raises(AssertionError, match="over the allowed"):
        judge(wrong[pick], reference.qk_rope, arguments, pick=pick)


@pytest.mark.parametrize("missing", ["q_weight", "q_bias", "k_weight", "k_bias"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_without_one_parameter(norm, missing):
    judge_both(arguments_of(Draw(torch.float32, seed=11), 16, norm, "no-rope") | {missing: None})


@pytest.mark.parametrize(("batch", "tokens", "heads"), [(0, 5, (2, 2)), (2, 0, (2, 2)), (2, 5, (0, 0)), (2, 5, (0, 3))])
def test_nothing(batch, tokens, heads):
    draw = Draw(torch.float16, seed=12)
    q, k = (draw.normal(batch, tokens, count, 8) for count in heads)
    q_out, k_out = qk_rope(q, k, norm="rms")
    assert (q_out.shape, k_out.shape) == (q.shape, k.shape)
    judge(k_out, reference.qk_rope, {"q": q, "k": k, "norm": "rms"}, pick=1)


TABLES = pytest.mark.parametrize("tables", [torch.float32, torch.float16], ids=["tables-float32", "tables-float16"])


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "halves"])
@TABLES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_timm(dtype, tables, half):
    """timm keeps sin and cos side by side in one table, and leaves prefix tokens to the attention module."""
    draw = Draw(torch.float32, seed=14)
    q, k = draw.normal(2, 7, 3, 16).to(dtype), draw.normal(2, 7, 3, 16).to(dtype)
    turns = angles(draw, 6, 16)
    table = torch.cat([turns["sin"], turns["cos"]], -1).to(torch.float64 if dtype == torch.float64 else tables)
    sin, cos = table.chunk(2, -1)
    options: dict[str, Any] = {"cos": cos, "sin": sin, "interleaved": not half, "prefix": 1}
    theirs = []
    for x in (q, k):
        x = heads_first(x)
        theirs.append(heads_first(torch.cat([x[:, :, :1], apply_rot_embed_cat(x[:, :, 1:], table, half=half)], 2)))
    for ours, expected in zip(reference.qk_rope(q, k, **options), theirs, strict=True):
        assert torch.equal(ours, expected)
    if dtype != torch.float64:
        bound = 2e-6 if dtype == torch.float32 else 4e-3
        for ours, expected in zip(qk_rope(q, k, **options), theirs, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_hugging_face(dtype):
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

    draw = Draw(dtype, seed=15)
    q, k = draw.normal(2, 9, 3, 16), draw.normal(2, 9, 3, 16)
    turns = {name: table.to(dtype) for name, table in angles(draw, 4, 16).items()}
    theirs = [heads_first(x) for x in apply_rotary_pos_emb(heads_first(q), heads_first(k), **turns)]
    for ours, expected in zip(reference.qk_rope(q, k, **turns, prefix=5), theirs, strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip(qk_rope(q, k, **turns, prefix=5), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 8e-3)
