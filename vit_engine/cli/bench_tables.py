"""What `vit-engine bench` prints: a block of lines per case as soon as it is done, and comparisons of two runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .tables import plain_console

if TYPE_CHECKING:
    from rich.console import Console

    from vit_bench.results import Results, Row
    from vit_bench.timed.compare import Change
    from vit_bench.timed.runner import Job
    from vit_bench.timed.shapes import Case


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.2f} us"


class Lines:
    """Shows how far a run is, and the rows of each case once they are there."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = plain_console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=None)
        self._results: Results | None = None

    def shown(self) -> Any:
        return self._bar

    def header(self, results: Results, run: int, job: Job, is_compiled: bool) -> None:
        from vit_bench.timed.timing import NOISE_RULE

        self._results = results
        label, count = job.measures.label, len(job.steps)
        cases = f"{count} case{'s' * (count != 1)}"
        if is_compiled:
            from vit_bench.modelled import how_far_off
            from vit_bench.recording import gpu

            self._print(f"{cases} compiled for {label}. No GPU is used and nothing is timed: bounds come from")
            self._print("datasheets, modelled times from the model by which tiles are chosen.")
            if known := how_far_off(gpu(label)):
                self._print(known)
            return
        self._print(f"{cases} measured on {label}, each contender's result compared with the reference first.")
        self._print(NOISE_RULE)
        ceilings = results.runs[run].ceilings
        if ceilings is not None:
            rates = ", ".join(f"matmul {name} {rate / 1e12:.3g} TFLOP/s" for name, rate in ceilings.matmul.items())
            self._print(f"Reached here by a large copy {ceilings.copy / 1e9:.4g} GB/s, by a large {rates}.")

    def started(self, case: Case, dtype: str, number: int, count: int) -> None:
        self._bar.update(self._task, description=f"{case}, {dtype}", completed=number - 1, total=count)

    def done(self, rows: Sequence[Row]) -> None:
        from vit_bench.results import OURS

        assert self._results is not None
        first = rows[0]
        source = {"gpu": "measured", "cpu": "measured", "compiled": "compiled only, modelled"}
        kinds = {source[row.source] for row in rows if row.source in source}
        how = " and ".join(sorted(kinds)) or "not run"
        self._print(f"\n{first.case}, {first.dtype}, {first.device}: {how}", style="bold")
        ours = next((row for row in rows if row.contender == OURS and row.seconds), None)
        for row in rows:
            if row.seconds is not None:
                self._print("  " + _measured(row, self._results.shares(row), ours))
            elif row.source == "compiled":
                for line in _compiled(row):
                    self._print("  " + line)
            elif row.contender == OURS:
                self._print(f"  {row.contender:<24} not run: {row.reason}")
        if ours is not None and ours.state:
            state = ", ".join(f"{name} {value}" for name, value in ours.state.items())
            self._print(f"  read by nvidia-smi while ours ran: {state}")

    def _print(self, text: str, style: str = "") -> None:
        from rich.text import Text

        self.console.print(Text(text, style=style), soft_wrap=True)


def _measured(row: Row, shares: dict[str, float], ours: Row | None) -> str:
    """One contender: time and spread, rates, shares of what the machine reaches, memory, and what ours is beside it."""
    from vit_bench.timed.timing import verdict

    spread = row.seconds
    assert spread is not None
    parts = [f"{row.contender:<24} {_seconds(spread.median)} ({_seconds(spread.p20)} to {_seconds(spread.p80)})"]
    if images := row.per_second(row.images):
        parts.append(f"{images:,.1f} images/s")
    if flops := row.per_second(row.flops):
        parts.append(f"{flops / 1e12:.3g} TFLOP/s")
    shown = {"measured flops": "of matmul", "datasheet flops": "of datasheet"}
    if row.suite != "model" and (data := row.per_second(row.nbytes)):
        parts.append(f"{data / 1e9:.4g} GB/s")
        shown |= {"measured bytes": "of copy", "datasheet bytes": "of datasheet's bandwidth"}
    parts += [f"{shares[name]:.0%} {text}" for name, text in shown.items() if name in shares]
    if row.sustained is not None:
        parts.append(f"without a pause {_seconds(row.sustained.seconds)} at {row.sustained.clock / 1e9:.2f} GHz")
    if row.peak_bytes is not None:
        parts.append(f"{row.peak_bytes / 1e6:.1f} MB")
    if row.launches:
        parts.append(f"{row.launches} launches")
    if ours is not None and ours is not row and ours.seconds is not None:
        ratio = ours.seconds.median / spread.median
        parts.append(f"ours takes {ratio:.3f} of its time: {verdict(ours.seconds, spread)}")
    return ", ".join(parts)


def _compiled(row: Row) -> list[str]:
    lines = []
    for kernel in row.code["kernels"]:
        tile = "x".join(str(size) for size in kernel["tile"].values())
        slots = "" if kernel["epilogue_slots"] is None else f", epilogue {kernel['epilogue_slots']:.1f} slots/output"
        modelled = "no model" if kernel["modelled_s"] is None else f"modelled {_seconds(kernel['modelled_s'])}"
        shared = f"{kernel['shared'] / 1024:.0f} of {kernel['shared_limit'] / 1024:.0f} KiB shared"
        code = f"{kernel['registers']} registers, {kernel['spilled_bytes']} B spilled, {shared}{slots}"
        bound = f"bound {_seconds(kernel['bound_s'])} ({kernel['bound']})"
        what = f"{kernel['kernel']} {tile}, {kernel['warps']} warps"
        lines.append(f"{kernel['launch']:<24} {what}: {code}; {bound}, {modelled}")
    if row.suite == "model":
        modelled = "no model" if row.modelled_s is None else f"modelled {_seconds(row.modelled_s)}"
        peak = "" if row.peak_bytes is None else f", {row.peak_bytes / 1e6:.1f} MB of activations at most (recorded)"
        lines.append(f"{'forward':<24} {row.launches} launches; bound {_seconds(row.bound_s or 0)}, {modelled}{peak}")
        lines += _traffic(row.code["block"])
    return lines


def _traffic(block: dict[str, Any]) -> list[str]:
    ours, eager = block["ours"], block["eager"]
    ours_moved = f"{ours['activations']:.2f} D elements of activations per token, {ours['weight_bytes'] / 1e6:.1f} MB"
    eager_moved = f"{eager['activations']:.2f} D, {eager['weight_bytes'] / 1e6:.1f} MB"
    counted = "counted on meta tensors; copies inside operators are left out"
    lines = [
        f"{'one block, ours':<24} {ours['launches']} launches, {ours_moved} of weights (recorded launches)",
        f"{'one block, eager':<24} {eager['operators']} operators, {eager_moved} ({counted})",
    ]
    for name, quoted in block["quoted"].items():
        figures = f"{quoted['launches']} launches, {quoted['activations']:.0f} D"
        lines.append(f"{'one block, ' + name:<24} {figures} (quoted for {quoted['quoted for']})")
    return lines


def print_not_run(console: Console, rows: Sequence[Row]) -> None:
    """Who was not run and why, one line per contender and reason."""
    from rich.text import Text

    why: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.source == "not run":
            why.setdefault((row.contender, row.reason), []).append(row.case)
    if why:
        console.print()
    for (contender, reason), cases in why.items():
        count = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        console.print(Text(f"not run: {contender} ({count}): {reason}"), soft_wrap=True)


def compare_command(first: str, second: str) -> int:
    """Prints what changed from one run to another; 1 if something of ours became slower, 2 for unusable files."""
    from vit_bench.timed.compare import RULE, compare

    try:
        before, after = _rows(first), _rows(second)
        found = compare(before, after)
    except ValueError as error:
        typer.echo(f"vit-engine bench --compare: {error}", err=True)
        return 2
    typer.echo(f"{first} -> {second}, ratio: after over before. {RULE}\n")
    for change in found.changes:
        typer.echo(_changed(change))
    typer.echo("")
    for change in found.regressions:
        why = f": {change.why}" if change.why else ""
        typer.echo(f"regression: {change.before.case}, {change.before.contender}, {change.ratio:.3f}{why}")
    for row, other in found.gone:
        if other.source == "not run":
            typer.echo(f"not run any more: {row.case}, {row.contender}: {other.reason}")
        else:
            typer.echo(f"gone: {row.case}, {row.contender}: the first has a modelled time or bound, the second has not")
    for row, other in found.apart:
        sources = f"{_said(row)} in the first, {_said(other)} in the second"
        typer.echo(f"cannot be compared: {row.case}, {row.contender}: {sources}")
    for rows, where in ((found.only_before, "first"), (found.only_after, "second")):
        if rows:
            typer.echo(f"only in the {where}: {len(rows)} rows")
    typer.echo(f"{len(found.changes)} compared, {len(found.regressions)} regressions of ours")
    return 1 if found.failed else 0


def _rows(name: str) -> list[Row]:
    """The rows that FILE or FILE#RUN names; ValueError with the file in it."""
    from vit_bench.results import load
    from vit_bench.timed.compare import rows_of

    path, run = name, ""
    if "#" in name and not Path(name).exists():
        path, _, run = name.rpartition("#")
    try:
        return rows_of(load(Path(path)), _number(run) if run else None)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(path) else f"{path}: {error}") from error


def _number(run: str) -> int:
    try:
        return int(run)
    except ValueError:
        raise ValueError(f"run must be a number, such as 0 or -1; got {run!r}") from None


def _said(row: Row) -> str:
    return "compiled" if row.source == "compiled" else "measured"


def _changed(change: Change) -> str:
    from vit_bench.timed.compare import compiled_times

    before, after = change.before, change.after
    times = (row.seconds.median if row.seconds is not None else None for row in (before, after))
    first, second = times if change.kind == "measured" else compiled_times(before, after)
    assert first is not None and second is not None
    spread = f" ({change.lowest:.3f} to {change.highest:.3f})" if change.kind == "measured" else ""
    found = f"{change.kind}, {change.verdict}" + (f": {change.why}" if change.why else "")
    shown = f"{_seconds(first)} -> {_seconds(second)}, {change.ratio:.3f}{spread}, {found}"
    return f"{before.case}, {before.contender}, {before.dtype}: {shown}"
