"""`patch_embed` with the kernel whose pixels come in blocks. In Gluon: executed; the emulated record has its cases."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from vit_bench.tile_choices import on_few_sms
from vit_kernels import gemm_tiles, patch_embed
from vit_kernels.device import A100, H100
from vit_kernels.gemm_tiles import GemmTile, choose_patch_embed, gemm_shared_bytes
from vit_kernels.patch_embed import pairs_of_block

from ..rung import RUNG
from ..weights import Draw
from .common import sanitize_bfloat16, sanitize_half
from .test_patch_embed import draw_patch_embed, judge_patch_embed

TILES = {
    64: GemmTile(128, 64, 64, 4, 3, tma=1, blocks=True),
    128: GemmTile(128, 128, 64, 4, 3, tma=1, blocks=True),
    192: GemmTile(128, 192, 64, 4, 3, tma=1, blocks=True),
}
compiled_code = pytest.mark.skipif(
    RUNG != "executed" or torch.cuda.get_device_capability() != (9, 0),
    reason="a kernel in Gluon for sm_90: no interpreter runs it, no other GPU, and no sanitizer, which keeps shared "
    "memory by elements, while this kernel sees the same bytes in two layouts",
)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"prefix": 0, "position": "none", "bias": False}, id="projection-only"),
        pytest.param({"prefix": 1, "position": "all"}, id="class-token-positions-of-all-tokens"),
        pytest.param({"prefix": 5, "position": "patches"}, id="registers-positions-of-patches"),
        pytest.param({"prefix": 0, "position": "all", "channels": 1}, id="one-channel"),
    ],
)
@pytest.mark.parametrize("features", TILES)
@compiled_code
@sanitize_half
def test_what_is_added(features, options, dtype, monkeypatch):
    """Three images, of which a block has four, and a program has both tiles of features."""
    monkeypatch.setattr(gemm_tiles, "choose_patch_embed", lambda *a, **k: TILES[features])
    with on_few_sms(1):
        judge_patch_embed(draw_patch_embed(Draw(dtype, seed=81), 3, (3, 4), (16, 16), 2 * features, **options))


@pytest.mark.parametrize(
    ("batch", "grid", "patch"),
    [
        pytest.param(17, (4, 4), (16, 16), id="three-blocks-of-images"),
        pytest.param(1, (9, 18), (16, 16), id="blocks-beyond-both-ends-of-the-grid"),
        pytest.param(2, (2, 6), (8, 16), id="half-as-high"),
        pytest.param(2, (2, 2), (32, 32), id="patch-32"),
    ],
)
@compiled_code
@sanitize_bfloat16
def test_blocks(batch, grid, patch, dtype, monkeypatch):
    monkeypatch.setattr(gemm_tiles, "choose_patch_embed", lambda *a, **k: TILES[64])
    with on_few_sms(2):
        judge_patch_embed(draw_patch_embed(Draw(dtype, seed=82), batch, grid, patch, 64))


@compiled_code
@sanitize_bfloat16
def test_images_that_lie_apart(dtype, monkeypatch):
    monkeypatch.setattr(gemm_tiles, "choose_patch_embed", lambda *a, **k: TILES[64])
    arguments = draw_patch_embed(Draw(dtype, seed=83), 2, (2, 2), (16, 16), 64)
    arguments["images"] = torch.cat([arguments["images"]] * 2, 1)[:, :3]
    assert not arguments["images"].is_contiguous()
    judge_patch_embed(arguments)


@pytest.mark.parametrize(
    ("batch", "grid", "block"),
    [
        (64, (14, 14), (32, 2, 1)),
        (64, (24, 24), (2, 8, 4)),
        (64, (16, 16), (1, 8, 8)),
        (8, (14, 14), (4, 2, 8)),
        (1, (14, 14), (1, 8, 8)),
    ],
)
def test_blocks_leave_little_over(batch, grid, block):
    assert pairs_of_block(batch, *grid) == block


@pytest.mark.parametrize(
    ("batch", "features", "chosen"), [(64, 768, 192), (64, 1024, 128), (8, 768, 128), (64, 192, 192), (1, 768, None)]
)
def test_the_tile_gives_half_the_sms_one(batch, features, chosen):
    tile = choose_patch_embed(197 * batch, features, 768, 2, H100, described=True)
    assert (tile.block_n if tile.blocks else None) == chosen
    assert gemm_shared_bytes(tile, 2) <= H100.shared_memory


def test_others_keep_their_tiles():
    for itemsize, device, described in ((2, A100, True), (4, H100, True), (2, H100, False)):
        assert not choose_patch_embed(12608, 768, 768, itemsize, device, described=described).blocks


@pytest.mark.parametrize(("width", "fits"), [(96, True), (64, False)], ids=["half a tile", "another GPU"])
def test_a_tile_that_does_not_fit_is_refused(width, fits, monkeypatch):
    monkeypatch.setattr(gemm_tiles, "choose_patch_embed", lambda *a, **k: TILES[64])
    monkeypatch.setattr(gemm_tiles, "may_have_roles", lambda *a, **k: fits)
    images, weight = torch.zeros(1, 3, 32, 32).half(), torch.zeros(width, 3, 16, 16).half()
    with pytest.raises(ValueError, match="blocks of pixels does not fit this problem"):
        patch_embed(images, weight)


@pytest.mark.parametrize("change", ["bytes", "odd", "rows apart", "bias apart", "normalised", "patch 14"])
def test_what_blocks_cannot_read(change, monkeypatch):
    """Those go to the other kernel: the tile choice is told."""
    asked = []

    def choose(*arguments, **options):
        asked.append(options["described"])
        raise LookupError

    monkeypatch.setattr(gemm_tiles, "choose_patch_embed", choose)
    for changed in (False, True):
        images, patch, options = torch.zeros(1, 3, 32, 64).half(), 16, cast(dict[str, Any], {})
        bias = torch.zeros(64).half()
        if changed and change == "bytes":
            images = images.to(torch.uint8)
        if changed and change == "odd":
            images = torch.zeros(1, 3, 32, 48).half()
        if changed and change == "rows apart":
            images = torch.zeros(1, 3, 64, 64).half()[:, :, :32]
        if changed and change == "bias apart":
            bias = torch.zeros(64, 2).half()[:, 0]
        if changed and change == "normalised":
            options["mean"], options["std"] = torch.zeros(3), torch.ones(3)
        if changed and change == "patch 14":
            images, patch = torch.zeros(1, 3, 28, 56).half(), 14
        with pytest.raises(LookupError):
            patch_embed(images, torch.zeros(64, 3, patch, patch).half(), bias, **options)
    assert asked == [True, False]
