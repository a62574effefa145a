"""Plants faults one at a time and tells which test noticed each.

    python -m tests.mutants.run --count 240 --named --out out/mutants.json

writes out/mutants.json and the same as a table, out/mutants.md. A fault first meets the tests of its module, then all
default tests; one that passes these has survived, and the exit status is 1. One interpreting process per worker and no
GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import equivalents, forks, named, order, report
from .forks import Outcome, Run
from .generate import FOLDER, MODULES, all_candidates, sample
from .mutant import ROOT, Mutant
from .tree import Tree

# Changes nothing, but any test that merely notices a change of the source fails on it.
NOTHING = "\n_NOTHING = None\n"


@dataclass
class _Slot:
    """A worker's tree, the fault that is planted in it until `planted` is closed, and the tests that run on it."""

    tree: Tree
    mutant: Mutant
    planted: contextlib.ExitStack
    run: Run
    stage: int = 0
    again: bool = False
    seconds: float = 0.0


def examine(mutants: Sequence[Mutant], trees: Sequence[Tree], tell: report.Report) -> None:
    """Every mutant through the quick tests of its module and, while nothing notices, through all default tests."""
    waiting, slots, free = list(mutants), [], list(trees)
    try:
        while waiting or slots:
            while waiting and free:
                slots.append(_plant(free.pop(), waiting.pop(0)))
            time.sleep(0.02)
            for slot in list(slots):
                outcome = _outcome(slot)
                if outcome is not None:
                    slot.planted.close()
                    slots.remove(slot)
                    free.append(slot.tree)
                    tell.add(slot.mutant, outcome, slot.seconds)
    finally:
        for slot in slots:
            slot.run.stop()


def _plant(tree: Tree, mutant: Mutant) -> _Slot:
    planted = contextlib.ExitStack()
    planted.enter_context(tree.planted(mutant))
    return _Slot(tree, mutant, planted, _start(tree, mutant, 0))


def _outcome(slot: _Slot) -> Outcome | None:
    """What became of the mutant; None while tests run, among them those that this call starts."""
    outcome = slot.run.poll()
    if outcome is None:
        return None
    slot.seconds += outcome.seconds
    if outcome.verdict == "passed" and slot.stage == 0:
        slot.stage = 1
    elif outcome.verdict == "caught (timeout)" and not slot.again:
        # A machine that slept for a while looks the same: only what hangs twice hangs.
        slot.again = True
    else:
        return outcome
    slot.run = _start(slot.tree, slot.mutant, slot.stage)
    return None


def _start(tree: Tree, mutant: Mutant, stage: int) -> Run:
    if stage == 1:
        return Run(tree.path, order.ALL, first=order.ALL_FIRST)
    files = order.QUICK[Path(mutant.file).stem]
    return Run(tree.path, files, first=(*order.EAGER, *files))


def control(tree: Tree, tests: Sequence[str]) -> Outcome:
    """The tests on a tree whose files were changed in a way that changes nothing: they must pass."""
    for module in MODULES:
        tree.append(f"{FOLDER}/{module}.py", NOTHING)
    outcome = Run(tree.path, tests, first=order.ALL_FIRST).poll(block=True)
    assert outcome is not None
    return outcome


def selected(arguments: argparse.Namespace, root: Path) -> list[Mutant]:
    if arguments.only:
        known = {mutant.id: mutant for mutant in [*all_candidates(root), *named.mutants(root)]}
        missing = [name for name in arguments.only if name not in known]
        if missing:
            raise SystemExit(f"--only must name mutants of the source as it is; unknown: {', '.join(missing)}")
        return [known[name] for name in arguments.only]
    chosen = named.mutants(root)[:: arguments.every] if arguments.named else []
    chosen += sample(arguments.count, arguments.seed, root)
    if arguments.survivors:
        chosen = [mutant for mutant in chosen if mutant.id in arguments.left]
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="which generated mutants are drawn (default 0)")
    parser.add_argument("--count", type=int, default=240, help="how many generated mutants (default 240)")
    parser.add_argument("--named", action="store_true", help="the named faults as well")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth named fault")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these mutants and no others, proven equivalent or not")
    parser.add_argument("--survivors", type=Path, metavar="FILE", help="only those of the draw that survived in FILE")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time, one core each (default 1)")
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument("--quick-control", action="store_true", help="without a fault only some tests have to pass")
    checks.add_argument("--no-control", action="store_true", help="no run without a fault")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "mutants.json")
    arguments = parser.parse_args(argv)
    if arguments.survivors is not None:
        try:
            arguments.left = report.survivors(json.loads(arguments.survivors.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--survivors: {arguments.survivors} cannot be read as a report: {error!r}")

    forks.preload()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        # Everything comes from one copy: the working tree may be edited meanwhile.
        pristine = Tree(ROOT, Path(folder) / "pristine")
        mutants = selected(arguments, pristine.path)
        sources = {mutant.file: (pristine.path / mutant.file).read_bytes() for mutant in mutants}
        tell = report.Report(arguments.out, arguments.seed, sources)
        if not arguments.no_control:
            tests = order.EAGER if arguments.quick_control else order.ALL
            tell.control = control(Tree(pristine.path, Path(folder) / "control"), tests)
            print(f"control: {tell.control}", flush=True)
            if tell.control.verdict != "passed":
                print("the tests fail without any fault: nothing else is run")
                return 2
        proven = {} if arguments.only else equivalents.load()
        for mutant in mutants:
            if mutant.id in proven:
                tell.add(mutant, Outcome("equivalent", how=proven[mutant.id]), 0.0)
        trees = [Tree(pristine.path, Path(folder) / f"tree{number}") for number in range(arguments.workers)]
        examine([mutant for mutant in mutants if mutant.id not in proven], trees, tell)
    tell.write()
    print(tell.totals())
    return 1 if report.survivors(tell.as_json()) else 0


if __name__ == "__main__":
    sys.exit(main())
