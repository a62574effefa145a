"""What the launchers refuse (`attention` and `qk_rope`: test_attention_errors.py): the error names the argument, what
came and what is allowed. Nothing is launched."""

from __future__ import annotations

import pytest
import torch

from vit_kernels import fold_norm, layer_norm, linear, mlp, patch_embed, row_stats

from .refusals import HALF, WRONG, case, refused, refused_unless_in_memory, t

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
        case(TypeError, "eps must be a number ... got '1e-6'", eps="1e-6"),
        case(TypeError, "eps must be a number ... got tensor(0.)", eps=torch.tensor(0.0)),
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
        case(TypeError, "eps must be a number ... got True", eps=True),
        case(TypeError, "stats must be a torch.Tensor ... got list", **FOLDED | {"stats": [0.0]}),
        case(TypeError, "emit_stats must be True or False ... got 1", emit_stats=1),
        case(TypeError, "tf32 must be True or False ... got 1", tf32=1),
    ],
)
def test_linear(error, text, bad):
    refused(linear, error, text, LINEAR, bad)


PATCH_EMBED = {
    "images": t(1, 3, 8, 12), "weight": t(6, 3, 4, 4), "bias": t(6), "prefix": t(2, 6), "position": t(8, 6),
    "mean": t(3), "std": t(3) + 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("error", "text", "bad"),
    [
        case(ValueError, "images must be a tensor [B, C, H, W] ... (3, 8, 12)", images=t(3, 8, 12)),
        case(TypeError, "images must be a torch.Tensor ... got list", images=[1.0]),
        case(TypeError, "emit_stats must be True or False ... got None", emit_stats=None),
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
        case(TypeError, "emit_stats must be True or False ... got 'yes'", emit_stats="yes"),
        case(TypeError, "fused must be True or False ... got 1", fused=1),
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


NOT_IN_MEMORY = {
    "layer_norm-x": (layer_norm, NORM, "x"),
    "linear-weight": (linear, LINEAR, "weight"),
    "linear-bias": (linear, LINEAR, "bias"),
    "linear-stats": (linear, LINEAR | FOLDED, "stats"),
    "patch_embed-images": (patch_embed, PATCH_EMBED, "images"),
}


@pytest.mark.parametrize("name", NOT_IN_MEMORY)
def test_tensors_whose_values_do_not_lie_in_memory_as_they_are(name):
    refused_unless_in_memory(*NOT_IN_MEMORY[name])


META_CASES = {
    "layer_norm-weight": (layer_norm, NORM, "weight"),
    "linear-bias": (linear, LINEAR, "bias"),
    "linear-residual": (linear, LINEAR, "residual"),
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
