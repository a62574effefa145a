"""What figures are made from: the latest row of everything, who is who, and how values are put in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vit_bench.profiling.times import evidence_of, seconds_of
from vit_bench.report.figures import Figure
from vit_bench.results import OURS, Results, Row

FIRST_MODEL = "vit_base_patch16_224"  # stands first and open where there are several
COLOURS = 7


@dataclass(frozen=True)
class Table:
    """numbers: the columns that are set to the right."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Item:
    """A figure with its values as a table; either may be missing. folded: shown when asked for."""

    title: str
    figure: Figure | None = None
    table: Table | None = None
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    items: tuple[Item, ...]
    intro: str = ""


_STRENGTH = {"not run": 0, "compiled": 1, "cpu": 2, "gpu": 2}


def _best(rows: Iterable[Row]) -> list[Row]:
    """Of each key the latest row. What could not be run again, or was compiled for the same GPU later, is no reason to
    forget what was measured before."""
    latest: dict[Any, Row] = {}
    for row in rows:
        kept = latest.get(row.key)
        if kept is None or _STRENGTH[row.source] >= _STRENGTH[kept.source]:
            latest[row.key] = row
    return list(latest.values())


@dataclass
class Book:
    """All results together. rows: of each key the latest of the best evidence; passes: the same of those forward passes
    that know their launches, which a benchmark that measures whole passes does not; colours: of contenders, ours 0."""

    results: Results
    rows: list[Row] = field(default_factory=list)
    passes: list[Row] = field(default_factory=list)
    colours: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = _best(self.results.rows)
        known = (row for row in self.results.rows if row.suite == "model" and len(kernels_of(row)) > 1)
        self.passes = _best(known)
        others = [name for name in dict.fromkeys(row.contender for row in self.rows) if name != OURS]
        self.colours = {OURS: 0} | {name: 1 + number % (COLOURS - 1) for number, name in enumerate(others)}

    def groups(self, suite: str, *by: str) -> list[tuple[tuple[Any, ...], list[Row]]]:
        """Rows of a suite that have a time, by these fields.

        Those of GPUs come first, measured before modelled, and the first model before others.
        """
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            if row.suite == suite and seconds_of(row) is not None:
                found.setdefault(tuple(getattr(row, name) for name in by), []).append(row)
        return sorted(found.items(), key=lambda item: (rank(item[1]), FIRST_MODEL not in item[0]))


_RANKS = ("gpu", "compiled", "cpu", "not run")


def rank(rows: Sequence[Row]) -> int:
    """Of the best evidence about a GPU among these."""
    return min(_RANKS.index(row.source) for row in rows)


def merged(several: Iterable[Results]) -> Results:
    """Several files as one, earlier runs first."""
    whole = Results()
    runs = [(run, results, number) for results in several for number, run in enumerate(results.runs)]
    for run, results, number in sorted(runs, key=lambda item: item[0].started):
        whole.rows += [replace(row, run=len(whole.runs)) for row in results.rows if row.run == number]
        whole.runs.append(run)
    return whole


def evidence(rows: Sequence[Row]) -> str:
    """On what figures of these rows rest, and on which devices."""
    devices: dict[str, dict[str, None]] = {}
    for row in rows:
        devices.setdefault(evidence_of(row), {})[row.device] = None
    named = {kind: ", ".join(found) for kind, found in devices.items()}
    if "measured" in named:
        rest = {"modelled": "the rest modelled for {}", "bound": "the rest bound of {} by datasheet"}
    else:
        rest = {
            "modelled": "modelled for {}, nothing was timed",
            "bound": "bound of {} by datasheet, nothing was timed",
        }
    words = {"measured": "measured on {}", **rest}
    return "; ".join(said.format(named[kind]) for kind, said in words.items() if kind in named)


def all_measured(said: str) -> bool:
    """Whether words of evidence say that every value was measured, and none of "the rest"."""
    return said.startswith("measured") and "; the rest " not in said


def kernels_of(row: Row) -> list[dict[str, Any]]:
    """The kernels of a row that have a time, each with "s": measured, or modelled and at least the bound."""
    found = []
    for one in row.code.get("kernels", ()):
        known = [one[name] for name in ("modelled_s", "bound_s") if one.get(name) is not None]
        seconds = one.get("seconds", max(known) if known else None)
        if seconds:
            found.append({**one, "s": seconds})
    return found


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
