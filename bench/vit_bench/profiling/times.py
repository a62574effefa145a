"""The time of a row of results, and in which words to speak of it."""

from __future__ import annotations

from vit_bench.results import Row


def seconds_of(row: Row) -> float | None:
    """The measured median; without one the modelled time, at least the bound; None for a row without any of them."""
    if row.seconds is not None:
        return row.seconds.median
    known = [seconds for seconds in (row.modelled_s, row.bound_s) if seconds is not None]
    return max(known) if known else None


def evidence_of(row: Row) -> str:
    """One of "measured", "modelled", "bound" (by datasheet alone) or "not run"."""
    if row.seconds is not None:
        return "measured"
    if row.source == "compiled" and seconds_of(row) is not None:
        return "bound" if row.modelled_s is None else "modelled"
    return "not run"
