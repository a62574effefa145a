"""`linear` with the kernel whose warps have roles. It is in Gluon, which has no interpreter: sanitized, or executed."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from vit_kernels import gemm_tiles, reference, row_stats
from vit_kernels.gemm_tiles import GemmTile

from ..rung import RUNG
from ..weights import Draw
from .common import judge, judge_stats, sanitize_bfloat16, sanitize_half
from .test_linear import FULL, draw_linear, run_linear

linear_module = importlib.import_module("vit_kernels.linear")

# Two warps load. The sanitizer computes whole tiles, however few rows there are.
TILE = GemmTile(128, 128, 64, 4, 3, group_m=2, tma=1, roles=True)
# Those that multiply load, those that finish load row statistics.
WIDE = GemmTile(128, 256, 64, 4, 3, group_m=2, tma=1, roles=True)

compiled_code = pytest.mark.skipif(
    RUNG == "interpreted" or (RUNG == "executed" and torch.cuda.get_device_capability() != (9, 0)),
    reason="a kernel in Gluon for sm_90: no interpreter runs it, and no other GPU",
)


@pytest.fixture
def sms(on_sms):
    return lambda count, tile=TILE: on_sms(count, tile)


@pytest.mark.parametrize(
    ("tile", "seed", "m", "k", "n"),
    [
        # Sums come where those of the tile before were, and vectors where those of two tiles before were.
        pytest.param(TILE, 41, 70, 72, 320, id="three tiles"),
        pytest.param(WIDE, 48, 70, 136, 576, id="three tiles of which the last has 64 columns"),
    ],
)
@compiled_code
@sanitize_half
def test_everything_at_once_in_the_tiles_of_one_program(tile, seed, m, k, n, dtype, sms):
    """Neither rows nor columns nor steps fill the last tile; partial statistics of results."""
    sms(1, tile)
    arguments = draw_linear(Draw(dtype, seed=seed), m, k, n, **FULL)
    y, stats = run_linear(arguments, emit_stats=True)
    judge(y, reference.linear, arguments)
    judge_stats(stats, y)


@pytest.mark.parametrize("tile", [TILE, WIDE], ids=["128 columns", "256 columns"])
@compiled_code
@sanitize_bfloat16
def test_nothing_added_in_the_tiles_of_one_program(tile, dtype, sms):
    """The norm of whole rows, and nothing beside the product to read."""
    sms(1, tile)
    arguments = draw_linear(Draw(dtype, seed=50), 70, 136, 2 * tile.block_n + 64, norm="layer", activation="gelu")
    judge(run_linear(arguments), reference.linear, arguments)


@pytest.mark.parametrize("added", [True, False], ids=["residual", "nothing added"])
@compiled_code
@sanitize_bfloat16
def test_narrow_tiles_of_the_wide_ones(added, dtype, sms):
    """5 tiles on 4 SMs: each does one, and then one of the four narrow ones of the fifth."""
    sms(4, WIDE)
    assert gemm_tiles.split_tiles(WIDE, 40, 1280, 4) == 1
    arguments = draw_linear(Draw(dtype, seed=49), 40, 136, 1280, norm="rms", activation="silu", residual=added)
    judge(run_linear(arguments), reference.linear, arguments)


@pytest.mark.parametrize(("offset", "sums"), [(0.0, True), (30.0, True), (30.0, False)])
@compiled_code
@sanitize_half
def test_an_offset_of_the_rows_is_not_among_what_is_rounded(offset, sums, dtype, sms):
    """Sums are handed over in 16 bits, before the mean is subtracted: weights that are not centred would show."""
    sms(1)
    arguments = draw_linear(Draw(dtype, seed=51), 40, 72, 128, norm="layer")
    arguments["x"] = Draw(dtype, seed=52).rows(40, 72, offset=offset)
    judge(run_linear(arguments, sums=sums), reference.linear, arguments)


@compiled_code
@sanitize_bfloat16
def test_rows_from_the_last_to_the_first(dtype, sms):
    """K is longer than N: two tiles of rows, the second one not whole, whose results would change places."""
    sms(1)
    arguments = draw_linear(Draw(dtype, seed=54), 150, 136, 64, residual=True)
    y, stats = run_linear(arguments, emit_stats=True)
    judge(y, reference.linear, arguments)
    judge_stats(stats, y)


@compiled_code
@sanitize_half
def test_rows_of_any_scale(dtype, sms):
    """Sums of rows as large as fp16 allows overflow it, and of small ones vanish in it, but for rstd."""
    sms(1)
    arguments = draw_linear(Draw(dtype, seed=53), 40, 72, 128, norm="layer")
    arguments["weight"] = arguments["weight"] * 64
    arguments["x"] = arguments["x"] * torch.logspace(-2, 4, 40).to(arguments["x"])[:, None]
    judge(run_linear(arguments), reference.linear, arguments)


@compiled_code
@sanitize_bfloat16
def test_one_step_a_tile_and_no_vectors(dtype, sms):
    """The ring goes round with one step a tile: 2 tiles of rows, one program."""
    sms(1)
    arguments = draw_linear(Draw(dtype, seed=42), 130, 64, 64)
    arguments["bias"] = None
    judge(run_linear(arguments), reference.linear, arguments)


@compiled_code
@sanitize_bfloat16
def test_the_last_tile_is_shared_out_in_narrow_ones(dtype, sms):
    """3 tiles on 2 SMs: each does one, and then half of the columns of the third."""
    sms(2)
    assert gemm_tiles.split_tiles(TILE, 40, 384, 2) == 1
    arguments = draw_linear(Draw(dtype, seed=43), 40, 64, 384, norm="rms", activation="silu", residual=True)
    y, stats = run_linear(arguments, emit_stats=True)
    judge(y, reference.linear, arguments)
    judge_stats(stats, y)


@compiled_code
@sanitize_bfloat16
def test_partial_statistics_of_rows_are_merged(dtype, sms):
    """Three partials a row, the last of 8 columns, from the kernel itself."""
    sms(1)
    draw = Draw(dtype, seed=44)
    arguments = draw_linear(draw, 20, 136, 64, norm="layer")
    whole = row_stats(arguments["x"])
    parts = torch.empty(2, 3, 20, device=whole.device)
    for t in range(3):
        parts[:, t : t + 1] = row_stats(arguments["x"][:, 64 * t : 64 * (t + 1)].contiguous())
    judge(run_linear(arguments, stats=parts), reference.linear, arguments)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"n": 100}, id="columns"),
        pytest.param({"activation": "swiglu"}, id="gate"),
        pytest.param({"dtype": torch.float32}, id="dtype"),
        pytest.param({"k": 70}, id="row pitch"),
        pytest.param({"tile": WIDE, "k": 128}, id="two steps of the wide tile"),
        pytest.param({"apart": "bias"}, id="pitch of the bias"),
        pytest.param({"apart": "layer_scale"}, id="pitch of LayerScale"),
        pytest.param({}, id="gpu"),
    ],
)
def test_a_problem_that_it_cannot_compute_is_refused(change, monkeypatch):
    """The tile choice never asks for it; a tuned file might."""
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: change.get("tile", TILE))
    device_of, capability = linear_module.device_of, 90 if change else 80
    monkeypatch.setattr(
        linear_module, "device_of", lambda x: dataclasses.replace(device_of(x), capability=capability, sm_count=1)
    )
    options = {"n": 128, "k": 64, "dtype": torch.float16, "activation": "none"} | change
    arguments = draw_linear(
        Draw(options["dtype"], seed=45), 3, options["k"], options["n"], activation=options["activation"]
    )
    if vector := change.get("apart"):
        arguments[vector] = torch.zeros(2 * options["n"], dtype=options["dtype"])[::2]
    with pytest.raises(ValueError, match="a tile whose warps have roles does not fit"):
        run_linear(arguments)
