"""Faults of the kinds that bit others, as edits of the present source.

Each is (what goes wrong and for whom, text that occurs exactly once, what stands there instead), by file and name. The
lists are in the files called faults_*.py.
"""

from __future__ import annotations

from pathlib import Path

from . import faults_attention, faults_dropin, faults_engine, faults_heads, faults_products
from .mutant import ROOT, Edit, Mutant

_LISTS = (faults_attention, faults_heads, faults_products, faults_engine, faults_dropin)
FAULTS = {file: faults for module in _LISTS for file, faults in module.FAULTS.items()}


def mutants(root: Path = ROOT) -> list[Mutant]:
    return [_mutant(root, file, name, *fault) for file, faults in FAULTS.items() for name, fault in faults.items()]


def _mutant(root: Path, file: str, name: str, why: str, find: str, put: str) -> Mutant:
    content = (root / file).read_bytes()
    times = content.count(find.encode())
    if times != 1:
        raise ValueError(f"fault {name!r} must find its text exactly once in {file}, not {times} times: {find!r}")
    start = content.index(find.encode())
    edit = Edit(start, start + len(find.encode()), put)
    return Mutant(f"named.{Path(file).stem}.{name}", file, "named", (edit,), why)
