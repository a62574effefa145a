"""The work behind the names: models against timm, graph capture and times, with a GPU played by stand-ins."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.fake_cuda import FakeCuda, fake_cuda
from tests.engine.stand_in import repeated
from vit_bench.full import capture, models, parts, timing
from vit_bench.full.parts import CannotRunError, parts_of
from vit_engine import graphs
from vit_engine.graphs import GraphCache

__all__ = ["fake_cuda", "repeated"]

# --- models against timm ----------------------------------------------------------------------------------------------


@pytest.mark.interpreted_only
@pytest.mark.parametrize("name", ["small/timm/fp32", "small/vit/fp16"])
def test_small_models_pass(name: str) -> None:
    (part,) = parts_of(name)
    figures = part.run()
    assert 0 < figures["row"] <= figures["row_allowed"]


@pytest.mark.interpreted_only
@pytest.mark.parametrize(("dtype", "figure"), [("fp32", "relative_error"), ("fp16", "ours")])
def test_an_accelerated_model_passes(dtype: str, figure: str) -> None:
    (part,) = parts_of(f"dropin/torchvision/{dtype}")
    assert part.name == "ViT" and 0 < part.run()[figure] < 1e-3


@pytest.mark.interpreted_only
def test_an_accelerated_model_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_engine import encoder_block

    real: Any = encoder_block.ops.attention
    monkeypatch.setattr(encoder_block.ops, "attention", lambda q, k, v, **more: real(q, k, v, **more) * 1.01)
    for dtype in ("fp32", "fp16"):
        (part,) = parts_of(f"dropin/torchvision/{dtype}")
        with pytest.raises(AssertionError):
            part.run()


def test_a_library_that_is_not_installed_cannot_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CannotRunError, match="pip install torchvision"):
        parts_of("dropin/torchvision/fp32")[0].run()


def test_timm_in_half_precision_and_the_head_where_a_preset_has_none() -> None:
    figures = models.parity("shrunken", torch.bfloat16, "cpu", "torch")
    assert 0 < figures.row <= figures.row_allowed
    made = models.pair("shrunken", torch.float32)
    assert made.images(3).shape == (3, 3, 32, 32)
    with torch.inference_mode():
        assert made.ours(made.images(2)).shape == (2, 10)
    assert models.ViTConfig.preset("vit_huge_patch14_224").num_classes == 0 != models.CLASSES


@pytest.mark.parametrize("wrong", ["cls_token", "blocks.1.mlp.fc2.bias", "blocks.0.norm1.weight", "head.bias"])
def test_a_model_that_ignores_a_parameter_is_not_timms(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    real = models.pair

    def pair(name: str, dtype: torch.dtype, seed: int = 0) -> models.Pair:
        made = real(name, dtype, seed)
        with torch.no_grad():
            made.ours.get_parameter(wrong).zero_()
        return made

    monkeypatch.setattr(models, "pair", pair)
    with pytest.raises(AssertionError, match="is over the allowed"):
        models.parity("shrunken", torch.bfloat16, "cpu", "torch")


# --- graphs and times, with a GPU played by stand-ins -----------------------------------------------------------------


class Graphs:
    """torch.cuda's part in graph capture, played on the CPU: what a capture ran is run again by replay()."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.forward, self.calls, self.allocations = forward, [], 0
        self.capturing, self.held = False, (torch.empty(0), torch.empty(0))
        for name, stand_in in {
            "Stream": lambda: self,
            "current_stream": lambda: self,
            "stream": lambda stream: self,
            "CUDAGraph": lambda: self,
            "graph": lambda graph: self,
            "synchronize": lambda: None,
            "memory_stats": lambda: {"allocation.all.allocated": self.allocations},
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def wait_stream(self, other: object) -> None: ...

    def __enter__(self) -> None:
        self.capturing = True

    def __exit__(self, *error: object) -> None:
        self.capturing = False

    def run(self, images: torch.Tensor) -> torch.Tensor:
        self.allocations += 1
        result = self.forward(images)
        if self.capturing:
            self.held = images, result
        return result

    def replay(self) -> None:
        static, result = self.held
        result.copy_(self.forward(static))


FIRST, SECOND = torch.arange(4.0), torch.arange(4.0) + 1


def test_a_replay_that_equals_the_uncaptured_run(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch, lambda x: 2 * x)
    assert capture.check_replay(graphs.run, FIRST, SECOND) == {
        "replays": 3,
        "values_compared": 12,
        "allocations_in_replay": 0,
    }
    assert not torch.equal(graphs.held[0], FIRST) and torch.equal(FIRST, torch.arange(4.0))  # the input is a copy


def test_a_replay_that_is_wrong_in_one_bit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch, lambda x: 2 * x)

    def replay() -> None:
        static, result = graphs.held
        result.copy_(torch.nextafter(2 * static, torch.tensor(99.0)))

    graphs.replay = replay  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="replay with the second input: 4 of 4 values differ"):
        capture.check_replay(graphs.run, FIRST, SECOND)


def test_a_replay_that_ignores_its_input_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch, lambda x: 2 * x)
    graphs.replay = lambda: None  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="second input"):
        capture.check_replay(graphs.run, FIRST, SECOND)
    graphs = Graphs(monkeypatch, lambda x: 0 * x)
    with pytest.raises(AssertionError, match="both inputs give the same result"):
        capture.check_replay(graphs.run, FIRST, SECOND)


def test_a_replay_that_allocates_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch, lambda x: 2 * x)
    real = graphs.replay

    def replay() -> None:
        graphs.allocations += 2
        real()

    graphs.replay = replay  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="allocated memory 6 times"):
        capture.check_replay(graphs.run, FIRST, SECOND)


class Engine(torch.nn.Module):
    """2 x + 1 through the engine's own graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.eval().set_graphs(False)

    def set_graphs(self, graphs: bool | int) -> None:
        self.graphs = GraphCache(int(graphs)) if graphs else None

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(x) if self.graphs is None else self.graphs.run(self, self.plain, (x,), {})


@pytest.fixture
def engine_graphs(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    for name in ("Stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake_cuda, name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return fake_cuda


def test_the_engines_graphs_equal_the_uncaptured_run(engine_graphs: FakeCuda) -> None:
    figures = capture.check_engine_graphs(Engine(), FIRST, SECOND)
    assert figures == {"replays": 20, "values_compared": 80}
    assert (engine_graphs.captures, engine_graphs.replays) == (1, 20)


def test_graphs_of_the_engine_that_are_wrong_or_missing_fail(
    engine_graphs: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="in turn: not replayed: training mode"):
        capture.check_engine_graphs(Engine().train(), FIRST, SECOND)
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "_copied", lambda results: results + torch.rand(()))
        with pytest.raises(AssertionError, match="thread 1: 4 values differ"):
            capture.check_engine_graphs(Engine(), FIRST, SECOND)
    with pytest.raises(AssertionError, match="both inputs give the same result"):
        capture.check_engine_graphs(Engine(), FIRST, FIRST)


def test_contenders_take_turns_and_are_timed_alike() -> None:
    order, seconds = [], {"ours": 0.004, "theirs": 0.05}

    def measure(run: Callable[[], Any], passes: int) -> float:
        name = run()
        order.append((name, passes))
        return seconds[name] * (1 + 0.01 * (len(order) % 3))

    found = timing.interleaved({"ours": lambda: "ours", "theirs": lambda: "theirs"}, measure)
    assert order[-4:] == [("ours", 5), ("theirs", 1), ("ours", 5), ("theirs", 1)]
    assert found["ours"]["timings"] == found["theirs"]["timings"] == timing.TIMINGS
    assert found["ours"]["passes_per_timing"] == 5
    assert 4.0 <= found["ours"]["fastest_ms"] <= found["ours"]["median_ms"] <= found["ours"]["slowest_ms"] <= 4.1
    slow = timing.interleaved({"slow": lambda: "theirs"}, lambda run, passes: 6.0)
    assert slow["slow"]["timings"] == 10 and slow["slow"]["median_ms"] == 6000.0


def test_seconds_per_pass_come_from_events_around_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 12.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("idle"))
    assert timing.timed(lambda: happened.append("pass"), 3) == pytest.approx(0.004)
    assert happened == ["idle", "record", "pass", "pass", "pass", "record", "wait"]


def test_clocks_and_power_are_read_while_the_gpu_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    monkeypatch.setattr(timing, "timed", lambda run, count: passes.append(count))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert timing.state_under_load(lambda: None, "1234") == {} and not passes
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "1980, 1980, 2619, 512.34, 700.00, 61"\n')
    program.chmod(0o755)
    state = timing.state_under_load(lambda: None, "1234")
    assert state["clocks.sm"] == "1980" and state["power.draw"] == "512.34" and state["temperature.gpu"] == "61"
    assert passes and "-i GPU-1234" in (tmp_path / "asked").read_text()
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert timing.state_under_load(lambda: None, "GPU-1234") == {}


def test_too_little_memory_is_not_a_failure_and_a_wrong_batch_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_on_gpu", raising_call(torch.cuda.OutOfMemoryError("tried to allocate 90 GiB")))
    (part,) = parts_of("throughput/vit_huge_patch14_224/b256")
    with pytest.raises(CannotRunError, match=r"batch 256 takes more memory .* 90 GiB"):
        part.run()


def raising_call(error: BaseException) -> Callable[..., Any]:
    def call(*arguments: object) -> Any:
        raise error

    return call


def test_a_throughput_check_judges_its_own_batch_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Driven on the CPU: a model whose last image is wrong only in this batch is never timed, a right one is."""
    made = models.pair("shrunken", torch.bfloat16)
    timed: list[str] = []

    def interleaved(contenders: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
        assert all(run().shape == (8, 10) for run in contenders.values())
        timed.extend(contenders)
        return {name: {"median_ms": 4.0} for name in contenders}

    def ours(images: torch.Tensor) -> torch.Tensor:
        logits = made.ours(images)
        if spoilt:
            logits[-1] += 1
        return logits

    monkeypatch.setattr(parts, "_on_gpu", lambda model, dtype: (made, ours))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="12"))
    monkeypatch.setattr(timing, "interleaved", interleaved)
    monkeypatch.setattr(timing, "state_under_load", lambda run, uuid: {"clocks.sm": "1980"})
    (part,) = parts_of("throughput/vit_tiny_patch16_224/b8")
    spoilt = True
    with pytest.raises(AssertionError, match="batch 8"):
        part.run()
    assert not timed
    spoilt = False
    figures = part.run()
    assert timed == ["vit-engine", "timm, eager"]
    assert figures["throughput"]["vit-engine"]["images_per_second"] == pytest.approx(2000)
    assert (figures["batch"], figures["nvidia_smi_under_load"]) == (8, {"clocks.sm": "1980"})
