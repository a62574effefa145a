"""Source hashes and evidence files: they change when, and only when, what a record claims does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vit_bench import records

OPERATION = '''
"""An operation."""

from .shared import twice


def linear(x):
    # doubles
    return twice(x) + 1
'''
SHARED = "def twice(x):\n    return 2 * x\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "gemm.py").write_text(OPERATION)
    (tmp_path / "shared.py").write_text(SHARED)
    (tmp_path / "unrelated.py").write_text("def other():\n    return 3\n")
    return tmp_path


def record(**changes: object) -> records.Record:
    fields = {
        "kernel": "linear",
        "dtype": "float16",
        "capability": 90,
        "source": "abc",
        "passed": True,
        "versions": {},
        "date": "2026-01-01",
    }
    return records.Record(**{**fields, **changes})  # type: ignore[arg-type]


def test_comments_docstrings_and_layout_do_not_change_the_hash(folder: Path) -> None:
    before = records.source_hash("linear", folder)
    text = OPERATION.replace("# doubles", "# twice, then one more").replace("An operation", "Another text")
    (folder / "gemm.py").write_text(text.replace("twice(x) + 1", "(\n        twice(x)\n        + 1\n    )"))
    assert records.source_hash("linear", folder) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [("gemm.py", "+ 1", "+ 2"), ("shared.py", "2 * x", "x * 2"), ("gemm.py", "linear(x)", "linear(x, y=0)")],
)
def test_code_of_the_operation_and_of_what_it_imports_changes_the_hash(
    folder: Path, file: str, old: str, new: str
) -> None:
    before = records.source_hash("linear", folder)
    path = folder / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert records.source_hash("linear", folder) != before


def test_imports_are_followed_transitively(folder: Path) -> None:
    (folder / "shared.py").write_text("from . import deeper\n\n\ndef twice(x):\n    return deeper.f(x)\n")
    (folder / "deeper.py").write_text("def f(x):\n    return x\n")
    before = records.source_hash("linear", folder)
    (folder / "deeper.py").write_text("def f(x):\n    return -x\n")
    assert records.source_hash("linear", folder) != before


def test_refusing_more_does_not_change_the_hash(folder: Path) -> None:
    before = records.source_hash("linear", folder)
    refusing = OPERATION.replace("import twice", "import check_number, twice").replace(
        "    # doubles", "    check_number(x)"
    )
    (folder / "gemm.py").write_text(refusing)
    checks = "def check_number(x):\n    if x is None:\n        raise TypeError(x)\n"
    (folder / "shared.py").write_text(SHARED + checks)
    assert records.source_hash("linear", folder) == before


def test_modules_that_are_not_imported_do_not_change_the_hash(folder: Path) -> None:
    before = records.source_hash("linear", folder)
    (folder / "unrelated.py").write_text("def other():\n    return 4\n")
    assert records.source_hash("linear", folder) == before


def test_a_kernel_without_a_launcher_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no module in .* defines a function 'attention'"):
        records.source_hash("attention", folder)


@pytest.mark.parametrize("kernel", records.KERNELS)
def test_every_kernel_has_a_hash_that_covers_the_device_functions_it_uses(kernel: str, tmp_path: Path) -> None:
    for path in records.kernel_folder().glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = records.source_hash(kernel, tmp_path)
    assert before == records.source_hash(kernel)
    tiles = tmp_path / "tiles.py"
    tiles.write_text(tiles.read_text() + "\nEXTRA = 1\n")
    assert records.source_hash(kernel, tmp_path) != before


@pytest.mark.parametrize("module", ["attention_costs", "device", "gemm_cycles"])
def test_what_only_decides_among_tiles_does_not_change_the_hash(module: str, tmp_path: Path) -> None:
    for path in records.kernel_folder().glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = {kernel: records.source_hash(kernel, tmp_path) for kernel in records.KERNELS}
    text = (tmp_path / f"{module}.py").read_text()
    assert "triton.jit" not in text and "gluon" not in text, "device code always belongs to the source"
    (tmp_path / f"{module}.py").write_text(text + "\nEXTRA = 1\n")
    assert {kernel: records.source_hash(kernel, tmp_path) for kernel in records.KERNELS} == before


def test_packed_attention_is_part_of_the_claims_about_attention(tmp_path: Path) -> None:
    for path in records.kernel_folder().glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = {kernel: records.source_hash(kernel, tmp_path) for kernel in ("attention", "linear")}
    packed = tmp_path / "attention_packed.py"
    packed.write_text(packed.read_text() + "\nEXTRA = 1\n")
    assert records.source_hash("attention", tmp_path) != before["attention"]
    assert records.source_hash("linear", tmp_path) == before["linear"]


def test_merging_replaces_the_same_claim_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "evidence" / "emulated.json"
    records.merge(path, "emulated", [record(), record(capability=80)])
    records.merge(path, "emulated", [record(passed=False)])
    assert [(r.capability, r.passed) for r in records.load(path)] == [(80, True), (90, False)]


def test_a_missing_file_holds_no_records(tmp_path: Path) -> None:
    assert records.load(tmp_path / "none.json") == []


def test_an_unknown_rung_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rung must be one of interpreted, .*; got 'guessed'"):
        records.merge(tmp_path / "x.json", "guessed", [])


def test_runs_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sanitized.json"
    claims = [
        record(kernel=k, dtype=d, capability=c) for k in records.KERNELS for d in records.DTYPES for c in (80, 90)
    ]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda claim: records.merge(path, "sanitized", [claim]), claims))
    assert len(records.load(path)) == len(claims)
