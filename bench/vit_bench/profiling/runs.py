"""The run that a profile's rows belong to: what was typed, when, and with which versions."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import asdict, replace
from pathlib import Path

from vit_bench import records, results
from vit_bench.full.environment import git_state
from vit_bench.results import Results, Row, Run
from vit_bench.roofline import PEAKS
from vit_kernels.device import Device


def this_run(command: str, gpu: str | None, device: Device | None) -> Run:
    """gpu: the one at hand, None without; device: the one that figures are for, where its datasheet is known."""
    environment = {
        "versions": {**records.versions(), "python": platform.python_version()},
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "git": git_state(records.kernel_folder()),
    }
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Run(started, command, environment, datasheet=asdict(PEAKS[device]) if device in PEAKS else None)


def append(path: Path, run: Run, rows: list[Row]) -> None:
    """Adds a run to a file of results, which is made if it is not there."""
    found = results.load(path) if path.exists() else Results()
    number = len(found.runs)
    found.runs.append(run)
    found.rows += [replace(row, run=number) for row in rows]
    results.save(found, path)
