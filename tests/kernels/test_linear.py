"""linear against float64: shapes, each fused feature on and off, the folded norm, emitted statistics, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl  # noqa: F401  (a jitted function must see it)

from vit_bench.tolerance import check
from vit_kernels import fold_norm, gemm_tiles, reference, row_stats

from ..rung import HALF_DTYPES, RUNG
from ..weights import Draw, nan_framed
from .common import (
    IEEE_ERROR,
    every_dtype,
    in_float64,
    judge,
    judge_stats,
    linear,
    same_bits,
    sanitize_bfloat16,
    sanitize_every_dtype,
    sanitize_half,
)

FEATURES = ("norm", "bias", "activation", "layer_scale", "residual")
FULL: dict[str, Any] = {"norm": "layer", "activation": "gelu", "bias": True, "layer_scale": True, "residual": True}
NOTHING: dict[str, Any] = {"norm": "none", "activation": "none", "bias": False, "layer_scale": False, "residual": False}


def draw_linear(
    draw: Draw,
    m: int,
    k: int,
    n: int,
    *,
    norm: str = "none",
    activation: str = "none",
    bias: bool = True,
    layer_scale: bool = False,
    residual: bool = False,
) -> dict[str, Any]:
    """Arguments of reference.linear: the weights of a model, not folded."""
    outputs = 2 * n if activation == "swiglu" else n
    return {
        "x": draw.rows(m, k) if norm != "none" else draw.normal(m, k),
        "weight": draw.weight(outputs, k),
        "bias": draw.bias(outputs) if bias else None,
        "norm": norm,
        "norm_weight": draw.gamma(k) if norm != "none" else None,
        "norm_bias": draw.bias(k) if norm != "none" else None,
        "activation": activation,
        "layer_scale": draw.layer_scale(n) if layer_scale else None,
        "residual": draw.rows(m, n) if residual else None,
    }


def run_linear(
    arguments: dict[str, Any], *, stats: torch.Tensor | None = None, sums: bool = True, **options: Any
) -> Any:
    """The kernel on the arguments of its reference: folds the norm, with sums of the weights or not, and takes the
    statistics of x, unless given."""
    arguments = dict(arguments)
    gamma, beta = arguments.pop("norm_weight"), arguments.pop("norm_bias")
    if arguments["norm"] != "none":
        weight, column_sum, bias = fold_norm(
            arguments["weight"], arguments["bias"], gamma, beta, kind=arguments["norm"], sums=sums
        )
        arguments |= {"weight": weight, "column_sum": column_sum, "bias": bias}
        arguments["stats"] = row_stats(arguments["x"]) if stats is None else stats
    return linear(**arguments, **options)


@sanitize_bfloat16
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        pytest.param(1, 192, 100, id="1x192x100"),
        pytest.param(15, 384, 65, id="15x384x65"),
        pytest.param(17, 768, 64, id="17x768x64"),
        pytest.param(50, 1000, 33, id="50x1000x33"),
        pytest.param(197, 192, 48, id="197x192x48"),
        pytest.param(257, 64, 20, id="257x64x20"),
        pytest.param(577, 40, 16, id="577x40x16"),
        pytest.param(3, 1152, 130, id="3x1152x130"),
        pytest.param(2, 1280, 7, id="2x1280x7"),
        pytest.param(13, 37, 11, id="odd-13x37x11"),
        pytest.param(5, 1, 3, id="one-input-feature"),
        pytest.param(5, 33, 1, id="one-output-feature"),
        pytest.param(0, 192, 64, id="no-rows"),
    ],
)
def test_shapes(dtype, m, k, n):
    arguments = draw_linear(Draw(dtype, seed=m + k + n), m, k, n)
    y = run_linear(arguments)
    assert y.shape == (m, n)
    assert y.is_contiguous()
    judge(y, reference.linear, arguments)


@sanitize_every_dtype
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_smallest_tile(dtype, activation, monkeypatch):
    """5 x 3 tiles in groups of two rows, the last group of one, whatever the tile choice prefers."""
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: gemm_tiles.GemmTile(16, 64, 32, 4, 2, group_m=2))
    arguments = draw_linear(Draw(dtype, seed=14), 70, 40, 140, **FULL | {"activation": activation})
    y, stats = run_linear(arguments, emit_stats=True)
    judge(y, reference.linear, arguments)
    judge_stats(stats, y)


WALKS = {
    "more programs than tiles": gemm_tiles.GemmTile(64, 128, 32, 4, 2, chunk=64, tma=30),
    "one program, rows in one group": gemm_tiles.GemmTile(64, 128, 32, 4, 2, group_m=0, chunk=64, tma=1),
    "one program, wide": gemm_tiles.GemmTile(128, 128, 32, 4, 2, chunk=64, tma=1),
    "four programs, narrow": gemm_tiles.GemmTile(64, 64, 64, 4, 2, group_m=1, chunk=64, tma=4),
}


@sanitize_half
@pytest.mark.parametrize(
    ("walk", "activation"),
    [*((walk, "gelu") for walk in WALKS), *((walk, "swiglu") for walk in list(WALKS)[::3])],
)
def test_walks_over_tiles_through_tensor_descriptors(dtype, walk, activation, monkeypatch):
    """No size is a multiple of its block: what lies past an end reads as zero and is not stored."""
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: WALKS[walk])
    arguments = draw_linear(Draw(dtype, seed=15), 70, 40, 200, **FULL | {"activation": activation})
    y, stats = run_linear(arguments, emit_stats=True)
    judge(y, reference.linear, arguments)
    judge_stats(stats, y)


@sanitize_half
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("halved", [3, 6])
def test_the_last_tiles_are_shared_out_as_halves(dtype, halved, activation, monkeypatch):
    """2 x 3 tiles on four programs: of 128 rows, or of 64 for the last ones, one of which lies past the last row."""
    tile = gemm_tiles.GemmTile(128, 64, 32, 4, 2, chunk=64, tma=4)
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: tile)
    monkeypatch.setattr(gemm_tiles, "halved_tiles", lambda *a: halved)
    arguments = draw_linear(Draw(dtype, seed=17), 180, 40, 136, **FULL | {"activation": activation})
    y, stats = run_linear(arguments, emit_stats=True)
    judge(y, reference.linear, arguments)
    judge_stats(stats, y)


@sanitize_half
@pytest.mark.parametrize("partials", [16, 17])
def test_statistics_are_loaded_before_the_product_or_behind_it(dtype, partials, monkeypatch):
    """Up to 16 partials of a row are loaded early; both merge alike, the last partial of fewer than 64 columns too."""
    tile = gemm_tiles.GemmTile(64, 64, 64, 4, 2, chunk=64, tma=1)
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: tile)
    columns = 64 * partials - 8
    draw = Draw(dtype, seed=partials)
    producer = draw_linear(draw, 5, 24, columns, residual=True)
    x, stats = run_linear(producer, emit_stats=True)
    arguments = draw_linear(draw, 5, columns, 40, norm="layer") | {"x": x}
    assert stats.shape[1] == partials
    judge(run_linear(arguments, stats=stats), reference.linear, arguments)


@pytest.mark.parametrize("activation", ["none", "swiglu"])
@pytest.mark.parametrize("chunk", [64, 128, 256])
def test_the_width_of_a_chunk_changes_no_bit(chunk, activation, monkeypatch):
    arguments = draw_linear(Draw(torch.float16, seed=16), 40, 40, 300, **FULL | {"activation": activation})
    results = []
    for width in (256, chunk):
        tile = gemm_tiles.GemmTile(32, 256, 32, 4, 2, chunk=width)
        monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, tile=tile, **k: tile)
        results.append(run_linear(arguments, emit_stats=True))
    for one, other in zip(*results, strict=True):
        same_bits(one, other)


@every_dtype
def test_the_widest_projection_of_a_tiny_model(dtype):
    """197 tokens, 192 -> 576: several tiles in both directions, in groups."""
    arguments = draw_linear(Draw(dtype, seed=1), 197, 192, 576, norm="layer")
    judge(run_linear(arguments), reference.linear, arguments)


@sanitize_every_dtype
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(FULL, id="everything"),
        pytest.param(NOTHING, id="nothing"),
        *(pytest.param(NOTHING | {f: FULL[f]}, id=f"only-{f}") for f in FEATURES),
        *(pytest.param(FULL | {f: NOTHING[f]}, id=f"all-but-{f}") for f in FEATURES),
    ],
)
def test_each_feature_on_and_off(dtype, options):
    arguments = draw_linear(Draw(dtype, seed=2), 19, 100, 70, **options)
    y, stats = run_linear(arguments, emit_stats=True)
    judge(y, reference.linear, arguments)
    judge_stats(stats, y)


@sanitize_bfloat16
@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu"])
def test_activations_behind_norms(dtype, activation, norm):
    # Large enough that the largest error of eager PyTorch, which sets the allowance, is no matter of luck.
    arguments = draw_linear(Draw(dtype, seed=3), 33, 72, 70, norm=norm, activation=activation)
    judge(run_linear(arguments), reference.linear, arguments)


@sanitize_bfloat16
def test_swiglu_with_everything(dtype):
    options: dict[str, Any] = FULL | {"activation": "swiglu"}
    arguments = draw_linear(Draw(dtype, seed=4), 17, 100, 130, **options)
    y, stats = run_linear(arguments, emit_stats=True)
    judge(y, reference.linear, arguments)
    judge_stats(stats, y)


@sanitize_bfloat16
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("columns", [64, 100, 192, 130, 1024, 1090, 1700], ids=lambda n: f"{n}-columns")
def test_emitted_statistics_serve_the_next_norm(dtype, norm, columns):
    """One partial per 64 columns, the last of them narrower: linear -> norm -> linear without reading x for
    statistics. More than 16 are merged in groups.
    """
    draw = Draw(dtype, seed=5)
    first = draw_linear(draw, 17, 48, columns, layer_scale=True, residual=True)
    x, stats = run_linear(first, emit_stats=True)
    assert stats.shape == (2, -(-columns // 64), 17)
    second = draw_linear(draw, 17, columns, 40, norm=norm) | {"x": x}
    judge(run_linear(second, stats=stats), reference.linear, second)


@sanitize_bfloat16
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_folded_norm_with_a_large_common_offset(dtype, activation):
    """x W'^T and mean c are hundreds of times their difference. In 16 bits it survives because c is summed from the
    rounded W'; float32, whose own roundings would show, takes the mean off the rows before the product.
    """
    offset = 4000.0 if dtype == torch.float32 else 300.0
    draw = Draw(dtype, seed=6)
    arguments = draw_linear(draw, 9, 192, 50, norm="layer", activation=activation)
    arguments["x"] = draw.rows(9, 192, offset=offset, outlier=1.0)
    check(run_linear(arguments), reference.linear(**arguments), reference.linear(**in_float64(arguments)))


@sanitize_bfloat16
def test_eps_belongs_to_the_norm(dtype):
    draw = Draw(dtype, seed=7)
    arguments = draw_linear(draw, 5, 64, 20, norm="layer") | {"x": draw.normal(5, 64), "eps": 0.7}
    judge(run_linear(arguments), reference.linear, arguments)


@every_dtype
@pytest.mark.parametrize("parameter", ["x", "weight", "bias", "norm_weight", "norm_bias", "layer_scale", "residual"])
def test_a_zeroed_parameter_is_noticed(dtype, parameter):
    arguments = draw_linear(Draw(dtype, seed=8), 17, 192, 70, **FULL)
    y = run_linear(arguments | {parameter: torch.zeros_like(arguments[parameter])})
    with pytest.raises(AssertionError, match="over the allowed"):
        judge(y, reference.linear, arguments)


@every_dtype
def test_zeroed_statistics_are_noticed(dtype):
    arguments = draw_linear(Draw(dtype, seed=9), 17, 192, 70, norm="layer")
    y = run_linear(arguments, stats=torch.zeros_like(row_stats(arguments["x"])))
    with pytest.raises(AssertionError, match="over the allowed"):
        judge(y, reference.linear, arguments)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@sanitize_every_dtype
def test_weights_that_leave_nothing_of_a_mean(dtype, activation):
    """With an offset of the rows that `test_a_zeroed_column_sum_is_noticed` says would show."""
    arguments = draw_linear(Draw(dtype, seed=9), 17, 192, 70, norm="layer", activation=activation)
    arguments["x"] = Draw(dtype, seed=10).rows(17, 192, offset=100.0)
    judge(run_linear(arguments, sums=False), reference.linear, arguments)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_a_zeroed_column_sum_is_noticed(dtype):
    """Float32 centres its rows and needs none. Folded weights are centred but for their rounding: without an offset of
    the rows, there would be nothing to notice."""
    arguments = draw_linear(Draw(dtype, seed=9), 17, 192, 70, norm="layer")
    arguments["x"] = Draw(dtype, seed=10).rows(17, 192, offset=100.0)
    weight, column_sum, bias = fold_norm(*(arguments[n] for n in ("weight", "bias", "norm_weight", "norm_bias")))
    x = arguments["x"]
    y = linear(x, weight, bias, norm="layer", stats=row_stats(x), column_sum=torch.zeros_like(column_sum))
    with pytest.raises(AssertionError, match="over the allowed"):
        judge(y, reference.linear, arguments)


@sanitize_bfloat16
@pytest.mark.parametrize("columns", [64, 37], ids=["even-K", "odd-K"])
def test_foreign_values_change_no_bit(dtype, columns):
    """NaN on every side of every tensor, where the masks of partial tiles must keep it out."""
    draw = Draw(dtype, seed=10)
    x, weight, bias = draw.normal(17, columns), draw.weight(70, columns), draw.bias(70)
    scale, residual = draw.layer_scale(70), draw.rows(17, 70)
    clean = linear(x, weight, bias, activation="gelu", layer_scale=scale, residual=residual, emit_stats=True)
    framed = [nan_framed(t) for t in (x, weight, bias, scale, residual)]
    ours = linear(*framed[:3], activation="gelu", layer_scale=framed[3], residual=framed[4], emit_stats=True)
    for mine, expected in zip(ours, clean, strict=True):
        same_bits(mine, expected)


@sanitize_bfloat16
@pytest.mark.parametrize("layout", ["transposed-weight", "transposed-x", "every-other-row", "offset-by-one"])
def test_strides_change_no_bit(dtype, layout):
    draw = Draw(dtype, seed=11)
    x, weight, bias = draw.normal(17, 48), draw.weight(40, 48), draw.bias(40)
    clean = linear(x, weight, bias)
    if layout == "transposed-weight":
        weight = weight.t().contiguous().t()
    elif layout == "transposed-x":
        x = x.t().contiguous().t()
    elif layout == "every-other-row":
        x = torch.stack([x, torch.full_like(x, float("nan"))], 1).flatten(0, 1)[::2]
        weight = torch.stack([weight, torch.full_like(weight, float("nan"))], 1).flatten(0, 1)[::2]
    else:
        one = torch.full((1,), float("nan"), dtype=dtype, device=x.device)
        x, weight = (torch.cat([one, t.flatten()])[1:].view(t.shape) for t in (x, weight))
    same_bits(linear(x, weight, bias), clean)


def test_float32_is_computed_at_ieee_precision():
    arguments = draw_linear(Draw(torch.float32, seed=12), 17, 768, 64)
    assert judge(run_linear(arguments), reference.linear, arguments).row < IEEE_ERROR


@pytest.mark.sanitize
def test_tf32_on_request():
    """The interpreter forgives it; the sanitizer and a GPU round the operands to 10 bits, and then it must show."""
    arguments = draw_linear(Draw(torch.float32, seed=13), 17, 192, 40)
    truth = reference.linear(**in_float64(arguments))
    error = float((run_linear(arguments, tf32=True).double() - truth).norm() / truth.norm())
    assert error < 2e-3
    if RUNG != "interpreted":
        assert error > 1e-5


def test_tiles_narrower_than_a_partial_statistic_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs would write one partial, each of its own columns; a tuned file might ask for it."""
    tile = gemm_tiles.GemmTile(64, 32, 64, 4, 2)
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: tile)
    arguments = draw_linear(Draw(torch.float32, seed=71), 70, 64, 128)
    judge(run_linear(arguments), reference.linear, arguments)
    with pytest.raises(ValueError, match="row statistics need tiles of a multiple of 64 columns, got 32"):
        run_linear(arguments, emit_stats=True)
