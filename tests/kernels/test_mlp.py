"""mlp against float64, as one kernel and as two GEMMs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from vit_kernels import fold_norm, mlp_tiles, reference, row_stats

from ..weights import Draw, nan_framed
from .common import IEEE_ERROR, every_dtype, judge, judge_stats, mlp, same_bits, sanitize_bfloat16, sanitize_every_dtype

both_forms = pytest.mark.parametrize("fused", [True, False], ids=["one-kernel", "two-gemms"])


def draw_mlp(
    draw: Draw,
    m: int,
    width: int,
    hidden: int,
    *,
    norm: str = "layer",
    activation: str = "gelu",
    biases: bool = True,
    layer_scale: bool = True,
    residual: bool = True,
) -> dict[str, Any]:
    """Arguments of reference.mlp: the weights of a model, not folded. The residual is x, as in an encoder block."""
    outputs = 2 * hidden if activation == "swiglu" else hidden
    x = draw.rows(m, width)
    return {
        "x": x,
        "fc1_weight": draw.weight(outputs, width),
        "fc1_bias": draw.bias(outputs) if biases else None,
        "fc2_weight": draw.weight(width, hidden),
        "fc2_bias": draw.bias(width) if biases else None,
        "norm": norm,
        "norm_weight": draw.gamma(width) if norm != "none" else None,
        "norm_bias": draw.bias(width) if norm != "none" else None,
        "activation": activation,
        "layer_scale": draw.layer_scale(width) if layer_scale else None,
        "residual": x if residual else None,
    }


def run_mlp(arguments: dict[str, Any], *, sums: bool = True, **options: Any) -> Any:
    """The kernel on the arguments of its reference: folds the norm into fc1, with sums of the weights or not."""
    arguments = dict(arguments)
    gamma, beta = arguments.pop("norm_weight"), arguments.pop("norm_bias")
    if arguments["norm"] != "none":
        norm = arguments["norm"]
        folded = fold_norm(arguments["fc1_weight"], arguments["fc1_bias"], gamma, beta, kind=norm, sums=sums)
        arguments |= dict(zip(("fc1_weight", "column_sum", "fc1_bias"), folded, strict=True))
    return mlp(**arguments, **options)


@sanitize_bfloat16
@both_forms
@pytest.mark.parametrize(
    ("m", "width", "hidden"),
    [
        pytest.param(1, 192, 96, id="1x192"),
        pytest.param(17, 192, 200, id="17x192"),
        pytest.param(5, 384, 70, id="5x384"),
        pytest.param(50, 64, 48, id="50x64"),
        pytest.param(13, 37, 29, id="odd-13x37"),
        pytest.param(3, 1, 5, id="one-feature"),
        pytest.param(0, 192, 96, id="no-rows"),
    ],
)
def test_narrow(dtype, fused, m, width, hidden):
    arguments = draw_mlp(Draw(dtype, seed=width), m, width, hidden)
    y, stats = run_mlp(arguments, fused=fused, emit_stats=True)
    assert y.shape == (m, width)
    assert y.is_contiguous()
    judge(y, reference.mlp, arguments)
    if m:
        judge_stats(stats, y)


@sanitize_bfloat16
@pytest.mark.parametrize(
    ("m", "width", "hidden"),
    [
        pytest.param(15, 768, 70, id="15x768"),
        pytest.param(3, 1000, 33, id="3x1000"),
        pytest.param(2, 1280, 64, id="2x1280"),
    ],
)
def test_wide(dtype, m, width, hidden):
    arguments = draw_mlp(Draw(dtype, seed=width), m, width, hidden)
    y, stats = run_mlp(arguments, emit_stats=True)
    judge(y, reference.mlp, arguments)
    judge_stats(stats, y)


@sanitize_every_dtype
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_smallest_tile(dtype, activation, monkeypatch):
    """Several tiles of rows and many steps through the hidden features, whatever the tile choice prefers."""
    monkeypatch.setattr(mlp_tiles, "choose_mlp", lambda *a, **k: mlp_tiles.MlpTile(16, 16, 4, 1))
    arguments = draw_mlp(Draw(dtype, seed=10), 40, 100, 50, activation=activation)
    y, stats = run_mlp(arguments, fused=True, emit_stats=True)
    judge(y, reference.mlp, arguments)
    judge_stats(stats, y)


@every_dtype
@both_forms
@pytest.mark.parametrize("tokens", [197, 257, 577])
def test_many_tokens(dtype, fused, tokens):
    arguments = draw_mlp(Draw(dtype, seed=tokens), tokens, 64, 100)
    y, stats = run_mlp(arguments, fused=fused, emit_stats=True)
    judge(y, reference.mlp, arguments)
    judge_stats(stats, y)


@every_dtype
@both_forms
def test_the_feed_forward_block_of_a_tiny_model(dtype, fused):
    arguments = draw_mlp(Draw(dtype, seed=1), 50, 192, 768)
    judge(run_mlp(arguments, fused=fused), reference.mlp, arguments)


@sanitize_every_dtype
@both_forms
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"norm": "none"}, id="no-norm"),
        pytest.param({"norm": "rms"}, id="rms-norm"),
        pytest.param({"biases": False}, id="no-biases"),
        pytest.param({"layer_scale": False}, id="no-layer-scale"),
        pytest.param({"residual": False}, id="no-residual"),
        pytest.param(
            {"norm": "none", "activation": "none", "biases": False, "layer_scale": False, "residual": False},
            id="nothing",
        ),
    ],
)
def test_each_feature_off(dtype, fused, options):
    arguments = draw_mlp(Draw(dtype, seed=2), 9, 100, 72, **options)
    y, stats = run_mlp(arguments, fused=fused, emit_stats=True)
    judge(y, reference.mlp, arguments)
    judge_stats(stats, y)


@sanitize_every_dtype
@both_forms
def test_weights_that_leave_nothing_of_a_mean(dtype, fused):
    arguments = draw_mlp(Draw(dtype, seed=4), 9, 100, 72, layer_scale=False, residual=False)
    arguments["x"] = Draw(dtype, seed=5).rows(9, 100, offset=100.0)
    judge(run_mlp(arguments, fused=fused, sums=False), reference.mlp, arguments)


@sanitize_bfloat16
@both_forms
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu"])
def test_activations(dtype, fused, activation):
    arguments = draw_mlp(Draw(dtype, seed=3), 9, 100, 72, activation=activation)
    judge(run_mlp(arguments, fused=fused), reference.mlp, arguments)


@every_dtype
@both_forms
def test_given_statistics_change_next_to_nothing(dtype, fused):
    """Handing over what the producer of x emitted is an optimisation, not another result."""
    arguments = draw_mlp(Draw(dtype, seed=4), 9, 100, 72)
    judge(run_mlp(arguments, fused=fused, stats=row_stats(arguments["x"])), reference.mlp, arguments)


def test_the_forms_are_what_they_say(monkeypatch):
    """fused=True launches one kernel and no linear; fused=False two linears."""
    module = importlib.import_module("vit_kernels.mlp")
    calls = []
    launch = module.linear
    monkeypatch.setattr(module, "linear", lambda *a, **k: calls.append("linear") or launch(*a, **k))
    arguments = draw_mlp(Draw(torch.float16, seed=5), 5, 64, 48)
    run_mlp(arguments, fused=True)
    assert calls == []
    run_mlp(arguments, fused=False)
    assert calls == ["linear", "linear"]


@every_dtype
@both_forms
@pytest.mark.parametrize(
    "parameter",
    ["x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "norm_weight", "norm_bias", "layer_scale", "residual"],
)
def test_a_zeroed_parameter_is_noticed(dtype, fused, parameter):
    arguments = draw_mlp(Draw(dtype, seed=6), 9, 100, 72)
    y = run_mlp(arguments | {parameter: torch.zeros_like(arguments[parameter])}, fused=fused)
    with pytest.raises(AssertionError, match="over the allowed"):
        judge(y, reference.mlp, arguments)


@sanitize_bfloat16
@both_forms
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_foreign_values_change_no_bit(dtype, fused, activation):
    """NaN on every side of every tensor: rows past the end, features past the width, hidden features past their end."""
    arguments = draw_mlp(Draw(dtype, seed=7), 9, 100, 40, norm="none", activation=activation)
    framed = {n: nan_framed(v) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    clean = run_mlp(arguments, fused=fused, emit_stats=True)
    for mine, expected in zip(run_mlp(framed, fused=fused, emit_stats=True), clean, strict=True):
        same_bits(mine, expected)


@every_dtype
@both_forms
def test_strides_change_no_bit(dtype, fused):
    arguments = draw_mlp(Draw(dtype, seed=8), 9, 64, 40)
    clean = run_mlp(arguments, fused=fused)
    views = {name: arguments[name].t().contiguous().t() for name in ("x", "fc2_weight", "residual")}
    same_bits(run_mlp(arguments | views, fused=fused), clean)


@both_forms
def test_float32_is_computed_at_ieee_precision(fused):
    arguments = draw_mlp(Draw(torch.float32, seed=9), 9, 192, 100, residual=False)
    assert judge(run_mlp(arguments, fused=fused), reference.mlp, arguments).row < IEEE_ERROR
