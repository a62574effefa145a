"""The attention profile: its shapes, what compiled code says of them, and the measured path with a stand-in GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from vit_bench.profiling import attention_gpu
from vit_bench.profiling.attention import packed_qkv, ranges, rows_not_run
from vit_bench.profiling.recorded import tile_waste
from vit_bench.profiling.sweep import Point, head_counts, images_for, points, span, token_counts
from vit_bench.profiling.times import evidence_of, seconds_of
from vit_bench.results import OURS, Row, Spread
from vit_bench.timed.attentions import ATTENTIONS
from vit_bench.timed.contenders import CannotRunError, Contender, Run
from vit_engine.config import ViTConfig
from vit_kernels import attention_tiles

BASE = ViTConfig.preset("vit_base_patch16_224")
CPU = torch.device("cpu")


def test_lengths_are_geometric_and_vits_own():
    found = token_counts(50, 16384)
    assert {50, 197, 257, 577, 1025, 1370, 4096, 16384} <= set(found) and found == sorted(set(found))
    assert {64, 128, 192, 256, 384, 512, 2048, 8192} <= set(found)
    assert max(b / a for a, b in itertools.pairwise(found)) <= 1.5
    assert token_counts(60, 130) == [60, 64, 96, 128, 130] and token_counts(197, 197) == [197]


def test_heads_and_images():
    assert head_counts(1, 8, own=12) == [1, 2, 3, 4, 6, 8, 12]
    assert [images_for(tokens) for tokens in (50, 197, 16384, 40_000)] == [256, 64, 1, 1]
    found = points(BASE, (197, 256), (12, 12), None, "bf16")
    assert [p.tokens for p in found] == [197, 256], "the model's own length with its own heads is one point"
    assert {p.batch for p in points(BASE, (50, 400), (1, 4), 8, "bf16")} == {8}
    heads = [p.heads for p in points(BASE, (64, 64), (1, 4), 8, "bf16") if p.tokens == BASE.num_tokens]
    assert heads == [1, 2, 3, 4, 12]


@pytest.mark.parametrize("text", ["", "a", "50:", ":50", "0", "9:8", "50:60:70", "-3:5"])
def test_wrong_spans_name_the_argument(text):
    with pytest.raises(ValueError, match="--tokens must be"):
        span(text, "--tokens")


def test_right_spans():
    assert span("50:16384", "x") == (50, 16384) and span("197", "x") == (197, 197)


@pytest.mark.parametrize(("queries", "keys", "width"), [(197, 197, 64), (256, 256, 64), (50, 77, 72), (1, 1, 8)])
def test_waste_is_what_the_tiles_compute_over_what_is_needed(queries, keys, width):
    """Counted score by score: rows in tiles of 64, keys in blocks of 32 and a last one of a power of two."""
    block, main, tail = 32, 64, 16 if width == 72 else 0
    rest = attention_tiles.rest_block(keys, block)
    arguments = {"queries": queries, "keys": keys, "WIDTH": width, "MAIN": main, "TAIL": tail}
    arguments |= {"BLOCK_M": 64, "BLOCK_N": block, "REST": rest}
    rows = sum(64 for _ in range(0, queries, 64))
    columns = sum(block if keys - start >= block else rest for start in range(0, keys, block))
    assert tile_waste(arguments) == rows * columns * (main + tail) / (queries * keys * width)


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "run": 0, "suite": "attention", "case": "c", "label": "attention", "contender": OURS, "device": "H100 SXM",
        "dtype": "bf16", "source": "compiled", "shape": {"tokens": 197}, "modelled_s": 2e-6, "bound_s": 1e-6,
    }  # fmt: skip
    return Row(**(values | changes))


def test_the_time_of_a_row():
    assert seconds_of(row()) == 2e-6
    assert seconds_of(row(bound_s=3e-6)) == 3e-6, "the model knows nothing of memory"
    assert seconds_of(row(modelled_s=None)) == 1e-6
    assert seconds_of(row(source="gpu", seconds=Spread(9e-6, 8e-6, 1e-5, 25))) == 9e-6
    assert seconds_of(row(modelled_s=None, bound_s=None)) is None


def test_what_a_row_is_evidence_of():
    timed = row(source="gpu", seconds=Spread(9e-6, 8e-6, 1e-5, 25))
    found = [row(), row(modelled_s=None), row(modelled_s=None, bound_s=None), timed, row(source="not run")]
    assert [evidence_of(one) for one in found] == ["modelled", "bound", "not run", "measured", "not run"]


def test_ranges_follow_each_other_in_a_lane_for_each_contender():
    missing = row(contender="flash-attn", source="not run")
    timed = row(contender="SDPA", source="gpu", seconds=Spread(5e-6, 4e-6, 6e-6, 25))
    found = ranges([row(), timed, row(case="d"), missing])
    assert [(r.lane, r.name, r.start, r.duration) for r in found] == [
        (OURS, "c", 0.0, 2e-6),
        ("SDPA", "c", 0.0, 5e-6),
        (OURS, "d", 2e-6, 2e-6),
    ]


# --- measured: the interpreter stands for the GPU, a list of seconds for its clock ------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Who was timed together; the n-th of them takes n seconds."""
    together: list[list[str]] = []

    def single_kernels(runs: dict[str, Run], device: torch.device) -> dict[str, Spread]:
        together.append(list(runs))
        assert all(isinstance(run(), torch.Tensor) for run in runs.values())
        return {name: Spread(1.0 * n, 0.9 * n, 1.2 * n, 25) for n, name in enumerate(runs, 1)}

    monkeypatch.setattr(attention_gpu, "single_kernels", single_kernels)
    return together


OUR, *_, MATH = (one for one in ATTENTIONS if one.name in (OURS, "PyTorch SDPA, math"))


def _half(problem: Any) -> Run:
    """Wrong for the last image alone."""

    def run() -> torch.Tensor:
        found = MATH.make(problem)().clone()
        found[-1] *= 0.5
        return found

    return run


def _refusing(problem: Any) -> Run:
    raise CannotRunError("heads of 16 are too narrow")


def _failing(problem: Any) -> Run:
    def run() -> torch.Tensor:
        raise RuntimeError("No available kernel.\nAborting execution.")

    return run


@pytest.mark.interpreted_only
def test_a_point_that_memory_does_not_hold_is_not_run_and_the_next_one_is(timed, monkeypatch):
    large, small = Point(2**20, 70, 2, 16, "fp16"), Point(1, 70, 2, 16, "fp16")

    def made(point: Point, device: Any) -> Any:
        if point is large:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.75 GiB.")
        return packed_qkv(point, device)

    monkeypatch.setattr(attention_gpu, "packed_qkv", made)
    found = list(attention_gpu.measured_rows([large, small], CPU, "a GPU", [OUR, MATH], 0, "any"))
    assert [(row.contender, row.source) for row in found] == [
        (OURS, "not run"), (MATH.name, "not run"), (OURS, "gpu"), (MATH.name, "gpu"),
    ]  # fmt: skip
    assert "not enough memory for q, k and v" in found[0].reason and "8.75 GiB" in found[0].reason

    def full(runs: Any, device: torch.device) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(attention_gpu, "single_kernels", full)
    (found,) = attention_gpu.measured_rows([small], CPU, "a GPU", [OUR], 0, "any")
    assert found.source == "not run" and "not enough memory to time it" in found.reason


@pytest.mark.interpreted_only
def test_what_is_wrong_or_refuses_is_not_timed(timed):
    contenders = [OUR, *(Contender(m.__name__[1:], m) for m in (_half, _refusing, _failing)), MATH]
    begun: list[Point] = []
    point = Point(2, 70, 2, 16, "fp16")
    found = list(attention_gpu.measured_rows([point], CPU, "a GPU", contenders, 4, "any", begun.append))
    assert begun == [point] and timed == [[OURS, MATH.name]]
    ours, half, refusing, failing, math = found
    assert [row.source for row in found] == ["gpu", "not run", "not run", "not run", "gpu"]
    assert ours.seconds is not None and math.seconds is not None and math.seconds.median == 2.0
    assert (ours.seconds.p80, ours.seconds.timings, ours.run, ours.device) == (1.2, 25, 4, "a GPU")
    assert ours.case == "attention/h2d16/n70/b2" and ours.bound_s is None
    assert ours.flops == 4 * 2 * 2 * 70 * 70 * 16 and 0 < ours.errors["row"] <= ours.errors["row_allowed"]
    assert "wrong result, not timed" in half.reason and refusing.reason == "heads of 16 are too narrow"
    assert failing.reason == "cannot run this: RuntimeError: No available kernel."
    assert math.settings["backend"] == "math" and "torch" in math.settings


@pytest.mark.interpreted_only
def test_a_known_gpu_adds_what_its_compiled_code_shows(timed, monkeypatch):
    from vit_kernels.device import H100

    def compiled(some: Sequence[Point], device: Any, run: int, model: str) -> Any:
        assert device == H100
        return iter([row(case=str(point), launches=1, code={"kernels": [{"waves": 2.0}]}) for point in some])

    monkeypatch.setattr(attention_gpu, "compiled_rows", compiled)
    some, name = [Point(1, 20, 1, 16, "fp16")], "NVIDIA H100 80GB HBM3"
    ours, theirs = attention_gpu.measured_rows(some, CPU, name, [OUR, MATH], 0, "any")
    assert (ours.code, ours.bound_s, ours.modelled_s) == ({"kernels": [{"waves": 2.0}]}, 1e-6, 2e-6)
    assert ours.device == theirs.device == "H100 SXM"
    assert theirs.code == {} and theirs.bound_s is None and theirs.seconds is not None


def test_who_takes_no_part():
    without = {row.contender: row.reason for row in rows_not_run("bf16", "H100 SXM", 0, "any", gpu=False)}
    assert {one.name for one in ATTENTIONS} - {OURS} == set(without)
    assert set(without.values()) == {"times are measured on a GPU only"}
    missing = {row.contender: row.reason for row in rows_not_run("bf16", "H100 SXM", 0, "any", gpu=True)}
    assert missing == {one.name: one.missing() for one in ATTENTIONS if one.missing() and one.name != OURS}


def test_rows_that_no_warpgroup_computes_are_no_waste():
    """193 queries are four times 64 rows, and 341 keys 2 x 128 + 64 + 32."""
    arguments = {"queries": 193, "keys": 341, "WIDTH": 64, "BLOCK_M": 192, "BLOCK_N": 128, "HALF": True, "REST": 32}
    assert tile_waste(arguments) == 256 * (2 * 128 + 64 + 32) / (193 * 341)
