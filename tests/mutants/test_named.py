"""Named faults: each still finds its text, and the kinds that bit others are all there."""

from __future__ import annotations

import ast

import pytest

from . import named, order
from .generate import MODULES
from .mutant import ROOT


def test_every_fault_applies_to_the_source_as_it_is() -> None:
    """mutants() raises for a text that is not there exactly once."""
    faults = named.mutants()
    assert len({fault.id for fault in faults}) == len(faults) >= 40
    for fault in faults:
        content = (ROOT / fault.file).read_bytes()
        assert ast.dump(ast.parse(fault.apply(content))) != ast.dump(ast.parse(content))
        assert fault.why


def test_a_fault_without_a_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "FAULTS", {"vit_engine/ops.py": {"gone": ("Why.", "no such text", "x")}})
    with pytest.raises(ValueError, match=r"'gone' must find its text exactly once in vit_engine/ops\.py, not 0"):
        named.mutants()


def test_every_module_with_faults_has_quick_tests() -> None:
    stems = {fault.file.rsplit("/", 1)[1].removesuffix(".py") for fault in named.mutants()}
    assert set(order.QUICK) == stems | set(MODULES)
    for start in [start for starts in order.QUICK.values() for start in starts] + list(order.EAGER):
        file, _, function = start.partition("::")
        assert f"def {function}" in (ROOT / file).read_text(), start
