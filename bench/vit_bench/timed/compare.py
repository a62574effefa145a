"""Two runs of the same cases side by side: what became slower, and what only looks so."""

from __future__ import annotations

from dataclasses import dataclass

from vit_bench.results import OURS, Results, Row
from vit_bench.timed.timing import verdict

# Two processes differ by more than the spread inside either of them: clocks, memory layout, neighbours.
LEAST = 0.03  # of a measured time: a smaller change is none
RULE = (
    "A measured time is a regression where the ranges from the 20th to the 80th percentile do not overlap and the "
    f"median grew by more than {LEAST:.0%}; a modelled time where it grew at all, or where registers began to spill."
)


@dataclass(frozen=True)
class Change:
    """One thing that both runs have. ratio: after over before, of medians or of modelled times; lowest, highest: what
    the spreads allow it to be; kind: "measured" or "modelled"; verdict: "slower", "faster" or "same"; why: of a verdict
    that the times alone do not give."""

    before: Row
    after: Row
    ratio: float
    lowest: float
    highest: float
    kind: str
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """changes: in the order of the first run; only_before, only_after: rows of one run alone; gone: measured or
    compiled before and not run after."""

    changes: list[Change]
    only_before: list[Row]
    only_after: list[Row]
    gone: list[tuple[Row, Row]]

    @property
    def regressions(self) -> list[Change]:
        """Those of ours that became slower. A baseline that did says something of the machine."""
        return [change for change in self.changes if change.verdict == "slower" and is_ours(change.before)]

    @property
    def failed(self) -> bool:
        return bool(self.regressions) or any(is_ours(before) for before, _ in self.gone)


def is_ours(row: Row) -> bool:
    return row.contender.split(",")[0] == OURS


def rows_of(results: Results, run: int | None = None) -> list[Row]:
    """The rows of a run of the file, -1 being the last; of all runs for None: `compare` takes the latest.

    Raises ValueError for a number that no run has, and where there are no rows at all.
    """
    if run is None:
        if not results.rows:
            raise ValueError("it has no rows")
        return results.rows
    count = len(results.runs)
    if not -count <= run < count:
        raise ValueError(f"it has {count} runs, so run must be from {-count} to {count - 1}; got {run}")
    return [row for row in results.rows if row.run == run % count]


def _spilled(row: Row) -> int:
    return sum(kernel.get("spilled_bytes", 0) for kernel in row.code.get("kernels", ()))


def change(before: Row, after: Row) -> Change | None:
    """None where neither both are measured nor both are modelled."""
    old, new = before.seconds, after.seconds
    if old is not None and new is not None:
        ratio = new.median / old.median
        beside = verdict(new, old)
        found = "same" if beside == "within the noise" or abs(ratio - 1) <= LEAST else beside
        return Change(before, after, ratio, new.p20 / old.p80, new.p80 / old.p20, "measured", found)
    if before.source == after.source == "compiled":
        first, second = before.modelled_s or before.bound_s, after.modelled_s or after.bound_s
        if not first or not second:
            return None
        ratio = second / first
        if _spilled(after) > _spilled(before):
            why = f"spills {_spilled(after)} bytes per thread, {_spilled(before)} before"
            return Change(before, after, ratio, ratio, ratio, "modelled", "slower", why)
        found = "same" if abs(ratio - 1) < 1e-9 else "slower" if ratio > 1 else "faster"
        return Change(before, after, ratio, ratio, ratio, "modelled", found)
    return None


def compare(before: list[Row], after: list[Row]) -> Comparison:
    """Rows of two runs, paired by what they are about (`Row.key`); of several about the same thing the last counts.

    Raises ValueError when no row of one is about the same thing as one of the other: then the runs show nothing.
    """
    old, new = ({row.key: row for row in rows} for rows in (before, after))
    pairs = [(row, new[key]) for key, row in old.items() if key in new]
    changes = [found for one, other in pairs if (found := change(one, other)) is not None]
    gone = [(one, other) for one, other in pairs if one.source != "not run" and other.source == "not run"]
    if not changes and not gone:
        raise ValueError("no case, contender, device and dtype was measured or compiled in both")
    return Comparison(
        changes,
        [row for key, row in old.items() if key not in new],
        [row for key, row in new.items() if key not in old],
        gone,
    )
