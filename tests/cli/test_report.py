"""``vit-engine report``: which results it takes, what it makes itself, and what it writes."""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.bench import child
from tests.bench.report_results import compiled, results, row, run
from tests.rung import RUNG
from vit_bench.report import compiled as making
from vit_bench.report import facts
from vit_bench.results import Results, save
from vit_engine.cli.app import app

pytestmark = pytest.mark.skipif(RUNG == "sanitized", reason="a report runs no kernel")


def invoke(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["report", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "digits", lambda: (360, 364))
    monkeypatch.setattr(facts, "_records", lambda _: facts.Table((), ()))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


def test_several_files_become_one_page(tmp_path, out):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    save(results(), paths[0])
    save(Results([run()], [row("from b")]), paths[1])
    printed = invoke(*map(str, paths), "--out", str(out))
    html = out.read_text(encoding="utf-8")
    assert "from b" in html and "timm, eager" in html and f"{len(results().rows) + 1} rows" in printed


def test_a_file_of_results_is_not_overwritten(tmp_path):
    path = tmp_path / "a.json"
    save(results(), path)
    before = path.read_bytes()
    assert f"--out: {path}: is a file that is read, too" in invoke(str(path), "--out", str(path), code=2)
    assert path.read_bytes() == before


def test_a_page_of_files_refuses_what_only_a_compiled_one_has_a_use_for(tmp_path, out):
    path = tmp_path / "a.json"
    save(results(), path)
    printed = invoke(str(path), "--out", str(out), "--gpu", "h100", "--dtype", "fp16", code=2)
    assert "RESULTS: the page is made from these files, and has no use for --gpu, --dtype" in printed
    assert not out.exists()


def test_a_row_that_cannot_be_placed_is_named(tmp_path, out):
    path = tmp_path / "a.json"
    save(Results([run()], [replace(row(), suite="model", shape={})]), path)
    assert "damaged benchmark results: the shape of" in invoke(str(path), "--out", str(out), code=2)
    assert not out.exists()


def test_text_that_utf8_cannot_hold_is_shown_escaped(tmp_path, out):
    path = tmp_path / "a.json"
    save(Results([replace(run(), environment={"processor": "odd \ud800"})], results().rows[:0]), path)
    invoke(str(path), "--out", str(out))
    assert "odd \\ud800" in out.read_text(encoding="utf-8")


def test_without_files_it_compiles_and_says_so(out, monkeypatch):
    asked: list[Any] = []

    def compiled_results(*arguments: Any, progress: Any) -> Results:
        asked.append(arguments[:3])
        progress("batch 1")
        return Results([run()], [compiled(1), compiled(64)])

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(making, "compiled_results", compiled_results)
    invoke("--model", "vit_tiny_patch16_224", "--gpu", "a100", "--dtype", "fp16", "--out", str(out))
    assert asked == [("vit_tiny_patch16_224", "a100", "fp16")] and "nothing was timed" in out.read_text(
        encoding="utf-8"
    )


def test_plots_are_written_beside(tmp_path, out):
    pytest.importorskip("matplotlib")
    save(Results([run()], [compiled(1)]), tmp_path / "a.json")
    printed = invoke(str(tmp_path / "a.json"), "--out", str(out), "--plots", str(tmp_path / "plots"))
    assert len(list((tmp_path / "plots").glob("*.svg"))) == 4 and "throughput-vit-base" in printed.replace(" ", "")


def test_without_matplotlib_plots_are_refused_before_anything_is_done(out, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    printed = invoke("--out", str(out), "--plots", str(tmp_path / "plots"), code=2)
    assert 'pip install "vit-engine[plots]"' in printed and not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("missing.json",), ("missing.json", "cannot be read")),
        (("--dtype", "fp8"), ("--dtype", "fp32, fp16, bf16")),
        (("--model", "vit_bas"), ("--model", "vit_base_patch32_224")),
        (("--gpu", "voodoo"), ("--gpu", "'voodoo'")),
        (("--out", "/no/such/page.html"), ("--out", "its folder does not exist")),
        (("--out", "/"), ("--out", "/: is a folder, and a file is to be written")),
        (("--plots", "/dev/null"), ("--plots", "/dev/null is no folder")),
        (("--plots", "/dev/null/plots"), ("--plots", "/dev/null is no folder")),
    ],
)
def test_wrong_options_are_refused(monkeypatch, words, said):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    printed = invoke(*words, code=2)
    assert all(word in printed for word in said), printed


def test_a_child_compiles_where_triton_interprets(monkeypatch):
    seen: list[Any] = []

    def ran(arguments: list[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append((arguments[3:], env.get("TRITON_INTERPRET")))
        return subprocess.CompletedProcess(arguments, 3, stdout="", stderr="")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(subprocess, "run", ran)
    invoke("--out", "a.html", "--gpu", "a100", code=3)
    options = ["--model", "vit_base_patch16_224", "--gpu", "a100", "--dtype", "bf16"]
    assert seen == [(["report", "--out", "a.html", *options], None)]


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.interpreted_only
def test_on_any_machine(out):
    """The whole of it, from a process whose Triton compiles."""
    printed = child.run(
        f"""
        import json, subprocess, sys
        words = ["report", "--model", "vit_tiny_patch16_224", "--out", {str(out)!r}]
        command = [sys.executable, "-m", "vit_engine.cli", *words]
        print(json.dumps(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        """
    )
    html = out.read_text(encoding="utf-8")
    assert str(out) in printed and "modelled for H100 SXM, nothing was timed" in html
    for anchor in ("throughput", "attention", "roofline", "block", "timeline", "memory", "accuracy", "not-run"):
        assert f'id="{anchor}"' in html, anchor
