"""``vit-engine bench``: what it runs where, what it keeps, what it prints, and how two runs compare."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.rung import child_environment
from vit_bench.modelled import how_far_off
from vit_bench.results import OURS, Ceilings, Results, Row, Run, Spread, Sustained, load, save
from vit_bench.timed import ceilings, compiled, machine, measured
from vit_bench.timed.shapes import Case
from vit_bench.tuning import GpuLostError
from vit_engine.cli import bench as command
from vit_engine.cli.app import app
from vit_kernels.device import H100, Device

TINY = "model/vit_tiny_patch16_224/b1"


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["bench", *words])


def printed(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


class Stub:
    """Gives a row of ours and one of timm, and one that was not run. fails: raised at the case of that name."""

    source = "cpu"
    fails: dict[str, BaseException] = {}  # noqa: RUF012 (set by tests)

    def __init__(self, label: str) -> None:
        self.label = label
        self.device = torch.device("cpu" if label.startswith("cpu") else "cuda")

    def rows(self, case: Case, dtype: str, run: int) -> list[Row]:
        if case.name in self.fails:
            raise self.fails[case.name]
        shared: dict[str, Any] = {
            "run": run, "suite": case.suite, "case": case.name, "label": case.label, "device": self.label,
            "dtype": dtype, "model": case.model, "shape": case.shape, "images": case.batch, "flops": 10**9,
        }  # fmt: skip
        if self.source == "compiled":
            kernel = {
                "launch": "qkv", "kernel": "linear_kernel", "times": 1, "tile": {"m": 128, "n": 64}, "warps": 4,
                "registers": 168, "spilled_bytes": 0, "shared": 65536, "shared_limit": 232448, "epilogue_slots": 7.25,
                "bound_s": 2e-6, "bound": "memory", "modelled_s": 3.5e-6,
            }  # fmt: skip
            moved = {"activations": 22.25, "weight_bytes": 14_200_000}
            quoted = {"torch.compile": {"launches": 8, "activations": 36.0, "quoted for": "some model"}}
            block = {"ours": moved | {"launches": 5}, "eager": moved | {"operators": 10}, "quoted": quoted}
            code = {"kernels": [kernel], "block": block}
            return [
                Row(**shared, contender=OURS, source="compiled", code=code, launches=63, bound_s=2e-3, modelled_s=3e-3)
            ]
        times = {OURS: Spread(0.02, 0.019, 0.021, 9), "timm": Spread(0.0205, 0.0195, 0.0215, 9)}
        rows = [
            Row(
                **shared,
                contender=name,
                source=self.source,
                seconds=spread,
                sustained=Sustained(0.025, 1.4e9) if self.source == "gpu" else None,
                peak_bytes=2_500_000,
            )
            for name, spread in times.items()
        ]
        return [*rows, Row(**shared, contender="xFormers", source="not run", reason="not installed: pip install it")]


class Compiled(Stub):
    source = "compiled"

    def __init__(self, gpu: Device) -> None:
        super().__init__(gpu.name)


class Measured(Stub):
    def __init__(self, device: torch.device) -> None:
        super().__init__("cpu (some, 1 thread)" if device.type == "cpu" else "H100 SXM")
        self.source = "cpu" if device.type == "cpu" else "gpu"


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(Stub, "fails", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compiled, "Compiling", Compiled)
    monkeypatch.setattr(measured, "Measuring", Measured)
    monkeypatch.setattr(machine, "environment", lambda label: {"device": label})
    monkeypatch.setattr(ceilings, "measure", lambda device, dtypes: Ceilings(2e10, dict.fromkeys(dtypes, 1e11)))


def test_names_of_cases_are_listed():
    result = invoke("model", "--model", "vit_tiny*224", "--batch", "1", "8", "--list")
    assert result.exit_code == 0 and result.output.split() == [TINY, TINY.replace("b1", "b8")]
    assert len(invoke("--list").output.split()) == 606


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed"], "Invalid value for SUITE: 'speed' is not one of kernels, model, attention"),
        (["--dtype", "fp8"], "Invalid value for --dtype: 'fp8' is not one of fp32, fp16, bf16"),
        (["--gpu", "h300"], "Invalid value for --gpu: gpu must be one of sm_80"),
        (["--model", "vit_giant"], "Invalid value for --model: 'vit_giant' matches nothing in the table of shapes"),
        (["--batch", "2"], "Invalid value for --batch: 2 matches nothing"),
        (["--batch", "0"], "Invalid value for --batch: 0 matches nothing"),
        (["--list", "--batch", "0"], "Invalid value for --batch: 0 matches nothing"),
        (["--list", "--only", ""], "Invalid value for --only: '' matches nothing"),
        (["--batch", "1", "2"], "Invalid value for --batch: 2 matches nothing"),
        (["model", "8"], "Invalid value for SUITE: 8: numbers of images belong behind --batch"),
        (["--only", "speed"], "Invalid value for --only: 'speed' matches nothing"),
        (["model", "--only", "kernels/*"], "Invalid value for --only: no case has all that was asked for"),
        (["--resume"], "Invalid value for --resume: there is nothing to go on with"),
        (["--out", "/no/such/folder/r.json"], "Invalid value for --out: /no/such/folder/r.json: its folder does not"),
        (["--csv", "/no/such/folder/r.csv"], "Invalid value for --csv: /no/such/folder/r.csv: its folder does not"),
        (["--out", "/"], "Invalid value for --out: /: is a folder, and a file is to be written"),
        (["--csv", "/"], "Invalid value for --csv: /: is a folder, and a file is to be written"),
        (["--out", "r.json", "--csv", "./r.json"], "Invalid value for --csv: r.json: is the file of --out, too"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_option(words: Sequence[str], message: str):
    result = invoke(*words)
    assert result.exit_code == 2 and message in printed(result)


def test_a_file_that_is_none_is_left_alone(tmp_path: Path):
    path = tmp_path / "notes.json"
    path.write_text("[]")
    result = invoke("model", "--out", str(path))
    assert result.exit_code == 2 and "Invalid value for --out" in printed(result) and path.read_text() == "[]"


def test_without_a_gpu_models_are_measured_and_the_rest_compiled(tmp_path: Path):
    out, table = tmp_path / "r.json", tmp_path / "r.csv"
    names = [TINY, "kernels/vit_tiny_patch16_224/b1/qkv"]
    words = [word for name in names for word in ("--only", name)]
    result = invoke(*words, "--out", str(out), "--csv", str(table))
    assert result.exit_code == 0, result.output
    text = printed(result)
    assert "1 case measured on cpu (some, 1 thread)" in text and "large matmul fp32 0.1 TFLOP/s" in text
    assert f"{TINY}, fp32, cpu (some, 1 thread): measured" in text
    assert "vit-engine 20.000 ms (19.000 ms to 21.000 ms), 50.0 images/s, 0.05 TFLOP/s, 50% of matmul, 2.5 MB" in text
    assert "ours takes 0.976 of its time: within the noise" in text
    assert "1 case compiled for H100 SXM. No GPU is used and nothing is timed" in text and how_far_off(H100) in text
    assert f"{names[1]}, bf16, H100 SXM: compiled only, modelled" in text
    assert "168 registers, 0 B spilled, 64 of 227 KiB shared, epilogue 7.2 slots/output; bound 2.00 us (memory)" in text
    assert "modelled 3.50 us" in text
    assert "not run: xFormers (model/vit_tiny_patch16_224/b1): not installed: pip install it" in text
    found = load(out)
    assert [run.environment["device"] for run in found.runs] == ["cpu (some, 1 thread)", "H100 SXM"]
    assert found.runs[0].ceilings and found.runs[1].ceilings is None and found.runs[0].datasheet is None
    assert [(row.run, row.source) for row in found.rows] == [(0, "cpu"), (0, "cpu"), (0, "not run"), (1, "compiled")]
    with table.open(newline="") as file:
        assert [line["case"] for line in csv.DictReader(file)] == [TINY] * 3 + names[1:]


def test_a_model_compiled_says_what_a_block_moves():
    text = printed(invoke("model", "--only", TINY, "--gpu", "h100"))
    assert "forward 63 launches; bound 2.000 ms, modelled 3.000 ms" in text
    assert "one block, ours 5 launches, 22.25 D elements of activations per token, 14.2 MB of weights (recorded" in text
    assert "one block, eager 10 operators, 22.25 D, 14.2 MB (counted on meta tensors" in text
    assert "one block, torch.compile 8 launches, 36 D (quoted for some model)" in text


def test_with_a_gpu_everything_is_measured_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = {"device": "H100 SXM", "gpu": {"name": "NVIDIA H100 80GB HBM3"}}
    monkeypatch.setattr(machine, "environment", lambda label: gpu)
    out = tmp_path / "r.json"
    result = invoke("--batch", "8", "--dtype", "fp16", "--dtype", "bf16", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert ", without a pause 25.000 ms at 1.40 GHz, 2.5 MB" in printed(result)
    found = load(out)
    assert len(found.runs) == 1 and found.runs[0].datasheet == machine.datasheet(H100)
    assert {row.model for row in found.rows} == {"vit_base_patch16_224", ""}, "unless others are asked for"
    assert {row.suite for row in found.rows} == {"kernels", "model", "attention"}
    assert {row.dtype for row in found.rows} == {"fp16", "bf16"} and {row.shape["batch"] for row in found.rows} == {8}
    heads = {(row.shape["heads"], row.shape["head_dim"]) for row in found.rows if row.suite == "attention"}
    assert heads == {(12, 64)}


def test_runs_are_added_and_a_broken_off_one_goes_on(tmp_path: Path):
    out = tmp_path / "r.json"
    words = ["model", "--model", "vit_tiny*224", "--batch", "1", "--batch", "8", "--out", str(out)]
    Stub.fails = {TINY.replace("b1", "b8"): KeyboardInterrupt()}
    result = invoke(*words)
    assert result.exit_code == 130 and f"Interrupted. {out} has what was done" in printed(result)
    assert [row.case for row in load(out).rows] == [TINY] * 3
    Stub.fails = {TINY: AssertionError("this one is done")}
    assert invoke(*words, "--resume").exit_code == 0
    found = load(out)
    assert len(found.runs) == 1 and len(found.rows) == 6
    Stub.fails = {}
    table = tmp_path / "r.csv"
    assert invoke(*words, "--csv", str(table)).exit_code == 0
    assert len(load(out).runs) == 2 and len(load(out).rows) == 12
    assert len(table.read_text().splitlines()) == 1 + 6, "the rows of this run"


def test_a_gpu_is_measured_although_it_was_compiled_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "r.json"
    words = ["model", "--only", TINY, "--dtype", "bf16", "--out", str(out), "--resume"]
    assert invoke(*words, "--gpu", "h100").exit_code == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(machine, "environment", lambda label: {"device": label, "gpu": {"name": "NVIDIA H100"}})
    assert invoke(*words).exit_code == 0 and invoke(*words).exit_code == 0
    assert invoke(*words, "--gpu", "h100").exit_code == 0
    assert [(row.run, row.source) for row in load(out).rows if row.contender == OURS] == [(0, "compiled"), (1, "gpu")]
    assert [run.environment["times"] for run in load(out).runs] == ["compiled", "measured"]


def test_a_lost_gpu_ends_the_run_with_what_was_measured(tmp_path: Path):
    out = tmp_path / "r.json"
    Stub.fails = {TINY.replace("b1", "b8"): GpuLostError("timm left the GPU unusable: why", "timm", "why")}
    result = invoke("model", "--model", "vit_tiny*224", "--out", str(out))
    assert result.exit_code == 1 and "timm left the GPU unusable: why. What was measured before is kept" in printed(
        result
    )
    assert len(load(out).rows) == 3


def test_what_compiles_leaves_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(command, "compile_in_child", lambda words: seen.append(words) or 7)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    words = ["kernels", "--model", "vit_tiny*", "--batch", "8", "--dtype", "fp16", "--only", "*/qkv", "--gpu", "a100"]
    words += ["--out", "r.json", "--csv", "r.csv", "--resume"]
    assert invoke(*words).exit_code == 7 and seen == [["bench", *words]]
    assert invoke("attention").exit_code == 7 and seen[1] == ["bench", "attention"], "compiled where no GPU is"
    assert invoke("model", "--only", TINY).exit_code == 0 and len(seen) == 2, "PyTorch's operators are not Triton's"


def test_a_terminated_command_keeps_what_was_measured(tmp_path: Path):
    out = tmp_path / "r.json"
    code = f"""
        import sys, time
        from tests.cli import test_bench as t
        from vit_bench.timed import ceilings, measured
        from vit_engine.cli.app import main

        class Slow(t.Measured):
            def rows(self, case, dtype, run):
                if case.batch > 1:
                    time.sleep(60)
                return super().rows(case, dtype, run)

        measured.Measuring = Slow
        ceilings.measure = lambda device, dtypes: t.Ceilings(1.0, {{}})
        sys.argv = ["vit-engine", "bench", "model", "--model", "vit_tiny*224", "--out", {str(out)!r}]
        main()
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=child_environment()) as process:
        until = time.monotonic() + 60
        while not out.is_file() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "go on with --resume" in output
    assert [row.contender for row in load(out).rows] == [OURS, "timm", "xFormers"]


# --- comparing ------------------------------------------------------------------------------------------------------


ROW = Row(0, "model", TINY, "forward", OURS, "H100 SXM", "bf16", "gpu", seconds=Spread(0.010, 0.009, 0.011, 25))


def saved(path: Path, *medians: float) -> Path:
    """A file with a run for each of these times."""
    rows = [
        replace(ROW, run=number, seconds=Spread(median, 0.9 * median, 1.1 * median, 25))
        for number, median in enumerate(medians)
    ]
    save(Results([Run("now", "bench", {}) for _ in medians], rows), path)
    return path


def test_slower_outside_the_noise_is_exit_code_1(tmp_path: Path):
    before, after = saved(tmp_path / "a.json", 0.010), saved(tmp_path / "b.json", 0.020)
    result = invoke("--compare", str(before), str(after))
    assert result.exit_code == 1, result.output
    assert f"regression: {TINY}, vit-engine, 2.000" in result.output
    assert "1 compared, 1 regressions of ours" in result.output
    assert invoke("--compare", str(after), str(before)).exit_code == 0, "faster is none"
    same = saved(tmp_path / "c.json", 0.0105)
    result = invoke("--compare", str(before), str(same))
    assert result.exit_code == 0 and "0 regressions" in result.output
    line = f"{TINY}, vit-engine, bf16: 10.000 ms -> 10.500 ms, 1.050 (0.859 to 1.283), measured, same"
    assert line in result.output.splitlines()


def test_runs_of_one_file_are_named_by_number(tmp_path: Path):
    path = saved(tmp_path / "a.json", 0.010, 0.020)
    assert invoke("--compare", f"{path}#0", str(path)).exit_code == 1
    assert invoke("--compare", f"{path}#-2", f"{path}#-1").exit_code == 1
    assert invoke("--compare", f"{path}#1", f"{path}#0").exit_code == 0


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("missing.json", "missing.json: cannot be read as benchmark results"),
        ("a.json#5", "a.json: it has 1 runs, so run must be from -1 to 0; got 5"),
        ("a.json#last", "a.json: run must be a number, such as 0 or -1; got 'last'"),
        ("damaged.json", "damaged.json: damaged benchmark results: rows[0].run must be a whole number; got 'x'"),
        ("other.json", "no case, contender, device and dtype was measured or compiled in both"),
    ],
    ids=["missing", "run", "number", "damaged", "nothing shared"],
)
def test_unusable_files_are_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str, message: str):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a.json", 0.010)
    save(Results([Run("now", "bench", {})], [replace(ROW, device="A100")]), tmp_path / "other.json")
    (tmp_path / "damaged.json").write_text((tmp_path / "a.json").read_text().replace('"run": 0', '"run": "x"'))
    result = invoke("--compare", "a.json", second)
    assert result.exit_code == 2 and message in printed(result)


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--csv", "rows.csv"], "--csv"), (["kernels", "--batch", "8", "--resume"], "SUITE, --batch, --resume")],
)
def test_a_comparison_refuses_what_it_would_leave_out(tmp_path: Path, words: list[str], named: str):
    path = saved(tmp_path / "a.json", 0.010)
    result = invoke(*words, "--compare", str(path), str(path))
    assert result.exit_code == 2
    assert f"--compare: it compares whole files, and has no use for {named}" in printed(result)


def test_what_ours_does_not_do_any_more_is_a_regression(tmp_path: Path):
    before, after = saved(tmp_path / "a.json", 0.010), tmp_path / "b.json"
    missing = replace(ROW, source="not run", seconds=None, reason="wrong result, not timed")
    save(Results([Run("now", "bench", {})], [missing]), after)
    result = invoke("--compare", str(before), str(after))
    assert result.exit_code == 1
    assert f"not run any more: {TINY}, vit-engine: wrong result, not timed" in result.output


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"source": "gpu"}, {}, "cannot be compared: {}: measured in the first, compiled in the second"),
        ({}, {"modelled_s": None}, "gone: {}: the first has a modelled time or bound, the second has not"),
    ],
    ids=["measured, then compiled", "no model any more"],
)
def test_what_cannot_be_compared_is_said_and_fails(tmp_path: Path, first: Any, second: Any, message: str):
    compiled_row = replace(ROW, source="compiled", seconds=None, modelled_s=0.02, bound_s=0.01)
    for name, changes in (("a", first), ("b", second)):
        row = ROW if changes.get("source") == "gpu" else replace(compiled_row, **changes)
        save(Results([Run("now", "bench", {})], [row]), tmp_path / f"{name}.json")
    result = invoke("--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert result.exit_code == 1 and message.format(f"{TINY}, vit-engine") in result.output


def test_a_new_model_is_compared_by_its_bound(tmp_path: Path):
    for name, modelled in (("a", None), ("b", 0.02)):
        row = replace(ROW, source="compiled", seconds=None, modelled_s=modelled, bound_s=0.01)
        save(Results([Run("now", "bench", {})], [row]), tmp_path / f"{name}.json")
    result = invoke("--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert result.exit_code == 0 and "10.000 ms -> 10.000 ms, 1.000, modelled, same" in result.output
