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
_Kinds = dict[tuple[str, ...], dict[str, Row]]  # of a run: rows by what they are about, then by kind


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
    compiled before and not run after, or modelled before and compiled without a model after; apart: measured in one run
    and compiled in the other, which says nothing of speed."""

    changes: list[Change]
    only_before: list[Row]
    only_after: list[Row]
    gone: list[tuple[Row, Row]]
    apart: list[tuple[Row, Row]]

    @property
    def regressions(self) -> list[Change]:
        """Those of ours that became slower. A baseline that did says something of the machine."""
        return [change for change in self.changes if change.verdict == "slower" and is_ours(change.before)]

    @property
    def failed(self) -> bool:
        """Also where nobody can say whether something of ours became slower: a gate that sees nothing must not open."""
        return bool(self.regressions) or any(is_ours(before) for before, _ in (*self.gone, *self.apart))


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
    """None where neither both are measured nor both are modelled, or bounded by datasheet alone."""
    old, new = before.seconds, after.seconds
    if old is not None and new is not None:
        ratio = new.median / old.median
        beside = verdict(new, old)
        found = "same" if beside == "within the noise" or abs(ratio - 1) <= LEAST else beside
        return Change(before, after, ratio, new.p20 / old.p80, new.p80 / old.p20, "measured", found)
    if before.source == after.source == "compiled":
        first, second = compiled_times(before, after)
        if not first or not second:
            return None
        ratio = second / first
        if _spilled(after) > _spilled(before):
            why = f"spills {_spilled(after)} bytes per thread, {_spilled(before)} before"
            return Change(before, after, ratio, ratio, ratio, "modelled", "slower", why)
        found = "same" if abs(ratio - 1) < 1e-9 else "slower" if ratio > 1 else "faster"
        return Change(before, after, ratio, ratio, ratio, "modelled", found)
    return None


def compiled_times(before: Row, after: Row) -> tuple[float | None, float | None]:
    """Modelled times, or bounds where the first has no model: a bound is less than a modelled time, and one beside the
    other would be a speed-up that nobody made."""
    if before.modelled_s is not None:
        return before.modelled_s, after.modelled_s
    return before.bound_s, after.bound_s


def _lost(before: Row, after: Row) -> bool:
    """Whether compiled code had a modelled time, or a bound, and has none any more."""
    first, second = compiled_times(before, after)
    return before.source == after.source == "compiled" and first is not None and second is None


def compare(before: list[Row], after: list[Row]) -> Comparison:
    """Rows of two runs, paired by what they are about (`Row.key`) and by whether they were measured or compiled; of
    several that are alike in both the last counts.

    Raises ValueError when no row of one is about the same thing as one of the other: then the runs show nothing.
    """
    old, new = _latest(before), _latest(after)
    changes, gone, apart = [], [], []
    for key, kinds in old.items():
        others = new.get(key, {})
        pairs = [(kinds[kind], others[kind]) for kind in kinds if kind in others]
        changes += [found for pair in pairs if (found := change(*pair)) is not None]
        gone += [pair for pair in pairs if _lost(*pair)]
        if others and not pairs:
            one, other = next(iter(kinds.values())), next(iter(others.values()))
            if other.source == "not run":
                gone.append((one, other))
            elif one.source != "not run":
                apart.append((one, other))
    if not changes and not gone and not apart:
        raise ValueError("no case, contender, device and dtype was measured or compiled in both")
    return Comparison(changes, _only(old, new), _only(new, old), gone, apart)


def _latest(rows: list[Row]) -> _Kinds:
    """By key the latest row of each kind. A GPU's name is also that of compiled rows: what was compiled for it later
    must not hide what was measured on it, nor the other way round. What could not be run any more hides both."""
    found: _Kinds = {}
    for row in rows:
        kind = {"not run": "not run", "compiled": "compiled"}.get(row.source, "measured")
        kinds = found.setdefault(row.key, {})
        for other in list(kinds) if kind == "not run" else ["not run"]:
            kinds.pop(other, None)
        kinds[kind] = row
    return found


def _only(one: _Kinds, other: _Kinds) -> list[Row]:
    """Rows of one run that the other has nothing of the kind for; not those that are `gone` or `apart`."""
    return [
        row
        for key, kinds in one.items()
        for kind, row in kinds.items()
        if kind not in other.get(key, {}) and (key not in other or kinds.keys() & other[key].keys())
    ]
