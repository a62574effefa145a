"""Two inspections side by side."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from vit_bench import before_after

INSPECTION: dict[str, Any] = {
    "model": "vit_tiny",
    "gpu": {"name": "H100 SXM"},
    "batch": 8,
    "dtype": "bf16",
    "launches": [
        {
            "label": "qkv",
            "tile": {"m": 64, "n": 128, "k": 64},
            "num_warps": 4,
            "num_stages": 3,
            "registers": 128,
            "stack": 0,
            "ctas_per_sm": 2,
            "waves": 1.5,
            "code": {"tma": False},
            "main_loops": [{"cycles": {"tensor": 64.0, "shared": 128.0}}, {"cycles": {"tensor": 0.0, "shared": 9.0}}],
            "epilogue": {"slots_per_output": 12.34},
        },
        {
            "label": "norm",
            "tile": {},
            "num_warps": 4,
            "num_stages": 3,
            "registers": 30,
            "stack": 0,
            "ctas_per_sm": 8,
            "waves": 0.1,
            "code": {"tma": False},
            "main_loops": [],
            "epilogue": None,
        },
    ],
}


def changed(**changes: Any) -> dict[str, Any]:
    """The inspection with other values in its first launch."""
    other = copy.deepcopy(INSPECTION)
    other["launches"][0] |= changes
    return other


def row(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_changed_stands_as_two_values_and_what_did_not_as_one() -> None:
    after = changed(registers=96, stack=8, code={"tma": True}, modelled_s=1.25e-5)
    cells = row(before_after.table(INSPECTION, after), "qkv")
    assert cells == [
        "qkv",
        "64x128x64 w4 s3 -> 64x128x64 w4 s3 TMA",
        "128 -> 96 and 8 B spilled",
        "2",
        "1.50",
        "50%",
        "12.3",
        "none -> 12.5",
    ]
    assert row(before_after.table(INSPECTION, after), "norm")[4:] == ["0.10", "", "", ""]


def test_launches_that_came_and_went_are_rows() -> None:
    renamed = changed(label="fused")
    text = before_after.table(INSPECTION, renamed)
    assert row(text, "qkv")[2] == "128 -> none" and row(text, "fused")[2] == "none -> 128"


def test_only_the_same_thing_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"one model, GPU, batch and dtype.*, 8, .*, 64, "):
        before_after.table(INSPECTION, INSPECTION | {"batch": 64})
    files = [tmp_path / name for name in ("a.json", "b.json")]
    files[0].write_text(json.dumps(INSPECTION))
    files[1].write_text(json.dumps(INSPECTION | {"batch": 64}))
    arguments = ["--before", str(files[0]), "--after"]
    assert before_after.main([*arguments, str(files[1])]) == 2
    assert "the same things in the same order" in capsys.readouterr().err
    assert before_after.main([*arguments, str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_the_command_writes_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(INSPECTION))
    (tmp_path / "b.json").write_text(json.dumps(changed(registers=77)))
    out = tmp_path / "new" / "change.md"
    arguments = ["--before", str(tmp_path / "a.json"), "--after", str(tmp_path / "b.json"), "--out", str(out)]
    assert before_after.main([*arguments, "--title", "Smaller tiles"]) == 0
    text = out.read_text()
    assert text.startswith("## Smaller tiles\n") and "compiled only" in text and row(text, "qkv")[2] == "128 -> 77"


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, cut, deep = (tmp_path / name for name in ("a.json", "cut.json", "deep.json"))
    good.write_text(json.dumps(INSPECTION))
    cut.write_text("{")
    deep.write_text("[" * 100_000)
    for bad in (cut, deep):
        assert before_after.main(["--before", str(good), "--after", str(bad)]) == 2
        assert f"{bad}: no JSON" in capsys.readouterr().err
    for out in (tmp_path, good / "under"):
        assert before_after.main(["--before", str(good), "--after", str(good), "--out", str(out)]) == 2
        assert f"--out {out} cannot be written" in capsys.readouterr().err
