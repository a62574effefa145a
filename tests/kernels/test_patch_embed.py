"""patch_embed against float64: image shapes and layouts, tokens in front, both forms of positions, bytes,
statistics.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vit_kernels import gemm_tiles, reference

from ..rung import DEVICE
from ..weights import Draw, nan_framed
from .common import (
    IEEE_ERROR,
    every_dtype,
    in_float64,
    judge,
    judge_stats,
    linear,
    patch_embed,
    same_bits,
    sanitize_bfloat16,
    sanitize_every_dtype,
)

MEAN = torch.tensor([0.485, 0.456, 0.406], device=DEVICE)
STD = torch.tensor([0.229, 0.224, 0.225], device=DEVICE)


def draw_patch_embed(
    draw: Draw,
    batch: int,
    grid: tuple[int, int],
    patch: tuple[int, int],
    width: int,
    *,
    channels: int = 3,
    prefix: int = 1,
    position: str = "all",
    bias: bool = True,
) -> dict[str, Any]:
    """position: "all" tokens, the "patches" alone, or "none"."""
    patches = grid[0] * grid[1]
    rows = {"all": prefix + patches, "patches": patches, "none": 0}[position]
    return {
        "images": draw.images(batch, channels, grid[0] * patch[0], grid[1] * patch[1]),
        "weight": draw.weight(width, channels, *patch),
        "bias": draw.bias(width) if bias else None,
        "prefix": draw.normal(prefix, width) if prefix else None,
        "position": draw.normal(rows, width) if rows else None,
    }


def judge_patch_embed(arguments: dict[str, Any]) -> torch.Tensor:
    """Runs the kernel with statistics and judges tokens and statistics."""
    tokens, stats = patch_embed(**arguments, emit_stats=True)
    assert tokens.is_contiguous()
    judge(tokens, reference.patch_embed, arguments)
    if tokens.numel():
        judge_stats(stats, tokens.flatten(0, 1))
    return tokens


@sanitize_bfloat16
@pytest.mark.parametrize(
    ("batch", "grid", "patch", "width", "prefix"),
    [
        pytest.param(1, (1, 1), (16, 16), 192, 0, id="1-token"),
        pytest.param(3, (3, 5), (4, 4), 100, 0, id="15-tokens-batch-3"),
        pytest.param(2, (4, 4), (8, 8), 65, 1, id="17-tokens"),
        pytest.param(1, (7, 7), (4, 4), 64, 1, id="50-tokens"),
        pytest.param(1, (14, 14), (4, 4), 48, 1, id="197-tokens"),
        pytest.param(1, (16, 16), (2, 2), 40, 1, id="257-tokens"),
        pytest.param(1, (24, 24), (2, 2), 16, 1, id="577-tokens"),
        pytest.param(1, (2, 3), (14, 14), 130, 5, id="patch-14-registers"),
        pytest.param(2, (1, 2), (32, 32), 20, 1, id="patch-32"),
        pytest.param(0, (2, 2), (4, 4), 64, 1, id="batch-0"),
    ],
)
def test_shapes(dtype, batch, grid, patch, width, prefix):
    arguments = draw_patch_embed(Draw(dtype, seed=width), batch, grid, patch, width, prefix=prefix)
    tokens = judge_patch_embed(arguments)
    assert tokens.shape == (batch, prefix + grid[0] * grid[1], width)


@sanitize_every_dtype
def test_the_smallest_tile(dtype, monkeypatch):
    """Tiles that cross from one image into the next, in groups of two rows, whatever the tile choice prefers."""
    tile = gemm_tiles.GemmTile(16, 64, 32, 4, 2, group_m=2)
    monkeypatch.setattr(gemm_tiles, "choose_patch_embed", lambda *a, **k: tile)
    judge_patch_embed(draw_patch_embed(Draw(dtype, seed=15), 3, (3, 5), (4, 4), 140, prefix=5))


@every_dtype
def test_the_stem_of_a_tiny_model(dtype):
    """224 x 224 in patches of 16 to 192 features."""
    judge_patch_embed(draw_patch_embed(Draw(dtype, seed=1), 1, (14, 14), (16, 16), 192))


@sanitize_every_dtype
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"prefix": 0, "position": "none", "bias": False}, id="projection-only"),
        pytest.param({"prefix": 0, "position": "none"}, id="bias"),
        pytest.param({"prefix": 1, "position": "none", "bias": False}, id="class-token"),
        pytest.param({"prefix": 0, "position": "all"}, id="positions-without-prefix"),
        pytest.param({"prefix": 1, "position": "all"}, id="positions-of-all-tokens"),
        pytest.param({"prefix": 1, "position": "patches"}, id="positions-of-patches"),
        pytest.param({"prefix": 5, "position": "all"}, id="registers-positions-of-all-tokens"),
        pytest.param({"prefix": 5, "position": "patches"}, id="registers-positions-of-patches"),
        pytest.param({"channels": 1}, id="one-channel"),
        pytest.param({"channels": 4}, id="four-channels"),
    ],
)
def test_what_is_added(dtype, options):
    judge_patch_embed(draw_patch_embed(Draw(dtype, seed=2), 2, (3, 2), (4, 4), 70, **options))


@sanitize_bfloat16
@pytest.mark.parametrize("patch", [(2, 6), (5, 3), (1, 1)], ids=lambda p: f"{p[0]}x{p[1]}")
def test_patches_that_are_no_square(dtype, patch):
    judge_patch_embed(draw_patch_embed(Draw(dtype, seed=3), 2, (3, 4), patch, 33))


@sanitize_bfloat16
@pytest.mark.parametrize("normalised", [True, False], ids=["mean-std", "plain"])
def test_bytes(dtype, normalised):
    """uint8 pixels: divided by 255, then (x - mean) / std, rounded to the dtype of the weights before the product."""
    draw = Draw(dtype, seed=4)
    arguments = draw_patch_embed(draw, 2, (3, 2), (4, 4), 70) | {"images": draw.bytes(2, 3, 12, 8)}
    judge_patch_embed(arguments | ({"mean": MEAN, "std": STD} if normalised else {}))


@sanitize_bfloat16
def test_floating_images_are_normalised_too(dtype):
    arguments = draw_patch_embed(Draw(dtype, seed=5), 2, (3, 2), (4, 4), 70)
    judge_patch_embed(arguments | {"mean": MEAN, "std": STD})


@every_dtype
@pytest.mark.parametrize("value", [0, 255], ids=["black", "white"])
def test_bytes_at_the_ends_of_their_range(dtype, value):
    draw = Draw(dtype, seed=6)
    arguments = draw_patch_embed(draw, 1, (2, 2), (4, 4), 20) | {"mean": MEAN, "std": STD}
    arguments["images"] = torch.full((1, 3, 8, 8), value, dtype=torch.uint8, device=DEVICE)
    judge_patch_embed(arguments)


@sanitize_bfloat16
@pytest.mark.parametrize("layout", ["channels-last", "framed-by-nan", "cropped", "flipped-axes", "bytes-channels-last"])
def test_image_layouts_change_no_bit(dtype, layout):
    draw = Draw(dtype, seed=7)
    arguments = draw_patch_embed(draw, 2, (3, 2), (4, 4), 40)
    if layout == "bytes-channels-last":
        arguments |= {"images": draw.bytes(2, 3, 12, 8), "mean": MEAN, "std": STD}
    images = arguments["images"]
    clean = patch_embed(**arguments)
    if layout in ("channels-last", "bytes-channels-last"):
        view = images.contiguous(memory_format=torch.channels_last)
        assert not view.is_contiguous()
    elif layout == "framed-by-nan":
        view = nan_framed(images)
    elif layout == "cropped":
        whole = torch.full((2, 3, 20, 20), float("nan"), dtype=dtype, device=DEVICE)
        whole[:, :, 5:17, 7:15] = images
        view = whole[:, :, 5:17, 7:15]
    else:
        view = images.transpose(2, 3).contiguous().transpose(2, 3)
    same_bits(patch_embed(**arguments | {"images": view}), clean)


@sanitize_bfloat16
@pytest.mark.parametrize("position", ["all", "patches"])
def test_foreign_values_change_no_bit(dtype, position):
    """NaN on every side of every tensor, in tiles that are full in no direction."""
    arguments = draw_patch_embed(Draw(dtype, seed=8), 2, (3, 2), (3, 3), 70, prefix=2, position=position)
    framed = {name: value if name == "weight" else nan_framed(value) for name, value in arguments.items()}
    for mine, expected in zip(
        patch_embed(**framed, emit_stats=True), patch_embed(**arguments, emit_stats=True), strict=True
    ):
        same_bits(mine, expected)


@every_dtype
def test_weight_strides_change_no_bit(dtype):
    arguments = draw_patch_embed(Draw(dtype, seed=9), 1, (2, 2), (4, 4), 40)
    clean = patch_embed(**arguments)
    weight = arguments["weight"]
    for view in (nan_framed(weight), weight.contiguous(memory_format=torch.channels_last)):
        same_bits(patch_embed(**arguments | {"weight": view}), clean)


@every_dtype
@pytest.mark.parametrize("parameter", ["weight", "bias", "prefix", "position", "mean"])
def test_a_zeroed_parameter_is_noticed(dtype, parameter):
    arguments = draw_patch_embed(Draw(dtype, seed=10), 2, (3, 2), (4, 4), 70) | {"mean": MEAN, "std": STD}
    tokens = patch_embed(**arguments | {parameter: torch.zeros_like(arguments[parameter])})
    with pytest.raises(AssertionError, match="over the allowed"):
        judge(tokens, reference.patch_embed, arguments)


@every_dtype
@pytest.mark.parametrize("row", [0, 1, 2], ids=["class-token", "first-register", "last-register"])
def test_a_lost_token_is_noticed(dtype, row):
    arguments = draw_patch_embed(Draw(dtype, seed=11), 2, (3, 2), (4, 4), 70, prefix=3)
    prefix = arguments["prefix"].clone()
    prefix[row] = 0
    with pytest.raises(AssertionError, match="over the allowed"):
        judge(patch_embed(**arguments | {"prefix": prefix}), reference.patch_embed, arguments)


@every_dtype
def test_it_is_the_linear_layer_on_patches(dtype):
    """Without anything added, patches of one pixel are rows of a matrix."""
    draw = Draw(dtype, seed=12)
    images, weight = draw.images(1, 37, 3, 4), draw.weight(40, 37, 1, 1)
    rows = images[0].flatten(1).t().contiguous()
    arguments = {"x": rows, "weight": weight.flatten(1)}
    judge(patch_embed(images, weight)[0], reference.linear, arguments)
    judge(linear(**arguments), reference.linear, arguments)


def test_float32_is_computed_at_ieee_precision():
    arguments = draw_patch_embed(Draw(torch.float32, seed=13), 1, (3, 3), (16, 16), 64)
    assert judge(patch_embed(**arguments), reference.patch_embed, arguments).row < IEEE_ERROR


def test_tf32_on_request():
    arguments = draw_patch_embed(Draw(torch.float32, seed=14), 1, (3, 3), (8, 8), 40)
    truth = reference.patch_embed(**in_float64(arguments))
    assert (patch_embed(**arguments, tf32=True).double() - truth).norm() / truth.norm() < 2e-3
