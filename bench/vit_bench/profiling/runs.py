"""The run that a profile's rows belong to, and the file that it is added to."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

from vit_bench import results
from vit_bench.results import Results, Row, Run
from vit_bench.timed.machine import datasheet, environment
from vit_kernels.device import Device


def this_run(command: str, label: str, device: Device | None) -> Run:
    """label: of the GPU that the figures are about; device: the same where its datasheet is known."""
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Run(started, command, environment(label), datasheet=datasheet(device))


def append(path: Path, run: Run, rows: list[Row]) -> None:
    """Adds a run to a file of results, which is made if it is not there."""
    found = results.load(path) if path.exists() else Results()
    number = len(found.runs)
    found.runs.append(run)
    found.rows += [replace(row, run=number) for row in rows]
    results.save(found, path)
