"""What the tuner does with a GPU, with PyTorch's CUDA interface stood in for; the real thing is in tests/gpu."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vit_bench import tuning_gpu
from vit_bench.cases import prepare
from vit_bench.tuning import GpuLostError
from vit_bench.tuning_gpu import ROUNDS, RUNS, cold_times, gpu_bench
from vit_kernels import forget_tuned, tiles
from vit_kernels.device import device_of

from .test_tuning import DEFAULT, EMPTY, FAST, HERE, PROBLEM, norm_problem

pytestmark = pytest.mark.interpreted_only

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs are names, and replaying one takes as many seconds as it has letters; the names replayed, in order."""
    replayed: list[str] = []

    def captured(flush: torch.Tensor, run: Callable[[], Any] | None) -> Any:
        assert flush.nbytes == 2 * (40 << 20)
        name = "empty" if run is None else run()

        def replay() -> None:
            replayed.append(name)

        return SimpleNamespace(name=name, replay=replay)

    def timed(graph: Any) -> float:
        graph.replay()
        return float(len(graph.name))

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=40 << 20))
    monkeypatch.setattr(tuning_gpu, "_cold", captured)
    monkeypatch.setattr(tuning_gpu, "_replayed", timed)
    return replayed


def test_runs_take_turns_and_what_emptying_the_cache_takes_is_subtracted(clock):
    found = cold_times([lambda: "empty and 10 more", lambda: "empty and 10 more, then 5"], CPU)
    assert found == [[12 / RUNS] * ROUNDS, [20 / RUNS] * ROUNDS]
    assert clock == ["empty", "empty and 10 more", "empty and 10 more, then 5"] * (1 + ROUNDS)


def test_what_cannot_be_captured_does_not_stop_the_others(clock):
    def failing() -> str:
        raise RuntimeError("operation not permitted\nwhile capturing")

    found = cold_times([failing, lambda: "empty and 10 more"], CPU)
    assert found == ["cannot be captured in a CUDA graph: RuntimeError: operation not permitted", [12 / RUNS] * ROUNDS]


@pytest.fixture
def synchronised(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """What waiting for the GPU raises, one after the other."""
    errors: list[BaseException] = []

    def synchronize(_: Any) -> None:
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return errors


def test_candidates_run_against_the_reference_once_their_inputs_are_made(synchronised, monkeypatch):
    made: list[Any] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        made.append((options, torch.backends.cuda.matmul.allow_tf32))
        return prepare(*arguments, **options)

    monkeypatch.setattr(tuning_gpu, "prepare", noted)
    settings: Any = torch.backends.cuda.matmul
    before, settings.allow_tf32 = settings.allow_tf32, True
    bench = gpu_bench(CPU)
    for choice in (DEFAULT, FAST, tiles.TORCH):
        assert bench.compile(PROBLEM, choice) == ""
        assert bench.verify(PROBLEM, choice)["y"]["row"] > 0
    assert made == [({"judged_on": CPU}, False)], "whatever the process computes in, the reference is exact"
    assert settings.allow_tf32 is True
    settings.allow_tf32 = before
    bench.verify(norm_problem(10), DEFAULT)
    assert len(made) == 2


def test_a_failure_is_the_candidates_and_a_lasting_one_the_gpus(synchronised):
    bench, fault = gpu_bench(CPU), RuntimeError("CUDA error: an illegal memory access\nand more")
    synchronised[:] = [fault]
    with pytest.raises(RuntimeError, match="illegal") as failure:
        bench.verify(PROBLEM, FAST)
    assert not isinstance(failure.value, GpuLostError)
    synchronised[:] = [fault, fault]
    with pytest.raises(GpuLostError) as lost:
        bench.verify(PROBLEM, FAST)
    message, candidate, why = lost.value.args
    assert candidate in message and candidate == "2x32 w2" and why.endswith("illegal memory access")


def test_what_the_gpus_memory_does_not_hold_is_compared_on_the_cpu(synchronised, monkeypatch):
    places: list[Any] = []

    def counting(*arguments: Any, judged_on: Any) -> Any:
        places.append(judged_on)
        if len(places) == 1:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return prepare(*arguments, judged_on=judged_on)

    monkeypatch.setattr(tuning_gpu, "prepare", counting)
    gpu = torch.device("cpu", 0)
    bench = gpu_bench(gpu)
    assert bench.verify(PROBLEM, FAST) and places == [gpu, CPU]
    bench.verify(PROBLEM, DEFAULT)
    assert len(places) == 2, "and the candidates after it, too"


def test_timing_forces_the_candidate_and_the_table_is_put_to_use(synchronised, monkeypatch):
    chosen: list[Any] = []

    def run_once(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[list[float]]:
        return [[1.0, 2.0] for run in runs if isinstance(run(), torch.Tensor)]

    monkeypatch.setattr(tuning_gpu, "cold_times", run_once)
    monkeypatch.setattr("vit_kernels.norm.launch", lambda *a, **k: chosen.append((k["BLOCK_M"], k["num_warps"])))
    bench = gpu_bench(CPU)
    assert bench.time(PROBLEM, [FAST, DEFAULT]) == [[1.0, 2.0]] * 2
    assert chosen == [(2, 2), (DEFAULT.block_m, DEFAULT.num_warps)]
    try:
        bench.use(EMPTY)
        assert device_of(torch.zeros(1)).tuned is EMPTY and HERE.capability == 80
    finally:
        forget_tuned()
