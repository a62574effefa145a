"""The runner on a small tree: what notices a fault is named, what nothing notices has survived."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import hypothesis  # noqa: F401  (its pytest plugin imports it at the end of a run: once here, not in every child)
import pytest

from . import order, report, run
from .forks import Outcome, Run
from .mutant import Edit, Mutant
from .tree import Tree

SOURCE = """def double(x):
    return x + x


def unused(x):
    return x - 1
"""
TESTS = """
import toy

def test_two():
    assert toy.double(2) == 4
"""
MORE_TESTS = """
import toy

def test_three():
    assert toy.double(3) == 6
"""


@pytest.fixture
def original(tmp_path: Path) -> Path:
    folder = tmp_path / "original"
    (folder / "tests").mkdir(parents=True)
    (folder / "toy.py").write_text(SOURCE)
    (folder / "tests" / "test_toy.py").write_text(TESTS)
    (folder / "tests" / "test_more.py").write_text(MORE_TESTS)
    (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntestpaths = ["tests"]\n')
    return folder


def fault(name: str, find: str, put: str) -> Mutant:
    start = SOURCE.index(find)
    return Mutant(name, "toy.py", "toy", (Edit(start, start + len(find), put),))


def outcome(original: Path, tmp_path: Path, mutant: Mutant, limit: float = 60):
    tree = Tree(original, tmp_path / "tree")
    with tree.planted(mutant):
        found = Run(tree.path, (), limit=limit).poll(block=True)
    assert found is not None
    assert (tree.path / "toy.py").read_text() == (original / "toy.py").read_text() == SOURCE
    return found


def test_faults_meet_the_quick_tests_then_all(original, tmp_path, monkeypatch):
    monkeypatch.setattr(order, "QUICK", {"toy": ("tests/test_toy.py",)})
    monkeypatch.setattr(order, "ALL", ())
    mutants = [
        fault("product", "x + x", "x * x"),  # the same for 2, another for 3
        fault("zero", "x + x", "0"),
        fault("survivor", "x - 1", "x - 2"),
    ]
    tell = report.Report(tmp_path / "out" / "toy.json", 0, {"toy.py": SOURCE.encode()})
    run.examine(mutants, [Tree(original, tmp_path / f"tree{n}") for n in range(2)], tell)
    written = json.loads((tmp_path / "out" / "toy.json").read_text())
    found = {entry["id"]: (entry["verdict"], entry["test"]) for entry in written["mutants"]}
    assert found == {
        "product": ("caught", "tests/test_more.py::test_three"),
        "zero": ("caught", "tests/test_toy.py::test_two"),
        "survivor": ("survived", ""),
    }
    assert report.survivors(written) == {"survivor"}
    assert "| `zero` | `2: return x + x` | `return 0` | caught | `tests/test_toy.py::test_two` |" in (
        tmp_path / "out" / "toy.md"
    ).read_text()


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (["caught (timeout)", "caught (timeout)"], "caught (timeout)"),
        (["caught (timeout)", "passed", "passed"], "survived"),
        (["passed", "caught (timeout)", "caught"], "caught"),
    ],
)
def test_only_what_hangs_twice_hangs(original, tmp_path, monkeypatch, outcomes, verdict):
    left = [Outcome(name) for name in outcomes]
    monkeypatch.setattr(run, "_start", lambda *arguments: SimpleNamespace(poll=lambda: left.pop(0)))
    tell = report.Report(tmp_path / "toy.json", 0, {"toy.py": SOURCE.encode()})
    run.examine([fault("survivor", "x - 1", "x - 2")], [Tree(original, tmp_path / "tree")], tell)
    assert [entry["verdict"] for entry in tell.entries] == [verdict] and left == []


def test_the_error_is_told(original, tmp_path):
    found = outcome(original, tmp_path, fault("zero", "x + x", "0"))
    assert (found.verdict, found.how) == ("caught", "assert 0 == 6")


def test_a_fault_that_cannot_be_imported_is_caught(original, tmp_path):
    found = outcome(original, tmp_path, fault("name", "def unused(x):", "x = undefined\ndef unused(x):"))
    assert found.verdict == "caught" and "undefined" in found.how


def test_a_crash_is_told_from_a_failure(original, tmp_path):
    found = outcome(original, tmp_path, fault("crash", "x + x", "__import__('os').abort()"))
    assert (found.verdict, found.how) == ("caught (crash)", "SIGABRT")
    assert "::test_t" in found.test


def test_a_test_that_hangs_is_stopped(original, tmp_path):
    found = outcome(original, tmp_path, fault("loop", "x + x", "[x for _ in iter(int, 1)]"), limit=0.5)
    assert (found.verdict, found.how) == ("caught (timeout)", "SIGALRM")


def test_an_empty_selection_is_no_catch(original, tmp_path):
    with pytest.raises(RuntimeError, match="pytest ended with status 4"):
        Run(Tree(original, tmp_path / "tree").path, ("tests/no_such_file.py",)).poll(block=True)


@pytest.mark.parametrize("text", [None, "no json", "[]", "{}"], ids=["missing", "text", "list", "no mutants"])
def test_a_report_that_is_none_is_refused_before_anything_runs(text, tmp_path, capsys):
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        run.main(["--survivors", str(path)])
    assert ended.value.code == 2 and f"{path} cannot be read as a report" in capsys.readouterr().err
