"""The pieces of a drawing: text, scales, ticks, marks. Coordinates are CSS pixels, colours are classes of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

WIDE, NARROW = 960, 380  # two drawings of each figure: text must be readable on a phone, too
SIZE = 13  # of text
_MARKS = ("circle", "square", "triangle", "diamond")


def number(value: float) -> str:
    """A coordinate."""
    return f"{value:.1f}".removesuffix(".0")


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """A line of text whose baseline is at y. kind: classes of the style sheet."""
    chosen = f' class="{kind}"' if kind else ""
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{number(x)}" y="{number(y)}"{where}{chosen}>{escape(words)}</text>'


def width_of(words: str, size: float = SIZE) -> float:
    """About as wide as a text is: fonts differ, so a little more than most."""
    return size * sum(0.34 if c in "iljtf.,:;|!' ()" else 0.88 if c in "mwMW" else 0.58 for c in words)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    ends = " ".join(f'{name}="{number(v)}"' for name, v in (("x1", x1), ("y1", y1), ("x2", x2), ("y2", y2)))
    return f'<line {ends} class="{kind}"/>'


def rectangle(x: float, y: float, width: float, height: float, kind: str, hover: str = "") -> str:
    inside = f"<title>{escape(hover)}</title>" if hover else ""
    sizes = f'x="{number(x)}" y="{number(y)}" width="{number(max(width, 0))}" height="{number(height)}"'
    return f'<rect {sizes} class="{kind}">{inside}</rect>'


def polyline(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline points="{" ".join(f"{number(x)},{number(y)}" for x, y in points)}" class="{kind}"/>'


def mark(x: float, y: float, colour: int, hover: str, hollow: bool = False, radius: float = 4) -> str:
    """A point whose shape, too, tells series apart."""
    r, kind = radius, f"{'h' if hollow else 'f'}{colour}"
    title = f"<title>{escape(hover)}</title>"
    shape = _MARKS[colour % len(_MARKS)]
    if shape == "circle":
        return f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(r)}" class="{kind}">{title}</circle>'
    corners = {
        "square": ((-r, -r), (r, -r), (r, r), (-r, r)),
        "triangle": ((0, -1.25 * r), (1.15 * r, r), (-1.15 * r, r)),
        "diamond": ((0, -1.35 * r), (1.35 * r, 0), (0, 1.35 * r), (-1.35 * r, 0)),
    }[shape]
    points = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in corners)
    return f'<polygon points="{points}" class="{kind}">{title}</polygon>'


def drawing(width: int, height: float, inside: Sequence[str], label: str, kind: str) -> str:
    """An SVG element that screen readers call by `label`."""
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {number(height)}" role="img" aria-label="{escape(label)}">\n'
        + "\n".join(inside)
        + "\n</svg>"
    )


def scale(low: float, high: float, start: float, end: float, log: bool = False) -> Callable[[float], float]:
    """From [low, high] to [start, end]."""
    if log:
        low, high = math.log(low), math.log(high)
    span = (high - low) or 1.0
    return lambda value: start + ((math.log(value) if log else value) - low) / span * (end - start)


def steps(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high` or a little more, at most about `most` of them, at equal distances."""
    rough = (high - low) / max(most, 1) or 1.0
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [step * n for n in range(first, last + 1)]


def logarithmic(low: float, high: float, most: int) -> list[float]:
    """Powers of 10 in [low, high], with twice and five times those where they are at most `most` together."""
    powers = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    found: list[float] = []
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [power * factor for power in powers for factor in factors]
        found = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(found) <= most:
            break
    return found


def short(value: float) -> str:
    """A number for a tick: 0.5, 64, 1k (1024), 1,000, 50k (50,000)."""
    for unit, least in ((1024, 1024), (1000, 10_000)):
        if value >= least and value % unit == 0:
            return f"{value / unit:g}k"
    return f"{value:,.10g}"
