"""The report of a full verification: one JSON file and, written from it alone, one HTML page."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vit_bench.full.checks import Check
from vit_bench.full.page import page
from vit_bench.full.runner import BAD, NOT_RUN, STATUSES, Outcome

SCHEMA = 1


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def usable_path(path: Path) -> str:
    """Why a report cannot be written to `path` and the HTML beside it, "" if it can. Nothing is written."""
    if path.suffix != ".json":
        return f"{str(path)!r} must end in .json; the page is written beside it as .html"
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {str(folder)!r} does not exist"
    if not os.access(folder, os.W_OK):
        return f"the folder {str(folder)!r} cannot be written to"
    blocked = [p for p in (path, path.with_suffix(".html")) if p.exists() and not p.is_file()]
    return f"{str(blocked[0])!r} is not a file" if blocked else ""


def build(
    environment: dict[str, Any],
    checks: Sequence[Check],
    outcomes: Sequence[Outcome],
    *,
    started: str,
    ended: str | None,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """The report as plain values. Checks without an outcome yet count as not run, and the report as incomplete.

    ended: None while the verification runs, and for ever if it was interrupted; only: the patterns that chose checks.
    """
    known = {outcome.name for outcome in outcomes}
    waiting = [Outcome(c.name, c.rung, NOT_RUN, c.not_run or "not reached") for c in checks if c.name not in known]
    entries = [asdict(outcome) for outcome in (*outcomes, *waiting)]
    counts = {status: sum(entry["status"] == status for entry in entries) for status in STATUSES}
    return _plain(
        {
            "schema": SCHEMA,
            "complete": ended is not None,
            "started": started,
            "ended": ended,
            "only": list(only),
            "summary": counts,
            "verdict": "failed" if any(counts[status] for status in BAD) else "nothing failed",
            "environment": environment,
            "checks": entries,
        }
    )


def _plain(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def write(report: dict[str, Any], path: Path) -> None:
    """Writes the JSON file and the page beside it, each whole or not at all."""
    _replace(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    _replace(path.with_suffix(".html"), page(report))


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8", errors="replace")
    os.replace(new, path)
