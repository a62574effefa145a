"""`linear` with the kernel whose products have rows as columns. In Gluon: sanitized, or executed."""

from __future__ import annotations

import importlib

import pytest
import torch

from vit_kernels import gemm_tiles, linear, reference, row_stats
from vit_kernels.device import H100
from vit_kernels.gemm_tiles import GemmTile, column_tiles, gemm_shared_bytes, wide_and_tail
from vit_kernels.linear_columns import SHARED_SM_REGISTERS

from ..rung import RUNG
from ..weights import Draw
from .common import judge, judge_stats, sanitize_bfloat16, sanitize_half
from .test_linear import FULL, draw_linear, run_linear

TILES = {
    "128 x 72": GemmTile(72, 128, 64, 8, 2, tma=1, columns=True),
    "64 x 72": GemmTile(72, 64, 64, 4, 2, tma=2, columns=True),
    "128 x 160": GemmTile(160, 128, 64, 8, 2, tma=1, columns=True),
    "256 x 144": GemmTile(144, 256, 64, 16, 2, tma=1, columns=True),
}
compiled_code = pytest.mark.skipif(
    RUNG == "interpreted" or (RUNG == "executed" and torch.cuda.get_device_capability() != (9, 0)),
    reason="a kernel in Gluon for sm_90: no interpreter runs it, and no other GPU",
)


@pytest.mark.parametrize("name", TILES)
@compiled_code
@sanitize_half
def test_everything_at_once(name, dtype, monkeypatch):
    """Rows and steps do not fill the last tile, and slots are used again."""
    tile = TILES[name]
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: tile)
    arguments = draw_linear(Draw(dtype, seed=71), tile.block_m + 5, 200, tile.block_n, **FULL)
    y, stats = run_linear(arguments, emit_stats=True)
    judge(y, reference.linear, arguments)
    judge_stats(stats, y)


@pytest.mark.parametrize("name", TILES)
@compiled_code
@sanitize_bfloat16
def test_nothing_added(name, dtype, monkeypatch):
    tile = TILES[name]
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: tile)
    arguments = draw_linear(Draw(dtype, seed=72), 70, 136, 2 * tile.block_n, norm="layer", activation="gelu")
    judge(run_linear(arguments), reference.linear, arguments)


@compiled_code
@sanitize_half
def test_weights_that_leave_nothing_of_a_mean(dtype, monkeypatch):
    tile = TILES["64 x 72"]
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: tile)
    arguments = draw_linear(Draw(dtype, seed=74), 72, 64, 64, norm="layer", activation="gelu")
    arguments["x"] = Draw(dtype, seed=75).rows(72, 64, offset=30.0)
    judge(run_linear(arguments, sums=False), reference.linear, arguments)


@compiled_code
@sanitize_half
def test_sums_of_weights_that_are_not_centred(dtype, monkeypatch):
    """`fold_norm` leaves next to nothing of them, so that other tests do not see them: here a row's mean counts, in the
    tail, too."""
    tile = TILES["64 x 72"]
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: tile)
    arguments = draw_linear(Draw(dtype, seed=73), 72, 64, 64, norm="layer")
    ones = torch.ones_like(arguments["norm_weight"])
    arguments |= {"x": arguments["x"] + 1, "norm_weight": ones, "norm_bias": torch.zeros_like(ones)}
    x, weight = arguments["x"], arguments["weight"]
    y = linear(
        x, weight, arguments["bias"], norm="layer", stats=row_stats(x), column_sum=weight.float().sum(1),
        eps=arguments.get("eps", 1e-6),
    )  # fmt: skip
    assert isinstance(y, torch.Tensor)
    judge(y, reference.linear, arguments)


COLUMNS = {(1576, 768): (72, 128), (1576, 3072): (144, 256), (1576, 2304): (136, 256)}


@pytest.mark.parametrize(("m", "n"), COLUMNS)
def test_tiles_give_every_sm_one(m, n):
    rows, features = COLUMNS[m, n]
    tile = next(t for t in column_tiles(m, n, 132, residual=False) if t.block_n == features)
    assert (tile.block_m, tile.block_n) == (rows, features)
    assert -(-m // rows) * (n // features) <= 132
    assert sum(wide_and_tail(tile)) == rows
    assert gemm_shared_bytes(tile, 2) <= H100.shared_memory


def test_two_programs_share_an_sm_where_there_are_few_rows():
    (tile,) = column_tiles(197, 3072, 132, residual=False)
    assert (tile.block_m, tile.block_n, tile.tma) == (72, 64, 2)
    assert 2 * gemm_shared_bytes(tile, 2) <= H100.shared_memory
    assert SHARED_SM_REGISTERS * 32 * (tile.num_warps + 4) * 2 <= 65536


@pytest.mark.parametrize(("programs", "cap"), [(1, None), (2, SHARED_SM_REGISTERS)])
def test_registers_are_capped_where_programs_share_an_sm(programs, cap, monkeypatch):
    tile, caps = GemmTile(72, 64, 64, 4, 5, tma=programs, columns=True), []
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: tile)
    monkeypatch.setattr(gemm_tiles, "may_have_roles", lambda *a, **k: True)
    module = importlib.import_module("vit_kernels.linear")
    monkeypatch.setattr(module, "launch", lambda *a, **k: caps.append(k.get("maxnreg")))
    linear(torch.zeros(4, 64, dtype=torch.float16), torch.zeros(64, 64, dtype=torch.float16))
    assert caps == [cap]


def test_no_tile_for_few_or_many_rows():
    for m, n in ((50, 768), (12608, 3072), (1576, 328)):
        assert column_tiles(m, n, 132, residual=False) == []


def test_a_residual_has_no_room_beside_256_features():
    assert {t.block_n for t in column_tiles(1576, 3072, 132, residual=True)} == set()
    assert {t.block_n for t in column_tiles(1576, 768, 132, residual=True)} == {128}


@pytest.mark.parametrize(("features", "fits"), [(128, True), (256, False)], ids=["half a tile", "another GPU"])
def test_a_tile_that_does_not_fit_is_refused(features, fits, monkeypatch):
    tile = TILES["256 x 144"]
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: tile)
    monkeypatch.setattr(gemm_tiles, "may_have_roles", lambda *a, **k: fits)
    with pytest.raises(ValueError, match="rows are columns does not fit this problem"):
        linear(torch.zeros(4, 64, dtype=torch.float16), torch.zeros(features, 64, dtype=torch.float16))
