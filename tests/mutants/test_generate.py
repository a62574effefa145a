"""Generated mutants: enough of them, always the same, each a small change that leaves the rest of the file alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import equivalents
from .generate import FOLDER, MODULES, all_candidates, candidates, sample
from .mutant import ROOT, Mutant
from .operators import OPERATORS


@pytest.fixture(scope="module")
def every() -> list[Mutant]:
    return all_candidates()


def test_the_sample_is_large_and_always_the_same() -> None:
    chosen = sample(240, seed=0)
    assert len({mutant.id for mutant in chosen}) == len(chosen) == 240
    program = "from tests.mutants.generate import sample; print(*(mutant.id for mutant in sample(240, 0)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [mutant.id for mutant in chosen] == done.stdout.split()
    assert {mutant.id for mutant in chosen} != {mutant.id for mutant in sample(240, seed=1)}
    assert {Path(mutant.file).stem for mutant in chosen} == set(MODULES)
    assert {mutant.kind for mutant in chosen} == set(OPERATORS)


def test_every_mutant_is_another_program(every: list[Mutant]) -> None:
    """It parses, its tree is not the original's, and no two say the same."""
    for module in MODULES:
        file = str(FOLDER / f"{module}.py")
        content = (ROOT / file).read_bytes()
        here = [mutant for mutant in every if mutant.file == file]
        programs = [mutant.apply(content) for mutant in here]
        assert len({b"".join(program.split()) for program in [content, *programs]}) == len(here) + 1
        for program in programs[::50]:
            assert ast.dump(ast.parse(program)) != ast.dump(ast.parse(content))


def test_a_mutant_differs_in_one_place(every: list[Mutant]) -> None:
    content = {mutant.file: (ROOT / mutant.file).read_bytes() for mutant in every}
    for mutant in every:
        (edit,) = mutant.edits
        changed = mutant.apply(content[mutant.file])
        assert changed[: edit.start] == content[mutant.file][: edit.start]
        assert changed.endswith(content[mutant.file][edit.end :])
        before, after = mutant.lines(content[mutant.file])
        assert before and before.split(": ", 1)[1] != after


def test_what_was_proven_equivalent_is_still_there(every: list[Mutant]) -> None:
    """The proof is of the line as it was: when it changes, its mutants have to be looked at again."""
    proofs = equivalents.load()
    assert set(proofs) <= {mutant.id for mutant in every}
    assert all(len(reason) > 20 for reason in proofs.values())


# A line of source and all that each operator makes of it.
EXAMPLES: dict[str, tuple[str, list[str]]] = {
    "comparison": ("keep = a < b", ["keep = a <= b"]),
    "condition-dropped": ("keep = (a < b)[:, None] & c", ["keep = (a < b)[:, None]", "keep = c"]),
    "other": ("x = tl.load(at, mask=m, other=0.0)", ["x = tl.load(at, mask=m, other=1.0)"]),
    "constant": ("x = f(3, 0.0, 0.5, float('-inf'))", [
        "x = f(4, 0.0, 0.5, float('-inf'))", "x = f(3, 1.0, 0.5, float('-inf'))", "x = f(3, 0.0, 0.505, float('-inf'))",
        "x = f(3, 0.0, 0.5, 0.0)",
    ]),
    "arithmetic": ("x = (a + b) * -c", ["x = ((a + b) + -c)", "x = (a - b) * -c", "x = (a + b) * c"]),
    "term-dropped": ("x = a - (b + c)", ["x = a", "x = a - (b)", "x = a - (c)"]),
    "axis": ("x = tl.sum(a[:, None], 1) + b.stride(0)", [
        "x = tl.sum(a[:, None], 0) + b.stride(0)", "x = tl.sum(a[None, :], 1) + b.stride(0)",
        "x = tl.sum(a[:, None], 1) + b.stride(1)",
    ]),
    "stride": ("def f(stride_xm, stride_xk, stride_bias):\n    return stride_xm * 2", [
        "def f(stride_xm, stride_xk, stride_bias):\n    return stride_xk * 2",
    ]),
    "cast-dropped": ("x = (a + b).to(tl.int64)[:, None]", ["x = (a + b)[:, None]"]),
    "function": ("x = tl.minimum(a, b)", ["x = tl.maximum(a, b)"]),
    "assignment-dropped": ("x += a * b", ["pass"]),
    "condition-negated": ("if a and b:\n    x = tl.where(c, 1, 0)", [
        "if not (a and b):\n    x = tl.where(c, 1, 0)", "if a and b:\n    x = tl.where(c, 0, 1)",
    ]),
    "branch-forced": ("x = 1 if a else 2", ["x = 1 if True else 2", "x = 1 if False else 2"]),
    "statement-dropped": ('check("x", x)', ["pass"]),
    "keyword-dropped": ("x = f(a, eps=e, tf32=t)", ["x = f(a, tf32=t)", "x = f(a, eps=e)"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", OPERATORS)
def test_operator(kind: str, tmp_path: Path) -> None:
    source, expected = EXAMPLES[kind]
    (tmp_path / "example.py").write_text(source + "\n")
    made = [m for m in candidates(Path("example.py"), tmp_path) if m.kind == kind]
    assert {m.apply(source.encode()).decode() for m in made} == set(expected)


def test_texts_of_errors_types_and_comments_are_left_alone(tmp_path: Path) -> None:
    source = '''
def f(x: "int | 3"):
    """1 + 1"""
    # 2 + 2
    if x:
        raise ValueError(f"{x + 1} of 4")
    assert x + 5
'''
    (tmp_path / "example.py").write_text(source)
    found = {m.kind for m in candidates(Path("example.py"), tmp_path)}
    assert found == {"condition-negated", "branch-forced", "statement-dropped"}
