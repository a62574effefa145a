"""``vit-engine verify --full``: every check of `vit_bench.full` on this machine, a line each, and the report.

This process imports neither PyTorch nor a kernel: whatever happens to the GPU, the report is written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from .interrupt import INTERRUPTED, termination_as_interrupt

_STYLES = {"passed": "green", "failed": "bold red", "crashed": "bold red", "timed out": "bold red", "not run": "dim"}


def full_command(report: Path | None, only: Sequence[str], just_list: bool) -> int:
    """Runs the checks whose names match one of `only` (all of them for none); the exit code.

    A line is printed and the report is written after each of them. just_list: prints the names, and what keeps a check
    from running here, and runs nothing.
    """
    from vit_bench.full.checks import UNKNOWN, all_checks, select
    from vit_bench.full.environment import examine
    from vit_bench.full.report import now, usable_path

    if report is not None and (reason := usable_path(report)):
        raise typer.BadParameter(reason, param_hint="--report")
    try:
        select(all_checks(UNKNOWN), only)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from error
    started = now()
    facts, environment, gpu = examine()
    checks = select(all_checks(facts), only)
    if just_list:
        for check in checks:
            typer.echo(f"{check.name:<40} {f'not run: {check.not_run}' if check.not_run else check.rung}")
        return 0
    return _run(report, only, checks, environment, gpu, started)


def _run(
    path: Path | None, only: Sequence[str], checks: Sequence[Any], environment: dict[str, Any], gpu: Any, started: str
) -> int:
    from rich.console import Console

    from vit_bench.full.report import build, now, write
    from vit_bench.full.runner import run_all

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    outcomes = [gpu]

    def save(ended: str | None) -> dict[str, Any]:
        report = build(environment, checks, outcomes, started=started, ended=ended, only=only)
        if path is not None:
            write(report, path)
        return report

    _print_outcome(console, gpu, f"{'':>9}")
    interrupted = False
    save(None)
    try:
        with termination_as_interrupt():
            finished = run_all(checks)
            for number, check in enumerate(checks, 1):
                place = f"[{number}/{len(checks)}]"
                with console.status(f"{place} {check.name}"):
                    outcome = next(finished)
                outcomes.append(outcome)
                _print_outcome(console, outcome, f"{place:>9}")
                save(None)
    except KeyboardInterrupt:
        interrupted = True
    report = save(None if interrupted else now())
    _print_summary(console, report, path, interrupted)
    if interrupted:
        return INTERRUPTED
    return 1 if report["verdict"] == "failed" else 0


def _print_outcome(console: Any, outcome: Any, place: str) -> None:
    from rich.text import Text

    from vit_bench.full.headline import headline

    line = Text(f"{place} {outcome.name:<36} ")
    line.append(f"{outcome.status:<10}", style=_STYLES[outcome.status])
    rung = "" if outcome.status == "not run" else outcome.rung
    line.append(f"{outcome.seconds:>7.1f} s  {rung:<14}{' '.join(headline(asdict(outcome)).split())}")
    console.print(line, soft_wrap=True)


def _print_summary(console: Any, report: dict[str, Any], path: Path | None, interrupted: bool) -> None:
    from rich.text import Text

    counts = ", ".join(f"{count} {status}" for status, count in report["summary"].items() if count)
    console.print(Text(f"{'interrupted; ' if interrupted else ''}{counts}"), soft_wrap=True)
    if path is None:
        console.print("no report was asked for (--report FILE.json)")
    else:
        console.print(Text(f"report: {path} and {path.with_suffix('.html').name} beside it"), soft_wrap=True)
