"""Rows of a case: judged first, then timed in turn; what cannot run is a row with the reason. GPUs are stood in for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType  # type: ignore[reportPrivateImportUsage]

from vit_bench.results import OURS, Row, Spread, Sustained
from vit_bench.timed import attentions, ceilings, measured, problems, timing
from vit_bench.timed.contenders import CannotRunError, Contender
from vit_bench.timed.machine import cpu_label
from vit_bench.timed.measured import Measuring, launches_of, operators_of
from vit_bench.timed.shapes import Case, attention_call
from vit_bench.tuning import GpuLostError
from vit_engine import ViTConfig

CPU = torch.device("cpu")
CONFIG = ViTConfig(image_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=1, num_classes=100)
SHAPE = {"batch": 3, "tokens": 5, "heads": 1, "head_dim": 64}
FORWARD = Case("model/small/b3", "model", "forward", 3, SHAPE, "small", CONFIG)
MLP = Case("kernels/small/b3/mlp", "kernels", "mlp", 3, {"batch": 3}, "small", replace(CONFIG, embed_dim=80, depth=2))
ATTENTION = Case("attention/small", "attention", "attention", 3, SHAPE)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every timing takes a fixed time; who was timed side by side."""
    timed: list[list[str]] = []

    def in_turn(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, Any]:
        timed.append(list(runs))
        return {name: Spread(0.5 + 0.1 * number, 0.5, 0.6, 9) for number, name in enumerate(runs)}

    monkeypatch.setattr(problems, "whole_passes", in_turn)
    monkeypatch.setattr(problems, "single_kernels", in_turn)
    return timed


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.contender: row for row in rows}


def test_a_model_on_the_cpu(quick):
    rows = by_name(Measuring(CPU).rows(FORWARD, "fp32", 4))
    assert quick == [[OURS, "timm", "torchvision", "transformers, sdpa", "transformers, eager"]]
    ours = rows[OURS]
    assert (ours.source, ours.run, ours.device, ours.dtype) == ("cpu", 4, cpu_label(), "fp32")
    assert ours.seconds == Spread(0.5, 0.5, 0.6, 9) and ours.images == 3 and ours.launches is None
    # Its one block is the last: query, projection and MLP of the class token alone count, and keys and values of all.
    assert ours.flops == 3 * 2 * (4 * 768 * 64 + 5 * 64 * 64 * 3 + 64 * 64 * 9 + 2 * 5 * 64 + 64 * 100)
    assert 0 < ours.errors["row"] <= ours.errors["row_allowed"]
    operators = {name: row.code.get("operators", 0) for name, row in rows.items()}
    assert 15 < operators[OURS] == operators["timm"] < operators["transformers, eager"]
    assert ours.peak_bytes is not None and 3 * 5 * 64 * 4 * 4 < ours.peak_bytes < 10**6
    assert ours.settings["backend"] == "torch" and ours.settings["torch"] and rows["timm"].settings["timm"]
    missing = rows["ONNX Runtime"]
    assert missing.source == "not run" and missing.reason.startswith("not installed: pip install onnx")


@pytest.mark.parametrize("case", [MLP, ATTENTION], ids=str)
def test_in_place_of_a_kernel_the_cpu_times_operators(quick, case):
    (row,) = Measuring(CPU).rows(case, "fp32", 0)
    assert row.contender in ("PyTorch eager", "PyTorch SDPA") and row.source == "cpu" and row.images == 0
    assert quick == [[row.contender]] and row.nbytes and row.errors


def _contenders(*made: Contender) -> Any:
    return lambda contenders, device: list(made)


def test_a_wrong_result_is_never_timed(quick, monkeypatch):
    right = next(one for one in attentions.ATTENTIONS if one.name == "PyTorch SDPA")

    def wrong(problem: Any) -> Any:
        q, k, v = problem
        return lambda: right.make((q, k, v.roll(1, dims=1)))()

    def broken(problem: Any) -> Any:
        raise ValueError("no such layout\nand more")

    def unable(problem: Any) -> Any:
        raise CannotRunError("heads of 64 are too many")

    absent = Contender("absent", right.make, ("no-such-package",))
    made = [right, Contender("wrong", wrong), Contender("broken", broken), Contender("unable", unable), absent]
    monkeypatch.setattr(problems, "taking_part", _contenders(*made))
    rows = by_name(Measuring(CPU).rows(ATTENTION, "fp32", 0))
    assert quick == [["PyTorch SDPA"]]
    assert rows["PyTorch SDPA"].source == "cpu"
    assert {row.source for name, row in rows.items() if name != "PyTorch SDPA"} == {"not run"}
    assert rows["wrong"].reason.startswith("wrong result, not timed: attention: wrong, attention/small, y")
    assert rows["broken"].reason == "ValueError: no such layout"
    assert rows["unable"].reason == "heads of 64 are too many"
    assert rows["absent"].reason == "not installed: pip install no-such-package"


def test_a_model_of_other_weights_is_wrong(quick, monkeypatch):
    right = next(one for one in problems.MODELS if one.name == "timm")

    def other(problem: Any) -> Any:
        state = problem.state | {"head.bias": problem.state["head.bias"] + 0.01}
        return right.make(replace(problem, state=state))

    monkeypatch.setattr(problems, "taking_part", _contenders(replace(right, name="other", make=other)))
    (row,) = Measuring(CPU).rows(FORWARD, "fp32", 0)
    assert row.source == "not run" and row.reason.startswith("wrong result, not timed: other, model/small/b3")
    assert quick == [], "nobody is left to be timed"


def test_what_cannot_be_timed_says_why(monkeypatch):
    monkeypatch.setattr(problems, "single_kernels", lambda runs, _: dict.fromkeys(runs, "cannot be captured"))
    (row,) = Measuring(CPU).rows(ATTENTION, "fp32", 0)
    assert (row.source, row.reason, row.seconds) == ("not run", "cannot be captured", None)


def test_models_of_several_batches_share_their_reference(monkeypatch):
    made = []
    truth = problems._truth
    monkeypatch.setattr(problems, "_truth", lambda *arguments: made.append(arguments) or truth(*arguments))
    found = problems.Problems(CPU)
    for batch in (1, 3):
        problem = found.of(replace(FORWARD, batch=batch), torch.float32)
        images = problem.given.images
        assert images.shape[0] == batch and torch.equal(images[0], images[batch - 1]), "image 0, 1, 0"
        assert batch == 1 or not torch.equal(images[0], images[1])
    found.of(FORWARD, torch.bfloat16)
    assert len(made) == 2


# --- with a GPU that is none -----------------------------------------------------------------------------------------


class Gpu:
    """What PyTorch's CUDA interface answers. lost: whether synchronising raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lost = False
        self.held = [100, 700]  # before a call, and at its peak
        fakes = {
            "synchronize": self.synchronize,
            "get_device_name": lambda _: "NVIDIA H100 80GB HBM3",
            "memory_allocated": lambda _: self.held[0],
            "max_memory_allocated": lambda _: self.held[1],
            "reset_peak_memory_stats": lambda _: None,
            "empty_cache": lambda: None,
            "get_device_properties": lambda _: SimpleNamespace(uuid="12-34"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(measured, "launches_of", lambda run: 7)
        monkeypatch.setattr(measured, "sustained", lambda run, device: Sustained(1e-4, 1.4e9))
        monkeypatch.setattr(measured, "state_under_load", lambda run, uuid: {"clocks.sm": "1755", "asked": uuid})

    def synchronize(self, _: Any = None) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access")


class OnGpu(Measuring):
    """Believes that it measures a GPU; its problems are on the CPU."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", 0))
        self._problems = problems.Problems(CPU)


def sdpa(name: str, run: Callable[[Any], Any] | None = None) -> Contender:
    right = next(one for one in attentions.ATTENTIONS if one.name == "PyTorch SDPA")
    return Contender(name, run or right.make)


def test_rows_of_a_gpu(monkeypatch):
    Gpu(monkeypatch)
    made = (sdpa(OURS), sdpa("PyTorch SDPA"))
    monkeypatch.setattr(problems, "taking_part", _contenders(*made))
    forgotten: list[None] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: forgotten.append(None))
    rows = by_name(OnGpu().rows(ATTENTION, "bf16", 0))
    assert len(forgotten) == 1, "once a case, before anyone compiles"
    ours, other = rows[OURS], rows["PyTorch SDPA"]
    assert (ours.device, ours.source, ours.launches, ours.peak_bytes) == ("H100 SXM", "gpu", 7, 600)
    assert ours.state == {"clocks.sm": "1755", "asked": "12-34"} and other.state == {}
    assert ours.sustained == other.sustained == Sustained(1e-4, 1.4e9)


def test_memory_of_other_runtimes_is_not_known(monkeypatch):
    Gpu(monkeypatch)
    monkeypatch.setattr(problems, "taking_part", _contenders(replace(sdpa("ONNX Runtime"), by_torch=False)))
    (row,) = OnGpu().rows(ATTENTION, "bf16", 0)
    assert row.source == "gpu" and (row.peak_bytes, row.launches) == (None, 7)
    (row,) = Measuring(CPU).rows(ATTENTION, "fp32", 0)
    assert row.source == "cpu" and (row.peak_bytes, row.launches, row.code) == (None, None, {})


def test_a_lost_gpu_ends_the_run(monkeypatch):
    gpu = Gpu(monkeypatch)

    def fatal(problem: Any) -> Any:
        gpu.lost = True
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(problems, "taking_part", _contenders(sdpa("fatal", fatal), sdpa("innocent")))
    with pytest.raises(GpuLostError, match="fatal left the GPU unusable: RuntimeError: CUDA error") as failure:
        OnGpu().rows(ATTENTION, "fp32", 0)
    assert failure.value.args[1] == "fatal"


def test_what_the_memory_does_not_hold_is_a_row(monkeypatch):
    Gpu(monkeypatch)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 200 GiB\nand more")

    measuring = OnGpu()
    monkeypatch.setattr(measuring._problems, "of", full)
    (row,) = measuring.rows(ATTENTION, "bf16", 0)
    assert row.contender == OURS and row.source == "not run"
    assert row.reason == "too large for this GPU's memory: OutOfMemoryError: tried to allocate 200 GiB"


def test_attention_baselines_name_their_backends():
    names = [one.name for one in attentions.ATTENTIONS]
    assert names[0] == OURS and {"flash-attn", "xFormers"} <= set(names)
    for backend in ("flash", "cuDNN", "memory-efficient", "math"):
        assert f"PyTorch SDPA, {backend}" in names


def test_the_backend_asked_for_is_the_one_that_runs(monkeypatch):
    asked: list[Any] = []

    @contextlib.contextmanager
    def only(backend: Any) -> Iterator[None]:
        asked.append(backend)
        yield

    monkeypatch.setattr(attentions, "sdpa_kernel", only)
    call = attention_call(SHAPE, torch.float32, "cpu")
    one = next(one for one in attentions.ATTENTIONS if one.name.endswith("cuDNN"))
    result = one.make(call.run.args)()  # type: ignore[attr-defined]
    assert asked == [attentions.SDPBackend.CUDNN_ATTENTION] and result.shape == (3, 5, 1, 64)


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [("flash-attn", "flash_attn", "flash_attn_func"), ("xFormers", "xformers.ops", "memory_efficient_attention")],
)
def test_other_libraries_get_the_views(monkeypatch, name, module, function):
    fake: Any = ModuleType(module)
    setattr(fake, function, lambda q, k, v: (q, k, v))
    for part in (module.split(".")[0], module):
        monkeypatch.setitem(sys.modules, part, fake)
    one = next(one for one in attentions.ATTENTIONS if one.name == name)
    problem = (object(), object(), object())
    assert one.make(problem)() == problem


# --- what is counted and timed --------------------------------------------------------------------------------------


def test_launches_are_the_kernels_that_a_profiler_saw(monkeypatch):
    events = [
        SimpleNamespace(name=name, device_type=kind)
        for name, kind in (
            ("linear_kernel", DeviceType.CUDA),
            ("Memcpy DtoD", DeviceType.CUDA),
            ("Memset", DeviceType.CUDA),
            ("aten::mm", DeviceType.CPU),
            ("attention_kernel", DeviceType.CUDA),
        )
    ]
    profile = contextlib.nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ran = []
    assert launches_of(lambda: ran.append(1)) == 2 and ran == [1]
    events.clear()
    assert launches_of(lambda: None) is None, "a profiler that saw nothing is no proof of no launches"


def test_operators_that_compute_are_counted():
    x = torch.ones(2, 3, 4, 8)
    assert operators_of(lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x).transpose(1, 2) + 1) == 2


def test_spread_and_who_is_faster():
    found = timing.spread([float(value) for value in range(1, 12)])
    assert found == Spread(6.0, 3.0, 9.0, 11)
    assert timing.verdict(Spread(1, 0.9, 1.1, 9), Spread(2, 1.2, 2.5, 9)) == "faster"
    assert timing.verdict(Spread(2, 1.2, 2.5, 9), Spread(1, 0.9, 1.1, 9)) == "slower"
    assert timing.verdict(Spread(1, 0.9, 1.3, 9), Spread(2, 1.2, 2.5, 9)) == "within the noise"
    assert timing.verdict(Spread(1, 0.9, 1.2, 9), Spread(2, 1.2, 2.5, 9)) == "within the noise"
    assert timing.verdict(Spread(2, 1.1, 2.5, 9), Spread(1, 0.9, 1.2, 9)) == "within the noise"


def test_a_gpu_is_idle_before_and_after_what_is_timed(monkeypatch):
    happened: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    monkeypatch.setattr(timing.time, "perf_counter", iter([10.0, 16.0]).__next__)
    assert timing.synchronised(lambda: happened.append("run"), 3) == 2.0
    assert happened == ["wait", "run", "run", "run", "wait"]


def test_kernels_are_timed_in_graphs_and_models_by_the_wall_clock(monkeypatch):
    monkeypatch.setattr(timing, "cold_times", lambda runs, device: [[1.0, 2.0, 3.0], "cannot be captured"])
    found = timing.single_kernels({"a": lambda: None, "b": lambda: None}, torch.device("cuda"))
    assert found == {"a": Spread(2.0, 1.4, 2.6, 3), "b": "cannot be captured"}
    clocks: list[Any] = []

    def in_turns(runs: dict[str, Any], clock: Any, *longest: float) -> dict[str, Any]:
        clocks.append((clock, *longest))
        return {name: ([1.0, 1.0], 1) for name in runs}

    monkeypatch.setattr(timing, "taken_in_turns", in_turns)
    for device in ("cuda", "cpu"):
        timing.whole_passes({"a": lambda: None}, torch.device(device))
    timing.single_kernels({"a": lambda: None}, CPU)
    on_cpu = (timing.wall_clock, timing.LONGEST_ON_CPU)
    assert clocks == [(timing.synchronised,), on_cpu, on_cpu]


def test_ceilings_are_the_fastest_of_their_timings(monkeypatch):
    monkeypatch.setattr(ceilings, "COPIED", {"cpu": 4096})
    monkeypatch.setattr(ceilings, "SQUARE", {"cpu": 16})
    ran: list[int] = []

    def in_turns(runs: dict[str, Callable[[], Any]], clock: Any, longest: float) -> dict[str, Any]:
        (run,) = runs.values()
        ran.append(run().numel())
        return {"it": ([0.5, 0.25, 1.0], 1)}

    monkeypatch.setattr(ceilings, "taken_in_turns", in_turns)
    found = ceilings.measure(CPU, ["fp32", "bf16"])
    assert found.copy == 2 * 4096 / 0.25 and found.matmul == {"fp32": 2 * 16**3 / 0.25, "bf16": 2 * 16**3 / 0.25}
    assert ran == [4096, 256, 256]
