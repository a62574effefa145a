"""The run that a profile's rows belong to, and the file that it is added to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vit_bench import results
from vit_bench.full.report import now
from vit_bench.results import Results, Row, Run
from vit_bench.timed.machine import datasheet, environment
from vit_kernels.device import Device


def this_run(command: str, label: str, device: Device | None) -> Run:
    """label: of the GPU that the figures are about; device: the same where its datasheet is known."""
    return Run(now(), command, environment(label), datasheet=datasheet(device))


def kept_in(path: Path, run: Run) -> Callable[[Sequence[Row]], None]:
    """What writes the file: its content now, which is nothing if it is not there, and this run with the rows given."""
    found = results.load(path) if path.exists() else Results()
    number, before = len(found.runs), tuple(found.rows)
    found.runs.append(run)

    def keep(rows: Sequence[Row]) -> None:
        found.rows = [*before, *(replace(row, run=number) for row in rows)]
        results.save(found, path)

    return keep
