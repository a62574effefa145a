"""`linear` with K shared out: parts of a product summed by one launch, added up and finished by another."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from vit_kernels import gemm_tiles, reference
from vit_kernels.device import A100, H100, RTX_4090
from vit_kernels.gemm_tiles import GemmTile, choose_gemm, gemm_cycles, may_share, shared_out
from vit_kernels.launch import taped

from ..rung import DEVICE, RUNG
from ..weights import Draw
from .common import HALF_DTYPES, judge, judge_stats, sanitize_half
from .test_linear import FULL, draw_linear, run_linear

linear_module = importlib.import_module("vit_kernels.linear")

# By pointers and by descriptors; three parts of 5 steps are of 1, 2 and 2.
POINTERS = GemmTile(64, 64, 64, 4, 4, parts=3)
DESCRIBED = GemmTile(64, 128, 64, 4, 3, tma=1, parts=3)

hopper = pytest.mark.skipif(
    RUNG == "interpreted" or (RUNG == "executed" and torch.cuda.get_device_capability() != (9, 0)),
    reason="compiled for sm_90 alone",
)
every_way = pytest.mark.parametrize(
    "tile",
    [
        pytest.param(POINTERS, id="pointers"),
        pytest.param(DESCRIBED, id="descriptors", marks=hopper),
    ],
)


@pytest.fixture
def take(monkeypatch):
    def choose(tile):
        monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: tile)

    return choose


@every_way
@sanitize_half
def test_everything_at_once(dtype, tile, take):
    """Neither rows nor columns fill the last tile, of the sums and of what adds them up; partials of rows are 5."""
    take(tile)
    arguments = draw_linear(Draw(dtype, seed=61), 70, 320, 136, **FULL)
    y, stats = run_linear(arguments, emit_stats=True)
    judge(y, reference.linear, arguments)
    judge_stats(stats, y)


@every_way
@sanitize_half
@pytest.mark.parametrize("parts", [2, 8])
def test_fewest_and_most_parts_of_a_bare_product(dtype, tile, parts, take):
    """Two of one step each, as a first step that is the last; eight of which three have two steps, more than slots."""
    take(dataclasses.replace(tile, parts=parts))
    arguments = draw_linear(Draw(dtype, seed=62), 5, 64 * (2 if parts == 2 else 11), 64, bias=False)
    judge(run_linear(arguments), reference.linear, arguments)


@sanitize_half
def test_each_operand_may_have_any_strides(dtype, take):
    take(POINTERS)
    arguments = draw_linear(Draw(dtype, seed=63), 9, 320, 70, norm="rms", activation="silu")
    plain = run_linear(arguments)
    arguments["x"], arguments["weight"] = (arguments[name].t().contiguous().t() for name in ("x", "weight"))
    assert torch.equal(run_linear(arguments), plain)


@pytest.mark.skipif(RUNG == "sanitized", reason="many rounds of a kernel that other tests sanitize")
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_one_part_more_changes_only_the_rounding_of_the_sum(dtype, take):
    """Sums are fp32: against one another, results of other shares of K differ by no more than their last bit."""
    arguments = draw_linear(Draw(dtype, seed=64), 17, 1024, 64, residual=True)
    results = []
    for parts in (2, 3, 8):
        take(dataclasses.replace(POINTERS, parts=parts))
        results.append(run_linear(arguments).double())
    for other in results[1:]:
        unit = torch.finfo(dtype).eps * results[0].abs().clamp_min(1e-3)
        assert ((other - results[0]).abs() <= unit).all()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"activation": "swiglu"}, id="gate"),
        pytest.param({"dtype": torch.float32}, id="dtype"),
        pytest.param({"k": 200}, id="part of a step"),
        pytest.param({"k": 128}, id="fewer steps than parts"),
        pytest.param({"tile": DESCRIBED}, id="descriptors of another GPU"),
    ],
)
def test_a_problem_that_it_cannot_compute_is_refused(change, monkeypatch):
    """The tile choice never asks for it; a tuned file might."""
    options = {"k": 320, "dtype": torch.float16, "activation": "none", "tile": POINTERS} | change
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: options["tile"])
    device_of = linear_module.device_of
    monkeypatch.setattr(linear_module, "device_of", lambda x: dataclasses.replace(device_of(x), capability=80))
    arguments = draw_linear(Draw(options["dtype"], seed=65), 3, options["k"], 64, activation=options["activation"])
    with pytest.raises(ValueError, match="a tile that shares out K does not fit this problem"):
        run_linear(arguments)


def test_what_it_can_compute():
    for tile in (POINTERS, DESCRIBED):
        assert may_share(tile, 3, 64, 320, 2, H100, gated=False, described=True)
        assert may_share(tile, 3, 64, 320, 2, A100, gated=False, described=True) == (tile is POINTERS)
        assert may_share(tile, 3, 64, 320, 2, H100, gated=False, described=False) == (tile is POINTERS)
    roles = dataclasses.replace(DESCRIBED, roles=True)
    assert not may_share(roles, 3, 64, 320, 2, H100, gated=False, described=True)


@pytest.mark.parametrize(
    ("m", "n", "k", "parts"),
    [
        pytest.param(197, 768, 3072, 5, id="24 tiles on 132 SMs, 48 steps by 5"),
        pytest.param(197, 384, 1536, 8, id="room for 11, 24 steps: no more than 8"),
        pytest.param(197, 1152, 1152, 3, id="36 tiles leave room for 3"),
        pytest.param(197, 640, 1024, 6, id="room for 6: 16 steps by 3"),
        pytest.param(197, 768, 768, None, id="short"),
        pytest.param(197, 768, 3080, None, id="part of a step"),
        pytest.param(1576, 768, 3072, None, id="150 tiles"),
    ],
)
def test_how_many_parts(m, n, k, parts):
    tile = GemmTile(64, 128, 64, 4, 4, tma=1)
    shared = shared_out(tile, m, n, k, 132)
    assert shared == (None if parts is None else dataclasses.replace(tile, parts=parts))


def test_a_long_product_of_few_rows_is_shared_out():
    """fc2 of ViT-B and L at batch 1; not where there are tiles for all SMs, where the second launch takes what the
    first gains, or on an H100, where a long ring of one launch was as fast as two."""
    for width, hidden, device in ((768, 3072, A100), (1024, 4096, A100), (1280, 5120, RTX_4090)):
        tile = choose_gemm(197, width, hidden, 2, device, described=True, residual=True)
        assert tile.parts > 1 and not tile.tma
    for m, n, k, options in (
        (197, 768, 3072, {}), (197, 1024, 4096, {}), (1576, 768, 3072, {}), (12608, 768, 3072, {}), (197, 768, 768, {}),
        (197, 2304, 768, {}), (197, 768, 3072, {"gated": True}),
        (197, 100, 3080, {}), (788, 768, 3072, {}),
    ):  # fmt: skip
        assert choose_gemm(m, n, k, 2, H100, described=True, **options).parts == 1, (m, n, k, options)
    assert choose_gemm(197, 768, 3072, 4, H100, described=True).parts == 1


def test_modelled_time_of_parts():
    """One round of programs with a share of the steps each; a second launch that moves every part."""
    tile = GemmTile(64, 128, 64, 4, 4, tma=1, parts=4)
    known = gemm_cycles(tile, 64, 128, 4096, 2, H100)
    fewer = gemm_cycles(dataclasses.replace(tile, parts=2), 64, 128, 4096, 2, H100)
    step = (1700 + (64 + 128) * 64 * 2 / 48) / 4  # what a slot takes to fill
    assert step > gemm_tiles.step_cycles(tile, 2, H100, busy_sms=4) + 50
    moved = 2 * 4 * 64 * 128 / 132 / 48
    assert fewer - known == pytest.approx(16 * step - moved)
    launches = gemm_tiles.parts_cycles(tile, 64, 128, 4096, H100), gemm_tiles.sum_cycles(4, 64, 128, H100)
    assert sum(launches) == known and min(launches) > 5000
    assert gemm_tiles.parts_cycles(tile, 64 * 34, 128, 4096, H100) > 1.5 * launches[0], "136 programs, 132 SMs"


@pytest.mark.skipif(DEVICE != "cpu" or RUNG != "interpreted", reason="asks about launches, whatever they compute")
def test_sums_are_made_for_this_call_alone(take):
    """No memory is kept between calls, which may run on several streams at once."""
    take(POINTERS)
    arguments = draw_linear(Draw(torch.float16, seed=66), 9, 320, 70)
    with taped() as tape:
        run_linear(arguments)
        run_linear(arguments)
    sums = [tensor for tensor in tape.allocated if tensor.dtype == torch.float32]
    assert [tuple(tensor.shape) for tensor in sums] == [(3, 9, 70)] * 2 and sums[0].data_ptr() != sums[1].data_ptr()
    assert len(tape.launches) == 4
