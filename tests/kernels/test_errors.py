"""Every refusal of the launchers: the error names the argument, what came and what is allowed. Nothing is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vit_kernels import attention, fold_norm, layer_norm, linear, mlp, patch_embed, qk_rope, row_stats

from ..rung import DEVICE


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


HALF, WRONG = torch.float16, torch.float64


def refused(
    launcher: Callable[..., Any], error: type[Exception], text: str, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    launcher(**good)
    with pytest.raises(error) as caught:
        launcher(**good | bad)
    assert type(caught.value) is error
    message = str(caught.value)
    for piece in text.split(" ... "):
        assert piece in message, f"{piece!r} is not in {message!r}"


def case(error: type[Exception], text: str, /, **bad: Any) -> Any:
    """One refusal: `bad` replaces good arguments, and every piece of `text` between " ... " must be in the message."""
    return pytest.param(error, text, bad, id=text)


NORM = {"x": t(2, 8), "weight": t(8), "bias": t(8)}


@pytest.mark.parametrize(
    ("error", "text", "bad"),
    [
        case(TypeError, "x must be a torch.Tensor ... got list", x=[1.0]),
        case(TypeError, "x must have dtype float32, float16, bfloat16 ... got float64", x=t(2, 8, dtype=WRONG)),
        case(TypeError, "x must have dtype ... got int32", x=t(2, 8, dtype=torch.int32)),
        case(ValueError, "x must have 2 dimensions ... got shape (1, 2, 8)", x=t(1, 2, 8)),
        case(ValueError, "x must have at least one column ... (2, 0)", x=t(2, 0), weight=None, bias=None),
        case(ValueError, "weight must have shape (8,) ... got (7,)", weight=t(7)),
        case(ValueError, "weight must have 1 dimensions ... got shape (1, 8)", weight=t(1, 8)),
        case(TypeError, "weight must have dtype ... got float64", weight=t(8, dtype=WRONG)),
        case(ValueError, "bias must have shape (8,) ... got (9,)", bias=t(9)),
        case(ValueError, "eps must be a finite number >= 0 ... got -1.0", eps=-1.0),
        case(ValueError, "eps must be a finite number >= 0 ... got nan", eps=float("nan")),
        case(ValueError, "eps must be a finite number >= 0 ... got inf", eps=float("inf")),
        case(ValueError, "kind must be one of layer, rms ... got 'batch'", kind="batch"),
    ],
)
def test_layer_norm(error, text, bad):
    refused(layer_norm, error, text, NORM, bad)


@pytest.mark.parametrize(
    ("error", "text", "bad"),
    [
        case(TypeError, "x must have dtype ... got float64", x=t(2, 8, dtype=WRONG)),
        case(ValueError, "x must have 2 dimensions ... got shape (8,)", x=t(8)),
        case(ValueError, "x must have at least one column ... (2, 0)", x=t(2, 0)),
    ],
)
def test_row_stats(error, text, bad):
    refused(row_stats, error, text, {"x": t(2, 8)}, bad)


LINEAR = {"x": t(2, 8), "weight": t(6, 8), "bias": t(6), "layer_scale": t(6), "residual": t(2, 6)}
FOLDED = {"norm": "layer", "stats": t(2, 1, 2), "column_sum": t(6)}


@pytest.mark.parametrize(
    ("error", "text", "bad"),
    [
        case(TypeError, "x must be a torch.Tensor ... got NoneType", x=None),
        case(TypeError, "x must have dtype float32, float16, bfloat16 ... got float64", x=t(2, 8, dtype=WRONG)),
        case(ValueError, "x must have 2 dimensions ... got shape (1, 2, 8)", x=t(1, 2, 8)),
        case(TypeError, "weight must have the dtype of x, float32 ... got float16", weight=t(6, 8, dtype=HALF)),
        case(ValueError, "weight must have K = 8 columns ... got shape (6, 7)", weight=t(6, 7)),
        case(ValueError, "weight must have at least one row and one column ... (0, 8)", weight=t(0, 8), bias=None),
        case(ValueError, "bias must have shape (6,) ... got (8,)", bias=t(8)),
        case(TypeError, "bias must have dtype ... got int64", bias=t(6, dtype=torch.int64)),
        case(ValueError, "layer_scale must have shape (6,) ... got (1,)", layer_scale=t(1)),
        case(ValueError, "residual must have shape (2, 6) ... got (2, 8)", residual=t(2, 8)),
        case(TypeError, "residual must have the dtype of x, float32 ... got float16", residual=t(2, 6, dtype=HALF)),
        case(ValueError, "activation must be one of none, gelu, gelu_tanh ... got 'relu'", activation="relu"),
        case(
            ValueError,
            "weight must have an even number of rows for swiglu ... got 5",
            activation="swiglu",
            weight=t(5, 8),
            bias=None,
            layer_scale=None,
            residual=None,
        ),
        case(ValueError, "bias must have shape (12,) ... got (6,)", activation="swiglu", weight=t(12, 8)),
        case(ValueError, "norm must be one of none, layer, rms ... got 'group'", norm="group"),
        case(ValueError, "stats is needed for norm='layer'", norm="layer", column_sum=t(6)),
        case(ValueError, "stats belongs to norm='layer' or 'rms'", stats=t(2, 1, 2)),
        case(ValueError, "column_sum belongs to norm='layer' or 'rms'", column_sum=t(6)),
        case(ValueError, "stats must have shape (2, 1, 2) ... got (2, 1, 3)", **FOLDED | {"stats": t(2, 1, 3)}),
        case(ValueError, "stats must have shape (2, 1, 2) ... got (2, 3, 2)", **FOLDED | {"stats": t(2, 3, 2)}),
        case(ValueError, "stats must have shape (2, 1, 2) ... got (3, 1, 2)", **FOLDED | {"stats": t(3, 1, 2)}),
        case(
            ValueError,
            "stats must be contiguous fp32 ... got torch.float16",
            **FOLDED | {"stats": t(2, 1, 2, dtype=HALF)},
        ),
        case(ValueError, "stats must be contiguous fp32 ... (2, 2)", **FOLDED | {"stats": t(2, 2)}),
        case(ValueError, "column_sum must have shape (6,) ... got (8,)", **FOLDED | {"column_sum": t(8)}),
        case(ValueError, "column_sum must be contiguous fp32 ... float16", **FOLDED | {"column_sum": t(6, dtype=HALF)}),
        case(ValueError, "eps must be a finite number >= 0 ... got -0.5", eps=-0.5),
        case(TypeError, "tf32 must be True or False ... got 1", tf32=1),
    ],
)
def test_linear(error, text, bad):
    refused(linear, error, text, LINEAR, bad)


def attention_arguments(**changes: Any) -> dict[str, Any]:
    return {"q": t(2, 5, 4, 16), "k": t(2, 7, 2, 16), "v": t(2, 7, 2, 16)} | changes


@pytest.mark.parametrize(
    ("error", "text", "bad"),
    [
        case(TypeError, "q must be a torch.Tensor ... got str", q="q"),
        case(ValueError, "q must have 4 dimensions ... got shape (2, 5, 64)", q=t(2, 5, 64)),
        case(TypeError, "q must have dtype ... got float64", q=t(2, 5, 4, 16, dtype=WRONG)),
        case(TypeError, "k must have the dtype of q, float32 ... got float16", k=t(2, 7, 2, 16, dtype=HALF)),
        case(TypeError, "v must have the dtype of q, float32 ... got float16", v=t(2, 7, 2, 16, dtype=HALF)),
        case(ValueError, "k must have shape (2, keys, key heads, 16) ... got (3, 7, 2, 16)", k=t(3, 7, 2, 16)),
        case(ValueError, "k must have shape (2, keys, key heads, 16) ... got (2, 7, 2, 8)", k=t(2, 7, 2, 8)),
        case(ValueError, "v must have shape (2, 7, 2, 16) ... got (2, 6, 2, 16)", v=t(2, 6, 2, 16)),
        case(ValueError, "heads that divides q's 4 ... got 3", k=t(2, 7, 3, 16), v=t(2, 7, 3, 16)),
        case(ValueError, "heads that divides q's 4 ... got 0", k=t(2, 7, 0, 16), v=t(2, 7, 0, 16)),
        case(
            ValueError,
            "q must have a head width from 1 to 128 ... (2, 5, 4, 129)",
            q=t(2, 5, 4, 129),
            k=t(2, 7, 2, 129),
            v=t(2, 7, 2, 129),
        ),
        case(ValueError, "scale must be a positive finite number ... got 0", scale=0.0),
        case(ValueError, "scale must be a positive finite number ... got -1", scale=-1.0),
        case(ValueError, "scale must be a positive finite number ... got inf", scale=float("inf")),
        case(ValueError, "scale must be a positive finite number ... got nan", scale=float("nan")),
        case(TypeError, "causal must be True or False ... got 1", causal=1),
        case(TypeError, "key_lengths must have dtype int32 or int64 ... got float32", key_lengths=t(2)),
        case(ValueError, "key_lengths must have shape (2,) ... got (3,)", key_lengths=t(3, dtype=torch.int32)),
        case(ValueError, "key_lengths must be contiguous", key_lengths=t(4, dtype=torch.int32)[::2]),
        case(TypeError, "mask must be boolean or floating point ... got int32", mask=t(5, 7, dtype=torch.int32)),
        case(
            TypeError,
            "mask must have dtype bool, float32, float16 or bfloat16 ... got float64",
            mask=t(5, 7, dtype=WRONG),
        ),
        case(ValueError, "mask must be broadcastable to (B, H, Nq, Nk) = (2, 4, 5, 7) ... got (7, 5)", mask=t(7, 5)),
        case(ValueError, "mask must be broadcastable ... got (3, 1, 5, 7)", mask=t(3, 1, 5, 7)),
        case(ValueError, "mask must be broadcastable ... got (1, 2, 4, 5, 7)", mask=t(1, 2, 4, 5, 7)),
        case(TypeError, "tf32 must be True or False ... got 'yes'", tf32="yes"),
    ],
)
def test_attention(error, text, bad):
    refused(attention, error, text, attention_arguments(), bad)


QK_ROPE = {
    "q": t(2, 5, 4, 16), "k": t(2, 5, 4, 16), "norm": "layer", "q_weight": t(16), "q_bias": t(16), "k_weight": t(16),
    "k_bias": t(16), "cos": t(4, 16), "sin": t(4, 16), "prefix": 1,
}  # fmt: skip
PLAIN = dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias", "cos", "sin"))


@pytest.mark.parametrize(
    ("error", "text", "bad"),
    [
        case(TypeError, "q must be a torch.Tensor ... got NoneType", q=None),
        case(ValueError, "q must have 4 dimensions ... got shape (2, 5, 64)", q=t(2, 5, 64)),
        case(TypeError, "k must have dtype ... got float64", k=t(2, 5, 4, 16, dtype=WRONG)),
        case(TypeError, "k must have the dtype of q, float32 ... got float16", k=t(2, 5, 4, 16, dtype=HALF)),
        case(ValueError, "k must have shape (2, 5, key heads, 16) ... got (2, 6, 4, 16)", k=t(2, 6, 4, 16)),
        case(ValueError, "k must have shape (2, 5, key heads, 16) ... got (3, 5, 4, 16)", k=t(3, 5, 4, 16)),
        case(ValueError, "k must have shape (2, 5, key heads, 16) ... got (2, 5, 4, 8)", k=t(2, 5, 4, 8)),
        case(
            ValueError,
            "q must have a head width from 1 to 128 ... (2, 5, 4, 129)",
            q=t(2, 5, 4, 129),
            k=t(2, 5, 4, 129),
            **PLAIN,
        ),
        case(ValueError, "q must have a head width from 1 to 128 ... (2, 5, 4, 0)", q=t(2, 5, 4, 0), k=t(2, 5, 4, 0)),
        case(
            ValueError,
            "q must have an even head width where cos and sin are given ... (2, 5, 4, 7)",
            q=t(2, 5, 4, 7),
            k=t(2, 5, 4, 7),
            cos=t(4, 7),
            sin=t(4, 7),
            **dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias")),
        ),
        case(ValueError, "norm must be one of none, layer, rms ... got 'l2'", norm="l2"),
        case(ValueError, "q_weight belongs to norm='layer' or 'rms'", norm="none"),
        case(ValueError, "k_bias belongs to norm='layer' or 'rms'", **PLAIN | {"norm": "none", "k_bias": t(16)}),
        case(ValueError, "q_weight must have shape (16,) ... got (15,)", q_weight=t(15)),
        case(ValueError, "q_bias must have 1 dimensions ... got shape (1, 16)", q_bias=t(1, 16)),
        case(TypeError, "k_weight must have dtype ... got float64", k_weight=t(16, dtype=WRONG)),
        case(ValueError, "k_bias must have shape (16,) ... got (64,)", k_bias=t(64)),
        case(ValueError, "eps must be a finite number >= 0 ... got -1", eps=-1),
        case(ValueError, "cos and sin must be given together; got only cos", sin=None),
        case(ValueError, "cos and sin must be given together; got only sin", cos=None),
        case(TypeError, "cos must be a torch.Tensor ... got list", cos=[1.0]),
        case(TypeError, "sin must have dtype ... got float64", sin=t(4, 16, dtype=WRONG)),
        case(ValueError, "cos must have shape (N - prefix, D) = (4, 16) ... got (5, 16)", cos=t(5, 16)),
        case(ValueError, "sin must have shape (N - prefix, D) = (4, 16) ... got (4, 8)", sin=t(4, 8)),
        case(ValueError, "cos must have shape ... (1 or 4, 4, 16) ... got (2, 4, 16)", cos=t(2, 4, 16)),
        case(ValueError, "(1 or 2, 1 or 4, 4, 16); got (3, 1, 4, 16)", sin=t(3, 1, 4, 16)),
        case(ValueError, "(1 or 2, 1 or 4, 4, 16); got (2, 3, 4, 16)", sin=t(2, 3, 4, 16)),
        case(ValueError, "cos must have shape ... got (16,)", cos=t(16)),
        case(ValueError, "cos must have shape ... got (1, 1, 1, 4, 16)", cos=t(1, 1, 1, 4, 16)),
        case(ValueError, "cos must have shape ... (1, 4, 16) ... got (4, 4, 16)", k=t(2, 5, 2, 16), cos=t(4, 4, 16)),
        case(TypeError, "interleaved must be True or False ... got 1", interleaved=1),
        case(TypeError, "prefix must be an integer ... got 1.0", prefix=1.0),
        case(TypeError, "prefix must be an integer ... got True", prefix=True),
        case(ValueError, "prefix must be from 0 to the 5 tokens of q ... got 6", prefix=6),
        case(ValueError, "prefix must be from 0 to the 5 tokens of q ... got -1", prefix=-1),
        case(ValueError, "cos must have shape (N - prefix, D) = (5, 16) ... got (4, 16)", prefix=0),
    ],
)
def test_qk_rope(error, text, bad):
    refused(qk_rope, error, text, QK_ROPE, bad)


PATCH_EMBED = {
    "images": t(1, 3, 8, 12), "weight": t(6, 3, 4, 4), "bias": t(6), "prefix": t(2, 6), "position": t(8, 6),
    "mean": t(3), "std": t(3) + 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("error", "text", "bad"),
    [
        case(ValueError, "images must be a tensor [B, C, H, W] ... (3, 8, 12)", images=t(3, 8, 12)),
        case(TypeError, "images must have dtype ... got int32", images=t(1, 3, 8, 12, dtype=torch.int32)),
        case(
            TypeError,
            "images must have the dtype of weight ... uint8 ... got float16",
            images=t(1, 3, 8, 12, dtype=HALF),
        ),
        case(ValueError, "images must have C = 3 channels ... got shape (1, 4, 8, 12)", images=t(1, 4, 8, 12)),
        case(ValueError, "at least one patch of 4x4 pixels ... got 0x12", images=t(1, 3, 0, 12)),
        case(ValueError, "at least one patch of 4x4 pixels ... got 8x0", images=t(1, 3, 8, 0)),
        case(ValueError, "the patch size 4x4 divides ... got 10x12 ... 12x12", images=t(1, 3, 10, 12)),
        case(ValueError, "the patch size 4x4 divides ... got 8x13 ... 8x16", images=t(1, 3, 8, 13)),
        case(ValueError, "weight must have 4 dimensions ... got shape (6, 48)", weight=t(6, 48)),
        case(ValueError, "weight must have no empty dimension ... (0, 3, 4, 4)", weight=t(0, 3, 4, 4)),
        case(TypeError, "weight must have dtype ... got float64", weight=t(6, 3, 4, 4, dtype=WRONG)),
        case(ValueError, "bias must have shape (6,) ... got (5,)", bias=t(5)),
        case(ValueError, "prefix must have 2 dimensions ... got shape (1, 2, 6)", prefix=t(1, 2, 6)),
        case(ValueError, "prefix must have shape (2, 6) ... got (2, 5)", prefix=t(2, 5)),
        case(ValueError, "position must have shape (6, 6) ... (8, 6) ... got (7, 6)", position=t(7, 6)),
        case(ValueError, "position must have 2 dimensions ... got shape (1, 8, 6)", position=t(1, 8, 6)),
        case(ValueError, "mean and std must be given together ... only mean", std=None),
        case(ValueError, "mean and std must be given together ... only std", mean=None),
        case(ValueError, "mean must have shape (3,) ... got (1,)", mean=t(1)),
        case(TypeError, "std must have dtype float32 ... got float16", std=t(3, dtype=HALF)),
        case(ValueError, "mean must be contiguous", mean=t(3, 2)[:, 0]),
        case(TypeError, "tf32 must be True or False ... got None", tf32=None),
    ],
)
def test_patch_embed(error, text, bad):
    refused(patch_embed, error, text, PATCH_EMBED, bad)


MLP = {
    "x": t(2, 8), "fc1_weight": t(10, 8), "fc1_bias": t(10), "fc2_weight": t(8, 10), "fc2_bias": t(8), "norm": "none",
    "layer_scale": t(8), "residual": t(2, 8),
}  # fmt: skip


@pytest.mark.parametrize(
    ("error", "text", "bad"),
    [
        case(TypeError, "x must have dtype ... got float64", x=t(2, 8, dtype=WRONG)),
        case(ValueError, "x must have 2 dimensions ... got shape (8,)", x=t(8)),
        case(
            TypeError, "fc1_weight must have the dtype of x, float32 ... got float16", fc1_weight=t(10, 8, dtype=HALF)
        ),
        case(ValueError, "fc1_weight must have shape (10, 8) ... got (11, 8)", fc1_weight=t(11, 8)),
        case(ValueError, "fc1_weight must have shape (20, 8) ... got (10, 8)", activation="swiglu"),
        case(ValueError, "fc2_weight must have shape (8, 10) ... got (7, 10)", fc2_weight=t(7, 10)),
        case(
            ValueError,
            "fc2_weight must have at least one row and one column ... (0, 10)",
            x=t(2, 0),
            fc1_weight=t(10, 0),
            fc2_weight=t(0, 10),
        ),
        case(
            ValueError,
            "fc2_weight must have at least one row and one column ... (8, 0)",
            fc1_weight=t(0, 8),
            fc2_weight=t(8, 0),
        ),
        case(ValueError, "fc1_bias must have shape (10,) ... got (8,)", fc1_bias=t(8)),
        case(ValueError, "fc2_bias must have shape (8,) ... got (10,)", fc2_bias=t(10)),
        case(ValueError, "layer_scale must have shape (8,) ... got (10,)", layer_scale=t(10)),
        case(ValueError, "residual must have shape (2, 8) ... got (3, 8)", residual=t(3, 8)),
        case(ValueError, "activation must be one of ... got 'tanh'", activation="tanh"),
        case(ValueError, "norm must be one of none, layer, rms ... got 'l2'", norm="l2"),
        case(ValueError, "eps must be a finite number >= 0 ... got -1", eps=-1),
        case(TypeError, "tf32 must be True or False ... got 0", tf32=0),
        case(
            ValueError,
            "fused=True needs D <= 384 ... got D = 385",
            fused=True,
            x=t(2, 385),
            fc1_weight=t(10, 385),
            fc2_weight=t(385, 10),
            fc2_bias=None,
            layer_scale=None,
            residual=None,
        ),
    ],
)
def test_mlp(error, text, bad):
    refused(mlp, error, text, MLP, bad)


@pytest.mark.parametrize(
    ("error", "text", "bad"),
    [
        case(TypeError, "weight must have dtype ... got float64", weight=t(6, 8, dtype=WRONG)),
        case(ValueError, "weight must have 2 dimensions ... got shape (8,)", weight=t(8)),
        case(ValueError, "bias must have shape (6,) ... got (8,)", bias=t(8)),
        case(ValueError, "norm_weight must have shape (8,) ... got (6,)", norm_weight=t(6)),
        case(ValueError, "norm_bias must have shape (8,) ... got (6,)", norm_bias=t(6)),
        case(ValueError, "kind must be one of layer, rms ... got 'none'", kind="none"),
    ],
)
def test_fold_norm(error, text, bad):
    refused(fold_norm, error, text, {"weight": t(6, 8), "bias": t(6), "norm_weight": t(8), "norm_bias": t(8)}, bad)


META_CASES = {
    "layer_norm-weight": (layer_norm, NORM, "weight"),
    "linear-bias": (linear, LINEAR, "bias"),
    "linear-residual": (linear, LINEAR, "residual"),
    "attention-k": (attention, attention_arguments(), "k"),
    "patch_embed-position": (patch_embed, PATCH_EMBED, "position"),
    "mlp-fc2_weight": (mlp, MLP, "fc2_weight"),
}


@pytest.mark.interpreted_only
@pytest.mark.parametrize("name", META_CASES)
def test_tensors_on_different_devices(name):
    launcher, good, argument = META_CASES[name]
    text = f"{argument} must be on the device of ... cpu ... got meta"
    refused(launcher, ValueError, text, good, {argument: good[argument].to("meta")})


def test_mlp_fused_without_a_tile_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel was asked for: two are not run instead."""
    monkeypatch.setattr("vit_kernels.mlp_tiles.choose_mlp", lambda *args, **options: None)
    refused(mlp, ValueError, "fused=True ... D = 8 ... shared memory", MLP | {"fused": None}, {"fused": True})
