"""``vit-engine profile``: what it asks for, prints and writes; the figures themselves are tested in tests/bench."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.bench import child
from tests.bench.test_profiling_model import figures
from tests.rung import RUNG
from vit_bench import results
from vit_bench.modelled import how_far_off
from vit_bench.profiling import attention, attention_gpu, model, model_gpu, runs
from vit_bench.profiling.model import Step
from vit_bench.results import OURS, Row, Spread
from vit_bench.timed.contenders import Contender
from vit_engine.cli.app import app
from vit_kernels.device import A100


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of sources take a second."""
    monkeypatch.setattr(runs, "environment", lambda label: {"device": label})


pytestmark = pytest.mark.skipif(RUNG == "sanitized", reason="profile compiles or measures, it interprets nothing")


def invoke(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["profile", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process where Triton compiles, so that no child takes over."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def compiled(points: Any, device: Any, run: int, name: str, progress: Any) -> Any:
    for point in points:
        progress(point)
        yield Row(
            run, "attention", str(point), "attention", OURS, device.name, point.dtype, "compiled",
            model=name, shape=point.shape, flops=10**9, modelled_s=2e-6, bound_s=1e-6,
            code={"kernels": [{"tile": {"m": 64, "n": 32}, "programs": 12, "waves": 0.5, "tile_waste": 1.25}]},
        )  # fmt: skip


@pytest.mark.compiled
@pytest.mark.interpreted_only
def test_on_a_machine_without_a_gpu(tmp_path):
    """The whole of it, from the command line of a process whose Triton compiles."""
    words = ["attention", "--model", "vit_tiny_patch16_224", "--tokens", "50:64", "--heads", "3", "--gpu", "a100"]
    files = [f"--{name}={tmp_path / name}" for name in ("out", "csv", "trace")]
    printed = child.run(
        f"""
        import json, subprocess, sys
        command = [sys.executable, "-m", "vit_engine.cli", "profile", *{words + files!r}]
        print(json.dumps(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        """
    )
    assert "modelled, not measured: A100" in printed and "Not run: PyTorch SDPA" in printed
    found = results.load(tmp_path / "out")
    ours = [row for row in found.rows if row.contender == OURS]
    assert [row.shape["tokens"] for row in ours] == [50, 64, 197] and {row.source for row in ours} == {"compiled"}
    assert found.runs[0].datasheet == {"half": 312e12, "single": 19.5e12, "bandwidth": 2.039e12}
    assert found.runs[0].environment["device"] == "A100" and found.runs[0].command.startswith(
        "vit-engine profile attention"
    )
    assert len((tmp_path / "csv").read_text().splitlines()) == 1 + len(found.rows)
    assert json.loads((tmp_path / "trace").read_text())["otherData"]["times"] == "modelled, not measured: A100"


def test_the_table_says_modelled_and_has_the_figures(compiling, monkeypatch):
    monkeypatch.setattr(attention, "compiled_rows", compiled)
    printed = invoke("attention", "--tokens", "64:96", "--heads", "6:8", "--batch", "3", "--gpu", "a100")
    assert "Self-attention, head width 64, bf16; modelled, not measured: A100" in printed
    assert "Throughput with 12 heads" in printed and "3 64 12 2.0 1.0 500.0 160% 64x32 12 0.50 1.25" in printed
    second = printed[printed.index("Throughput with 197 tokens") :]
    at = [second.index(f"3 197 {heads} 2.0") for heads in (6, 8, 12)]
    assert at == sorted(at)
    assert "Not run: PyTorch SDPA; PyTorch SDPA, flash; " in printed and "times are measured on a GPU only" in printed
    assert how_far_off(A100) in printed


def test_runs_are_added_to_a_file(compiling, monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "compiled_rows", compiled)
    out = tmp_path / "out.json"
    for gpu in ("h100", "a100"):
        invoke("attention", "--tokens", "64", "--heads", "12", "--gpu", gpu, "--out", str(out))
    found = results.load(out)
    assert [(row.run, row.device) for row in found.rows if row.contender == OURS] == [
        (0, "H100 SXM"), (0, "H100 SXM"), (1, "A100"), (1, "A100"),
    ]  # fmt: skip


@pytest.mark.parametrize(("gpu", "name"), [("b200", "B200"), ("h100", "H100 SXM")])
def test_where_there_is_no_model_nothing_is_called_modelled(gpu, name, compiling, monkeypatch):
    def bound(*arguments: Any) -> Any:
        return (replace(row, modelled_s=None) for row in compiled(*arguments))

    monkeypatch.setattr(attention, "compiled_rows", bound)
    printed = invoke("attention", "--tokens", "64", "--heads", "12", "--gpu", gpu)
    assert f"bound by datasheet, neither modelled nor measured: {name}" in printed
    assert all(words not in printed for words in ("modelled at", "us, modelled", "TFLOP/s of peak"))
    assert "256 64 12 1.0 64x32 12" in printed


def step(label: str, block: int | None, start: float, seconds: float) -> Step:
    return Step(label, f"{label}_kernel", block, start, seconds)


QKV = replace(step("qkv", 0, 1e-6, 3e-6), figures=figures())
STEPS = [step("stem", None, 0.0, 1e-6), QKV, step("head", None, 4e-6, 1e-6)]


def test_a_forward_pass_without_a_gpu(compiling, monkeypatch, tmp_path):
    asked: list[Any] = []

    def planned(*arguments: Any) -> list[Step]:
        asked.append(arguments)
        return STEPS

    monkeypatch.setattr(model, "planned", planned)
    path = tmp_path / "trace.json"
    printed = invoke("model", "--batch", "8", "--dtype", "fp16", "--trace", str(path))
    assert [(name, device.name, *more) for name, device, *more in asked] == [
        ("vit_base_patch16_224", "H100 SXM", 8, "fp16")
    ]
    assert "vit_base_patch16_224, batch 8, fp16; modelled, not measured: H100 SXM" in printed
    assert "qkv qkv x1 3.0 60.0%" in printed and "forward x3 5.0 100%" in printed
    assert "A pass without the profiler" not in printed
    assert "The time of a product holds what its launch costs, as seen on an H100; the others leave it out." in printed
    assert {e["name"] for e in json.loads(path.read_text())["traceEvents"]} >= {"block 0", "qkv", "head"}


# --- with a GPU, stood in for -----------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA X1")


SDPA = "PyTorch SDPA, flash"


class Clock:
    """Measures 5 us for everything and is interrupted at the point of that number."""

    def __init__(self, interrupted_at: int = 10**6) -> None:
        self.points: list[Any] = []
        self._end = interrupted_at

    def __call__(
        self, points: Any, gpu: Any, name: str, contenders: list[Contender], run: int, model: str, progress: Any
    ) -> Any:
        names = [one.name for one in contenders]
        assert names[0] == OURS and SDPA in names and "flash-attn" not in names and gpu == torch.device("cuda", 0)
        for point in points:
            if len(self.points) == self._end:
                raise KeyboardInterrupt
            progress(point)
            self.points.append(point)
            for contender in (OURS, SDPA):
                yield Row(
                    run, "attention", str(point), "attention", contender, name, point.dtype, "gpu", model=model,
                    shape=point.shape, seconds=Spread(5e-6, 4e-6, 6e-6, 25), flops=10**9,
                )  # fmt: skip


def test_measured_beside_the_baselines(gpu, monkeypatch):
    monkeypatch.setattr(attention_gpu, "measured_rows", Clock())
    printed = invoke("attention", "--tokens", "64", "--heads", "12")
    assert "measured: NVIDIA X1" in printed and "not measured" not in printed
    assert f"{SDPA} 256 64 12 5.0 4.0-6.0 200.0" in printed
    assert "Not run: flash-attn: not installed: pip install flash-attn" in printed


def test_what_was_measured_is_kept_and_gone_on_with(gpu, monkeypatch, tmp_path):
    out = str(tmp_path / "out.json")
    words = ("attention", "--tokens", "64:128", "--heads", "12", "--out", out)
    monkeypatch.setattr(attention_gpu, "measured_rows", Clock(interrupted_at=2))
    assert "Interrupted" in invoke(*words, code=130)
    kept = results.load(Path(out))
    assert [row.shape["tokens"] for row in kept.rows if row.contender == OURS and row.seconds] == [64, 96]
    rest = Clock()
    monkeypatch.setattr(attention_gpu, "measured_rows", rest)
    invoke(*words, "--resume")
    assert [point.tokens for point in rest.points] == [128, 197]
    again = Clock()
    monkeypatch.setattr(attention_gpu, "measured_rows", again)
    invoke(*words, "--resume")
    assert again.points == []


def test_what_ends_a_profile_leaves_the_points_before_it_in_the_file(gpu, monkeypatch, tmp_path):
    """An error of the GPU is no Ctrl-C: nothing is printed but the error."""

    def broken(points: Any, *rest: Any) -> Any:
        yield from Clock()(points[:2], *rest)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    out = tmp_path / "out.json"
    monkeypatch.setattr(attention_gpu, "measured_rows", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        invoke("attention", "--tokens", "64:128", "--heads", "12", "--out", str(out))
    assert [row.shape["tokens"] for row in results.load(out).rows if row.contender == OURS] == [64]


def test_a_terminated_profile_keeps_what_was_measured(gpu, monkeypatch, tmp_path):
    def terminated(points: Any, *rest: Any) -> Any:
        yield from Clock()(points[:2], *rest)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal came late")

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        out = tmp_path / "out.json"
        monkeypatch.setattr(attention_gpu, "measured_rows", terminated)
        printed = invoke("attention", "--tokens", "64:128", "--heads", "12", "--out", str(out), code=130)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "Interrupted" in printed and f"{SDPA} 128 96 12 5.0" in printed
    assert [row.shape["tokens"] for row in results.load(out).rows if row.contender == OURS] == [64, 96]


def test_another_dtype_is_not_done(gpu, monkeypatch, tmp_path):
    words = ("attention", "--tokens", "64", "--heads", "12", "--out", str(tmp_path / "out.json"), "--resume")
    for dtype, count in (("bf16", 2), ("fp16", 2), ("bf16", 0), ("fp16", 0)):
        clock = Clock()
        monkeypatch.setattr(attention_gpu, "measured_rows", clock)
        invoke(*words, "--dtype", dtype)
        assert len(clock.points) == count


def test_a_profile_without_a_gpu_goes_on(compiling, monkeypatch, tmp_path):
    out, asked = tmp_path / "out.json", []

    def some(points: Any, *rest: Any) -> Any:
        asked.append([point.tokens for point in points])
        return compiled(points, *rest)

    monkeypatch.setattr(attention, "compiled_rows", some)
    for tokens in ("64", "64:96"):
        invoke("attention", "--tokens", tokens, "--heads", "12", "--out", str(out), "--resume")
    assert asked == [[64, 197], [96]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    clock = Clock()
    monkeypatch.setattr(attention_gpu, "measured_rows", clock)
    invoke("attention", "--tokens", "64", "--heads", "12", "--out", str(out), "--resume")
    assert len(clock.points) == 2, "on the GPU itself nothing was measured yet"


def test_a_gpu_is_not_touched_where_another_is_modelled(gpu, monkeypatch):
    monkeypatch.setattr(attention, "compiled_rows", compiled)
    assert "modelled, not measured: A100" in invoke("attention", "--tokens", "64", "--heads", "12", "--gpu", "a100")


def test_a_forward_pass_on_a_gpu(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(model_gpu, "measured", lambda *_: (STEPS, 6e-6))
    out = tmp_path / "out.json"
    printed = invoke("model", "--model", "vit_tiny_patch16_224", "--out", str(out))
    assert "batch 64, bf16; measured: NVIDIA X1" in printed
    assert "A pass without the profiler: 6.0 us, median." in printed and "without a model" not in printed
    assert "out.json: 1 row added. " in printed
    forward = results.load(out).rows[0]
    assert (forward.source, forward.launches) == ("gpu", 3)


# --- what is refused, and the child -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("attention", "--tokens", "0:5"), ("--tokens must be", "'0:5'")),
        (("attention", "--heads", "x"), ("--heads must be", "'x'")),
        (
            ("attention", "--tokens", "64:99999999999"),
            ("--tokens must be at most 2147483647", "got 1 x 12 x 201326592"),
        ),
        (
            ("attention", "--heads", "1:99999999"),
            ("--heads x --tokens must be at most 2147483647", "64 x 99999999 x 197"),
        ),
        (("attention", "--batch", "99999999"), ("--batch x --heads", "99999999 x 12 x 50")),
        (("attention", "--dtype", "fp8"), ("--dtype", "fp32, fp16, bf16")),
        (("attention", "--resume"), ("--resume", "--out")),
        (("model", "--model", "vit_bas"), ("--model", "vit_base_patch32_224")),
        (("model", "--batch", "99999999"), ("--batch", "at most 10900932", "99999999")),
        (("model", "--gpu", "voodoo"), ("--gpu", "'voodoo'", "H100 SXM")),
        (("model", "--out", "/no/such/a.json"), ("--out", "/no/such/a.json: its folder does not exist")),
        (("model", "--trace", "/no/such/a.json"), ("--trace", "its folder does not exist")),
        (("attention", "--csv", "/no/such/a.csv"), ("--csv", "its folder does not exist")),
        (("model", "--out", "/"), ("--out", "/: is a folder, and a file is to be written")),
        (("model", "--trace", "/"), ("--trace", "/: is a folder, and a file is to be written")),
        (("attention", "--csv", "/"), ("--csv", "/: is a folder, and a file is to be written")),
        (("model", "--out", __file__), ("--out", "cannot be read as benchmark results")),
        (("model", "--out", "a.json", "--trace", "a.json"), ("--trace", "a.json: is the file of --out, too")),
        (("attention", "--csv", "a", "--trace", "a"), ("--trace", "a: is the file of --csv, too")),
    ],
)
def test_wrong_options_are_refused(compiling, words, said):
    printed = invoke(*words, code=2)
    assert all(word in printed for word in said), printed


def test_a_child_takes_over_where_triton_interprets(monkeypatch):
    seen: list[Any] = []

    def run(arguments: list[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append((arguments[3:], env.get("TRITON_INTERPRET")))
        return subprocess.CompletedProcess(arguments, 3, stdout="the answer\n", stderr="")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(subprocess, "run", run)
    words = ["--model", "m", "--tokens", "50:60", "--heads", "2", "--batch", "4", "--dtype", "fp16", "--gpu", "a100"]
    words += ["--out", "o.json", "--resume", "--csv", "c.csv", "--trace", "t.json"]
    assert invoke("attention", *words, code=3) == "the answer"
    assert seen == [(["profile", "attention", *words], None)]
    invoke("model", code=3)
    assert seen[1][0][:2] == ["profile", "model"] and "--gpu" not in seen[1][0]
