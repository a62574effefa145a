"""Runs cases one after the other and keeps every row as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vit_bench.results import SOURCES, Results, Row, Run
from vit_bench.timed.shapes import Case


class Measures(Protocol):
    """What gives rows: `measured.Measuring` or `compiled.Compiling`. label: of the device that the rows are about."""

    label: str

    def rows(self, case: Case, dtype: str, run: int) -> list[Row]: ...


class Watch(Protocol):
    """Is told how far a run is."""

    def started(self, case: Case, dtype: str, number: int, count: int) -> None: ...

    def done(self, rows: Sequence[Row]) -> None: ...


@dataclass
class Job:
    """Cases that one run is about, each in every one of these dtypes, and what gives their rows."""

    cases: Sequence[Case]
    dtypes: Sequence[str]
    measures: Measures

    @property
    def steps(self) -> list[tuple[Case, str]]:
        """Batches of one model and dtype stand next to each other: they share their references."""
        return [(case, dtype) for dtype in self.dtypes for case in self.cases]


# By what `Run.environment` says of its times: where its rows may come from.
_SOURCES = {"measured": ("gpu", "cpu"), "compiled": ("compiled",)}


def begin(results: Results, run: Run, resume: bool) -> int:
    """The number of the run that rows are added to: a new one, or with resume the last one of the same machine.

    The same machine: device, versions and kernel sources are equal, so that rows side by side mean the same. Compiled
    rows carry the names of GPUs, too, so a run that measures does not go on with one that compiles for its GPU.
    """
    if resume:
        for number, before in reversed(list(enumerate(results.runs))):
            if _comparable(before) == _comparable(run):
                return number
    results.runs.append(run)
    return len(results.runs) - 1


def _comparable(run: Run) -> list[object]:
    return [run.environment.get(name) for name in ("device", "versions", "kernel_sources", "times")]


def perform(job: Job, results: Results, run: int, save: Callable[[], None], watch: Watch) -> None:
    """Adds the rows of every step that the run has none of, and saves after each.

    What interrupts it loses the case that is being measured and nothing else.
    """
    sources = ("not run", *_SOURCES.get(results.runs[run].environment.get("times", ""), SOURCES))
    own = [row for row in results.rows if row.run == run and row.device == job.measures.label]
    done = {(row.case, row.dtype) for row in own if row.source in sources}
    steps = job.steps
    for number, (case, dtype) in enumerate(steps, 1):
        if (case.name, dtype) in done:
            continue
        watch.started(case, dtype, number, len(steps))
        rows = job.measures.rows(case, dtype, run)
        results.rows += rows
        save()
        watch.done(rows)
