"""A check's figures in one line, for the terminal and for the page."""

from __future__ import annotations

from typing import Any


def headline(check: dict[str, Any]) -> str:
    """The reason of a check that did not pass; otherwise the figures that say most about it."""
    if check["status"] != "passed":
        return check["reason"]
    parts = [part for part in check["parts"] if part["status"] == "passed"]
    figures = [part["figures"] for part in parts if part["figures"]]
    if not figures:
        return ", ".join(part["name"] for part in parts)
    judged = [f for f in figures if f.get("row") is not None and f.get("row_allowed")]
    if judged:
        closest = max(judged, key=lambda f: f["row"] / f["row_allowed"])
        count = f"{len(judged)} comparisons, " if len(judged) > 1 else ""
        return f"{count}worst row error {closest['row']:.1e} of {closest['row_allowed']:.1e} allowed"
    if "throughput" in figures[0]:
        rates = figures[0]["throughput"]
        return ", ".join(f"{name} {rate['images_per_second']:,.0f} images/s" for name, rate in rates.items())
    if "variants" in figures[0]:
        spilled = max(f["stack_bytes"] for f in figures)
        return f"{sum(f['variants'] for f in figures)} kernel variants compiled, {spilled} bytes spilled"
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in figures[0].items())
