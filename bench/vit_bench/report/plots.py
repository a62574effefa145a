"""The figures of a report by matplotlib, as PNG and SVG for papers: light, one file each, their evidence in the title.

matplotlib is an optional dependency: pip install "vit-engine[plots]".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

from vit_bench.report.data import Book
from vit_bench.report.draw_bars import names_of_colours, single_bars
from vit_bench.report.draw_curves import Box, along, free_place
from vit_bench.report.figures import Bars, Curves, Dot, Figure, Line, Strips
from vit_bench.report.sections import figures
from vit_bench.report.style import DIM, GRID, INK, LIGHT, PAPER
from vit_bench.report.svg import logarithmic, short
from vit_bench.results import Results

_MARKS = ("o", "s", "^", "D")
_SMALL = 7  # points
_KEY = 40  # characters in a line of the names of one colour
_SETTINGS: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    "svg.hashsalt": "vit-engine",  # the same plot is the same file
    "svg.fonttype": "none",
    "font.size": 9,
    "text.parse_math": False,  # names come from files
    "text.color": INK,
    "axes.edgecolor": DIM,
    "axes.labelcolor": DIM,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "hatch.linewidth": 0.8,
}


def write_plots(results: Results, folder: Path) -> Iterator[Path]:
    """Writes NAME.png and NAME.svg of every figure into the folder, which is made; yields what it has written.

    Raises ModuleNotFoundError without matplotlib.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_SETTINGS):
        for figure in figures(Book(results)):
            yield from _written(figure, folder)


def _written(figure: Figure, folder: Path) -> Iterator[Path]:
    from matplotlib.figure import Figure as Canvas

    high = {Bars: 1.2 + 0.34 * _bars_in(figure), Strips: 1.1 + 0.55 * _strips_in(figure)}.get(type(figure), 3.4)
    canvas = Canvas(figsize=(6.4, high), layout="constrained")
    axes = canvas.add_subplot()
    if isinstance(figure, Bars):
        _bars(axes, single_bars(figure))
    elif isinstance(figure, Curves):
        _curves(axes, figure)
    else:
        _strips(axes, figure)
    canvas.suptitle(figure.title, x=0.01, ha="left", fontweight="bold", fontsize=10)
    axes.set_title(figure.evidence, loc="left", color=DIM, fontsize=8)
    name = re.sub(r"[^A-Za-z0-9]+", "-", figure.name).strip("-").lower()
    for kind in ("png", "svg"):
        path = folder / f"{name}.{kind}"
        canvas.savefig(path, metadata={"Date": None} if kind == "svg" else None)
        yield path


def _bars_in(figure: Figure) -> int:
    return sum(len(group) + 1 for _, group in figure.groups) if isinstance(figure, Bars) else 0


def _strips_in(figure: Figure) -> int:
    return len(figure.strips) if isinstance(figure, Strips) else 0


def _bars(axes: Any, figure: Bars) -> None:
    """Each group to its own scale, as on the page: lengths are shares of the group's longest."""
    names, place = [], 0.0
    for title, group in figure.groups:
        most = max(max(bar.value, bar.high or 0, bar.limit or 0) for bar in group) or 1.0
        if title:
            names.append((place, title))
            place += 0.8
        for bar in group:
            look: dict[str, Any] = {"color": LIGHT[bar.colour]}
            if bar.modelled:
                look = {"facecolor": "white", "edgecolor": LIGHT[bar.colour], "hatch": "////"}
            axes.barh(place, bar.value / most, height=0.62, **look)
            end = bar.value
            if bar.low is not None and bar.high is not None:
                spread = [[(bar.value - bar.low) / most], [(bar.high - bar.value) / most]]
                axes.errorbar(bar.value / most, place, xerr=spread, color=INK, capsize=2, lw=1)
                end = max(end, bar.high)
            if bar.limit is not None:
                axes.plot([bar.limit / most] * 2, [place - 0.42, place + 0.42], color=INK, lw=1.6)
                end = max(end, bar.limit)
            axes.text(end / most + 0.015, place, bar.label, va="center", fontsize=8)
            names.append((place, bar.name))
            place += 1
        place += 0.3 if title else 0
    axes.set_yticks([at for at, _ in names], [name for _, name in names])
    titles = {title for title, _ in figure.groups if title}
    for (_, name), tick in zip(names, axes.get_yticklabels(), strict=True):
        tick.set_fontweight("bold" if name in titles else "normal")
        tick.set_color(INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(left=False)
    keys = [f"| {figure.limit_name}"] if any(bar.limit for _, group in figure.groups for bar in group) else []
    keys += ["hatched: not measured"] if any(bar.modelled for _, group in figure.groups for bar in group) else []
    axes.set_xlabel("; ".join([f"{figure.unit}, each batch size to its own scale", *keys]), fontsize=8)


def _curves(axes: Any, figure: Curves) -> None:
    for one in figure.lines:
        _line(axes, one)
    if figure.x.log:
        axes.set_xscale("log")
    if figure.y.log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    for axis, log in ((axes.xaxis, figure.x.log), (axes.yaxis, figure.y.log)):
        if log:
            _numbered(axis)
    if figure.x.ticks:
        ticks = figure.x.ticks if len(figure.x.ticks) < 12 else figure.x.ticks[::2]
        axes.set_xticks(ticks, [short(tick) for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(figure.x.label)
    axes.set_ylabel(figure.y.label)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    _labels(axes, figure)


def _numbered(axis: Any) -> None:
    """Numbers of a logarithmic axis as on the page: matplotlib's own are formulas, which are off (see `_SETTINGS`)."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    axis.set_major_locator(FixedLocator(logarithmic(*sorted(axis.get_view_interval()), most=8)))
    axis.set_major_formatter(lambda value, _: short(value))
    axis.set_minor_formatter(NullFormatter())


def _labels(axes: Any, figure: Curves) -> None:
    """Placed as on the page, in pixels from the drawing's upper left corner."""
    canvas = axes.figure
    canvas.draw_without_rendering()
    height, box = canvas.bbox.height, axes.get_window_extent()

    def place(dot: Dot) -> tuple[float, float]:
        x, y = axes.transData.transform((dot.x, dot.y))
        return x, height - y

    taken: list[Box] = []
    for one in figure.lines:
        places = [place(dot) for dot in one.dots]
        taken += along(places) if one.kind != "marks" else [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    room = box.x0, height - box.y1, box.x1
    point = canvas.dpi / 72  # in pixels
    for dot in (dot for one in figure.lines for dot in one.dots if dot.label):
        x, y = place(dot)
        found = free_place(dot.label, x, y, room, taken, size=_SMALL * point)
        if found is not None:
            offset = ((found[0] - x) / point, (y - found[1]) / point)
            axes.annotate(dot.label, (dot.x, dot.y), xytext=offset, textcoords="offset points", fontsize=_SMALL)


def _line(axes: Any, one: Line) -> None:
    x, y = [dot.x for dot in one.dots], [dot.y for dot in one.dots]
    if one.kind == "limit":
        axes.plot(x, y, "--", color=DIM, lw=1, label=one.name)
        return
    colour = LIGHT[one.colour]
    look = {"marker": _MARKS[one.colour % len(_MARKS)], "color": colour, "markersize": 4.5, "label": one.name}
    axes.plot(x, y, ls="-" if one.kind == "line" else "", markerfacecolor=PAPER if one.hollow else colour, **look)
    for dot in one.dots:
        if dot.low is not None and dot.high is not None:
            axes.plot([dot.x, dot.x], [dot.low, dot.high], color=colour, lw=1)


def _strips(axes: Any, figure: Strips) -> None:
    names = names_of_colours(figure)
    for place, (_, total, parts) in enumerate(figure.strips):
        whole, at = sum(part.value for part in parts) or 1.0, 0.0
        for part in parts:
            share = part.value / whole
            named = names.pop(part.colour, None)  # once
            label = None if named is None else fill(named, _KEY)
            axes.barh(
                place, share, left=at, height=0.6, color=LIGHT[part.colour], edgecolor="white", lw=0.4, label=label
            )
            if share > 0.08:
                axes.text(at + share / 2, place, f"{share:.0%}", ha="center", va="center", color="white", fontsize=8)
            at += share
        axes.text(1.01, place, total, va="center", fontsize=8)
    axes.set_yticks(range(len(figure.strips)), [label for label, _, _ in figure.strips])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(left=False)
    columns = 6 if all(len(name) < _KEY for name in names_of_colours(figure).values()) else 3
    axes.legend(frameon=False, fontsize=8, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.02))
