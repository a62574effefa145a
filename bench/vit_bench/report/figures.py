"""Figures as data: what is drawn, before anybody says how. The page draws them as SVG, papers get matplotlib's.

Every figure says on what its values rest: `evidence`, such as "measured on H100 SXM" or "modelled for H100 SXM, nothing
was timed". `says` is one sentence about what is to be seen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """value: its length; low, high: 20th and 80th percentile; limit: what bounds it; label: its value in words."""

    name: str
    value: float
    label: str
    colour: int
    modelled: bool = False
    low: float | None = None
    high: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Bars:
    """Horizontal bars in groups; the bars of a group share a scale that starts at 0. name: for files."""

    name: str
    title: str
    says: str
    evidence: str
    unit: str
    limit_name: str
    groups: tuple[tuple[str, tuple[Bar, ...]], ...]


@dataclass(frozen=True)
class Axis:
    """label: with the unit; log: logarithmic; ticks: values that get a number, by themselves if there are none."""

    label: str
    log: bool = False
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Dot:
    """One point. label: what is written beside it, if anything; hover: its values in words."""

    x: float
    y: float
    hover: str
    label: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """kind: "line" with marks, "marks" alone, or "limit", a thin line that bounds the others."""

    name: str
    dots: tuple[Dot, ...]
    colour: int
    kind: str = "line"
    hollow: bool = False


@dataclass(frozen=True)
class Curves:
    """Lines and marks over two axes."""

    name: str
    title: str
    says: str
    evidence: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Part:
    name: str
    value: float
    hover: str
    colour: int


@dataclass(frozen=True)
class Strips:
    """Rows that are cut into parts, each to its own scale, one after the other. total: a row's whole in words."""

    name: str
    title: str
    says: str
    evidence: str
    strips: tuple[tuple[str, str, tuple[Part, ...]], ...]


Figure = Bars | Curves | Strips
