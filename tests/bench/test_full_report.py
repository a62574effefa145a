"""The report: valid at every moment, one page without scripts or addresses, every text of a process escaped."""

from __future__ import annotations

import html.parser
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from vit_bench.full.checks import Facts, all_checks
from vit_bench.full.headline import headline
from vit_bench.full.page import page
from vit_bench.full.report import build, usable_path, write
from vit_bench.full.runner import STATUSES, Outcome, part

CHECKS = all_checks(Facts("NVIDIA H100", "", triton=True, timm=True, sanitizer=None))
GPU = {
    "index": 0,
    "name": "NVIDIA <H100>",
    "capability": "9.0",
    "multiprocessors": 132,
    "memory_gib": 79.1,
    "refused": None,
}
ENVIRONMENT = {
    "gpu": GPU,
    "gpus": [GPU, GPU],
    "cuda": {"pytorch_built_for": "13.0", "driver": "580.1"},
    "versions": {"torch": "2.14.1", "triton": None, "timm": "1.0"},
    "python": "3.12.1",
    "system": "Linux",
    "processor": "x86_64",
    "cores": 8,
    "compute_sanitizer": None,
    "kernel_sources": {"linear": "abc123"},
    "git": {"commit": "0123456789abcdef", "changed": True},
}


def judged(name: str, row: float) -> dict[str, Any]:
    figures = {"largest": 0.5, "largest_eager": 0.5, "row": row, "row_allowed": 1e-2, "row_eager": 4e-3}
    return {**part(name, "passed"), "figures": figures}


def rate(images: float) -> dict[str, float]:
    return {
        "images_per_second": images,
        "median_ms": 8000 / images,
        "fastest_ms": 1.0,
        "slowest_ms": 9.0,
        "timings": 30,
        "passes_per_timing": 2,
    }


TIMES = {
    "model": "vit_base_patch16_224",
    "batch": 8,
    "dtype": "bf16",
    "throughput": {"vit-engine": rate(2000.0), "timm, eager": rate(500.0)},
    "nvidia_smi_under_load": {"clocks.sm": "1980"},
}
OUTCOMES = [
    Outcome("gpu", "executed", "passed", parts=[part("NVIDIA <H100>, compute capability 9.0", "passed")]),
    Outcome(
        "cases/linear/fp16", "executed", "passed", "", [judged("odd sizes", 1e-3), judged("swiglu", 5e-3)], "", 4.25
    ),
    Outcome(
        "cases/mlp/fp16",
        "executed",
        "crashed",
        "one & only: ended by signal 11 (SIGSEGV)",
        [part("one & only", "crashed", "ended by signal 11 (SIGSEGV)")],
        "<script>alert('kernel')</script>",
    ),
    Outcome("cases/mlp/fp32", "executed", "crashed", "ended with exit status 1"),
    Outcome("cases/mlp/bf16", "executed", "timed out", "a: stopped after 900 s", [part("a", "timed out", "stopped")]),
    Outcome(
        "throughput/vit_base_patch16_224/b8", "executed", "passed", "", [{**part("times", "passed"), "figures": TIMES}]
    ),
]


def made(**options: Any) -> dict[str, Any]:
    given = {"started": "2030-01-01T00:00:00+00:00", "ended": "2030-01-01T00:10:00+00:00", **options}
    return build(ENVIRONMENT, CHECKS, OUTCOMES, **given)


def test_every_check_is_in_the_report_and_counted_once() -> None:
    report = made()
    assert report["schema"] == 1 and report["complete"] and report["verdict"] == "failed"
    assert sorted(check["name"] for check in report["checks"]) == sorted(["gpu", *(check.name for check in CHECKS)])
    assert tuple(report["summary"]) == STATUSES
    assert report["summary"] == {
        "passed": 3,
        "failed": 0,
        "timed out": 1,
        "crashed": 2,
        "not run": len(CHECKS) - 5,
    }
    reasons = {check["name"]: check["reason"] for check in report["checks"]}
    assert reasons["cases/linear/fp32"] == "not reached" and "CUDA_HOME" in reasons["memcheck/linear/fp16"]


def test_a_run_that_goes_on_or_was_interrupted_is_marked() -> None:
    report = made(ended=None)
    assert report["complete"] is False and "Incomplete" in page(report)
    assert "Incomplete" not in page(made())
    assert "cases/&lt;x&gt;*" in page(made(only=["cases/<x>*"]))


def test_only_what_went_wrong_makes_the_verdict() -> None:
    report = build(ENVIRONMENT, CHECKS, OUTCOMES[:2], started="a", ended="b")
    assert report["verdict"] == "nothing failed" and report["summary"]["not run"] > 90


def test_numbers_without_a_word_in_json_become_null(tmp_path: Path) -> None:
    outcome = Outcome("a", "executed", "passed", parts=[{**part("x", "passed"), "figures": {"v": float("nan")}}])
    report = build(ENVIRONMENT, [], [outcome], started="a", ended="b")
    write(report, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == report
    assert report["checks"][0]["parts"][0]["figures"] == {"v": None}


def test_files_are_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write(made(ended=None), path)
    write(made(), path)
    assert json.loads(path.read_text())["complete"] is True
    assert (tmp_path / "r.html").read_text() == page(made())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.json"]


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails where tags are not closed in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def test_the_page_needs_nothing_but_itself() -> None:
    text = page(made())
    reader = Reader(text)
    assert reader.open == []
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "img", "iframe", "object", "a", "svg"}
    attributes = {name for _, given in reader.tags for name in given}
    assert not attributes & {"src", "href", "srcset"} and not any(name.startswith("on") for name in attributes)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "max-width: 40rem" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in reader.tags


def test_what_processes_say_is_shown_and_never_obeyed() -> None:
    reader = Reader(page(made()))
    assert "<script>alert('kernel')</script>" in reader.text
    assert "one & only" in reader.text and "NVIDIA <H100>" in reader.text
    assert "pre" in {tag for tag, _ in reader.tags}


def spoilt(value: Any, text: str, key: str = "") -> Any:
    """The same with `text` behind every string that is not one of the page's own words, keys of figures included."""
    if isinstance(value, dict):
        ours = key in ("throughput", "nvidia_smi_under_load", "versions", "kernel_sources")
        return {name + text * ours: spoilt(item, text, name) for name, item in value.items()}
    if isinstance(value, list):
        return [spoilt(item, text) for item in value]
    return value + text if isinstance(value, str) and key not in ("status", "rung") else value


def test_no_text_anywhere_becomes_markup() -> None:
    report = made(only=["cases/*"])
    harmless, hostile = (Reader(page(spoilt(report, text))) for text in ("iii", "<i x='1'>&lt;\""))
    assert hostile.tags == harmless.tags
    assert hostile.text == harmless.text.replace("iii", "<i x='1'>&lt;\"")


def test_the_page_says_in_words_what_happened() -> None:
    text = Reader(page(made())).text.replace("\N{NO-BREAK SPACE}", " ")
    for status in ("\u2713 passed", "\u2717 crashed", "\u2717 timed out", "\u2013 not run"):
        assert status in text
    for words in ("580.1", "13.0", "triton not installed", "0123456789abcdef, with changes", "132 multiprocessors"):
        assert words in text
    assert "2; the first one was used" in text
    assert "executed on this GPU" in text and "interpreter" not in text
    assert "2 comparisons, worst row error 5.0e-03 of 1.0e-02 allowed" in text
    assert "vit_base_patch16_224, batch 8, bf16" in text and "2,000 images/s" in text and "clocks.sm 1980" in text


def test_bars_are_to_scale() -> None:
    widths = re.findall(r'<i style="width:([0-9.]+)%"', page(made()))
    assert widths == ["100.0", "25.0"]


def test_a_check_that_did_not_run_claims_no_rung() -> None:
    rows = re.findall(r"<tr><td><code>([^<]*)</code></td><td class=\"status\">.*?</td><td>(.*?)</td>", page(made()))
    rungs = dict(rows)
    assert rungs["cases/linear/fp16"] == "executed" and rungs["cases/linear/fp32"] == ""


def test_a_machine_without_anything_has_a_page_too() -> None:
    bare = {**ENVIRONMENT, "gpu": None, "gpus": [], "cuda": {}, "versions": {}, "git": None, "compute_sanitizer": None}
    text = Reader(page(build(bare, CHECKS, [], started="a", ended=None))).text
    assert "none that PyTorch can use" in text and "not a checkout" in text and "Throughput" not in text


def test_headlines() -> None:
    compiled = [{**part("linear", "passed"), "figures": {"variants": 4, "stack_bytes": 0}}] * 2
    check = {"status": "passed", "reason": "", "parts": compiled}
    assert headline(check) == "8 kernel variants compiled, 0 bytes spilled"
    assert headline({"status": "not run", "reason": "no GPU", "parts": []}) == "no GPU"
    for figures, line in (
        ({"replays": 3}, "replays 3"),
        ({"row": None, "row_allowed": 0.0}, "row None, row allowed 0.0"),  # of a result without elements
        ({}, "x"),
    ):
        parts = [{**part("x", "passed"), "figures": figures}]
        assert headline({"status": "passed", "reason": "", "parts": parts}) == line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("report.txt", "must end in .json"),
        ("report", "must end in .json"),
        ("missing/report.json", "missing' does not exist"),
        ("folder.json", "folder.json' is not a file"),
        ("page.json", "page.html' is not a file"),
        ("fine.json", ""),
        ("old.json", ""),
    ],
)
def test_a_path_is_refused_before_anything_runs(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "page.html").mkdir()
    (tmp_path / "old.json").write_text("{}")
    reason = usable_path(tmp_path / name)
    assert words in reason and bool(reason) == bool(words)
    assert not (tmp_path / "fine.json").exists()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written to" in usable_path(tmp_path / "r.json")
