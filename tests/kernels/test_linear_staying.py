"""`linear` with the kernel whose weights stay in shared memory. It is in Gluon: sanitized, or executed on sm_90."""

from __future__ import annotations

import dataclasses
import importlib
import random

import pytest
import torch

from vit_kernels import gemm_tiles, reference, row_stats
from vit_kernels.gemm_tiles import GemmTile

from ..rung import RUNG
from ..weights import Draw
from .common import judge, judge_stats, sanitize_bfloat16, sanitize_half
from .test_linear import FULL, draw_linear, run_linear

linear_module = importlib.import_module("vit_kernels.linear")

TILE = GemmTile(128, 128, 64, 4, 8, tma=1, staying=True)

compiled_code = pytest.mark.skipif(
    RUNG == "interpreted" or (RUNG == "executed" and torch.cuda.get_device_capability() != (9, 0)),
    reason="a kernel in Gluon for sm_90: no interpreter runs it, and no other GPU",
)


@pytest.fixture
def sms(on_sms):
    return lambda count: on_sms(count, TILE)


@pytest.mark.parametrize(
    ("seed", "count", "m", "k", "n"),
    [
        # The sanitizer computes whole tiles, however few rows there are.
        pytest.param(61, 1, 300, 72, 128, id="one program, three tiles of the same weights"),
        pytest.param(62, 1, 70, 72, 320, id="one program, other weights in each tile"),
        pytest.param(63, 2, 150, 72, 128, id="a program a row"),
        pytest.param(64, 3, 150, 72, 192, id="a program is over, and has a tile of each column"),
        pytest.param(68, 2, 150, 72, 320, id="less programs than columns, the second begins within one"),
    ],
)
@compiled_code
@sanitize_half
def test_everything_at_once(seed, count, m, k, n, dtype, sms):
    """Neither rows nor columns nor steps fill the last tile; partial statistics of results."""
    sms(count)
    arguments = draw_linear(Draw(dtype, seed=seed), m, k, n, **FULL)
    y, stats = run_linear(arguments, emit_stats=True)
    judge(y, reference.linear, arguments)
    judge_stats(stats, y)


@pytest.mark.parametrize("sums", [True, False], ids=["sums", "no sums"])
@compiled_code
@sanitize_bfloat16
def test_nothing_added(sums, dtype, sms):
    """The norm of whole rows, with sums of the weights and without, and nothing beside the product to read."""
    sms(1)
    arguments = draw_linear(Draw(dtype, seed=65), 150, 136, 64, norm="layer", activation="gelu")
    judge(run_linear(arguments, sums=sums), reference.linear, arguments)


@compiled_code
@sanitize_bfloat16
def test_one_step_a_tile_and_no_vectors(dtype, sms):
    """The ring of x goes round once in eight tiles; statistics of two tiles' rows are there at a time."""
    sms(1)
    arguments = draw_linear(Draw(dtype, seed=66), 260, 64, 64, norm="rms", activation="silu")
    arguments["bias"] = None
    judge(run_linear(arguments), reference.linear, arguments)


@compiled_code
@sanitize_bfloat16
def test_partial_statistics_of_rows_are_merged(dtype, sms):
    """Three partials a row, the last of 8 columns, from the kernel itself."""
    sms(1)
    arguments = draw_linear(Draw(dtype, seed=67), 20, 136, 64, norm="layer")
    whole = row_stats(arguments["x"])
    parts = torch.empty(2, 3, 20, device=whole.device)
    for t in range(3):
        parts[:, t : t + 1] = row_stats(arguments["x"][:, 64 * t : 64 * (t + 1)].contiguous())
    judge(run_linear(arguments, stats=parts), reference.linear, arguments)


def _tiles_of_programs(rows: int, columns: int, programs: int, left: int) -> list[list[tuple[int, int]]]:
    """What the kernel's `_tile_of_turn` gives each program."""
    each, found = programs // columns, []
    for program in range(programs):
        if program < each * columns:
            found.append([(row, program // each) for row in range(program % each, rows - left, each)])
            continue
        share = -(-left * columns // (programs - each * columns))
        first = (program - each * columns) * share
        numbers = range(first, min(first + share, left * columns))
        found.append([(rows - left + number % left, number // left) for number in numbers])
    return found


def test_programs_share_all_tiles_evenly() -> None:
    """Every tile has one program, every program a tile, and none more than its share, for 2,000 problems."""
    draw = random.Random(0)
    for _ in range(2000):
        rows, columns, count = draw.randint(1, 450), draw.randint(1, 20), draw.choice([1, 2, 5, 13, 108, 114, 132])
        programs, left = gemm_tiles.staying_programs(TILE, 128 * rows, 128 * columns, count)
        shares = _tiles_of_programs(rows, columns, programs, left)
        tiles = [tile for share in shares for tile in share]
        assert sorted(tiles) == [(row, column) for row in range(rows) for column in range(columns)]
        assert min(map(len, shares)) >= 1 and programs <= count
        assert max(map(len, shares)) == -(-rows * columns // min(count, rows * columns))


# ViT-S at batch 64: fc1 has 11 programs for each of 12 columns of tiles; qkv 14 for each of 9, and of the 6 that are
# over five do the 99th row of all, two tiles each.
@pytest.mark.parametrize(("n", "programs", "left"), [(1536, 132, 0), (1152, 131, 1), (384, 132, 0)])
def test_programs_of_vit_s(n: int, programs: int, left: int) -> None:
    assert gemm_tiles.staying_programs(TILE, 12608, n, 132) == (programs, left)


@pytest.mark.parametrize(("k", "slots"), [(64, (1, 8)), (192, (3, 8)), (320, (5, 7)), (384, (6, 6)), (385, (0, 0))])
def test_weights_and_x_share_the_slots(k: int, slots: tuple[int, int]) -> None:
    """x has at least as many as weights, for a tile's weights are asked for with x of its first steps."""
    assert gemm_tiles.staying_slots(TILE, k) == slots


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"n": 100}, id="columns"),
        pytest.param({"activation": "swiglu"}, id="gate"),
        pytest.param({"dtype": torch.float32}, id="dtype"),
        pytest.param({"k": 392}, id="steps"),
        pytest.param({}, id="gpu"),
    ],
)
def test_a_problem_that_it_cannot_compute_is_refused(change, monkeypatch):
    """The tile choice never asks for it; a tuned file might."""
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: TILE)
    device_of, capability = linear_module.device_of, 90 if change else 80
    monkeypatch.setattr(
        linear_module, "device_of", lambda x: dataclasses.replace(device_of(x), capability=capability, sm_count=1)
    )
    options = {"n": 128, "k": 64, "dtype": torch.float16, "activation": "none"} | change
    arguments = draw_linear(
        Draw(options["dtype"], seed=45), 3, options["k"], options["n"], activation=options["activation"]
    )
    with pytest.raises(ValueError, match="a tile whose weights stay does not fit"):
        run_linear(arguments)
