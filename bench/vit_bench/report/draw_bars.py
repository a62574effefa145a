"""`Bars` and `Strips` as SVG."""

from __future__ import annotations

from dataclasses import replace

from vit_bench.report.figures import Bar, Bars, Part, Strips
from vit_bench.report.svg import SIZE, WIDE, drawing, line, rectangle, text, width_of

_ROW, _BAR, _GAP = 26, 15, 14


def bars(figure: Bars, width: int) -> str:
    """Names on the left, values behind the bars; on a phone both stand above the bar."""
    figure = single_bars(figure)
    every = [bar for _, group in figure.groups for bar in group]
    narrow = width < WIDE
    names = 0.0 if narrow else min(1.18 * max(width_of(bar.name) for bar in every) + 14, 0.3 * width)
    values = 0.0 if narrow else max(width_of(bar.label) for bar in every) + 12
    inside, y = [], 4.0
    for title, group in figure.groups:
        if title:
            inside.append(text(0, y + SIZE, title, kind="strong"))
            y += SIZE + 9
        most = max(max(bar.value, bar.high or 0, bar.limit or 0) for bar in group) or 1.0
        for bar in group:
            if narrow:
                inside.append(text(0, y + SIZE, bar.name, kind="strong" if bar.colour == 0 else ""))
                inside.append(text(width, y + SIZE, bar.label, "end", "value"))
                y += SIZE + 6
            inside += _bar(bar, names, y, (width - names - values) / most, figure)
            y += _ROW
        y += _GAP if title else 4
    y += _legend(figure, every, inside, y, width)
    return drawing(width, y, inside, f"{figure.title}: {figure.says}", "narrow" if narrow else "wide")


def single_bars(figure: Bars) -> Bars:
    """Groups of one bar each, all of one name: the groups' names are the bars'."""
    if len({bar.name for _, group in figure.groups for bar in group}) > 1 or any(len(g) > 1 for _, g in figure.groups):
        return figure
    named = tuple(("", tuple(replace(bar, name=title) for bar in group)) for title, group in figure.groups)
    return replace(figure, groups=named)


def _bar(bar: Bar, x: float, y: float, unit: float, figure: Bars) -> list[str]:
    end, middle = x + bar.value * unit, y + _BAR / 2
    hover = f"{bar.name}: {bar.label}"
    if bar.low is not None and bar.high is not None:
        hover += f" (20th to 80th percentile: {bar.low:,.4g} to {bar.high:,.4g} {figure.unit})"
    if bar.limit is not None:
        hover += f"; {figure.limit_name}: {bar.limit:,.4g} {figure.unit}"
    made = [text(x - 12, middle + 4.5, bar.name, "end", "strong" if bar.colour == 0 else "")] if x else []
    if bar.modelled:
        made.append(rectangle(x, y, bar.value * unit, _BAR, f"o{bar.colour}", hover))
        made.append(rectangle(x, y, bar.value * unit, _BAR, "hatch", hover))
    else:
        made.append(rectangle(x, y, bar.value * unit, _BAR, f"f{bar.colour}", hover))
    if bar.low is not None and bar.high is not None and (bar.high - bar.low) * unit >= 1.5:
        low, high = x + bar.low * unit, x + bar.high * unit
        made += [line(low, middle, high, middle, "spread")]
        made += [line(at, middle - 4, at, middle + 4, "spread") for at in (low, high)]
        end = max(end, high)
    if bar.limit is not None:
        at = x + bar.limit * unit
        made.append(line(at, y - 3, at, y + _BAR + 3, "limit"))
        if end + 8 + width_of(bar.label) + 8 > at:
            end = max(end, at)
    return [*made, text(end + 8, middle + 4.5, bar.label, kind="value")] if x else made


def _legend(figure: Bars, every: list[Bar], inside: list[str], y: float, width: int) -> float:
    """What the marks mean, as far as they occur; the height that it takes."""
    keys = []
    if any(bar.modelled for bar in every):
        keys.append(("hatched", "not measured"))
    if any(not bar.modelled for bar in every) and any(bar.modelled for bar in every):
        keys.append(("solid", "measured"))
    if any(bar.low is not None for bar in every):
        keys.append(("spread", "20th to 80th percentile"))
    if any(bar.limit is not None for bar in every):
        keys.append(("limit", figure.limit_name))
    x, top = 0.0, y
    for kind, words in keys:
        if x and x + 30 + width_of(words, 12) > width:
            x, y = 0.0, y + 20
        middle = y + 6
        if kind == "hatched":
            inside += [rectangle(x, y, 20, 12, "o0"), rectangle(x, y, 20, 12, "hatch")]
        elif kind == "solid":
            inside.append(rectangle(x, y, 20, 12, "f0"))
        elif kind == "spread":
            inside += [line(x, middle, x + 20, middle, "spread")]
            inside += [line(at, middle - 4, at, middle + 4, "spread") for at in (x, x + 20)]
        else:
            inside.append(line(x + 10, y - 2, x + 10, y + 14, "limit"))
        inside.append(text(x + 27, y + 10.5, words, kind="small"))
        x += 27 + width_of(words, 12) + 22
    return y - top + (22 if keys else 0)


def strips(figure: Strips, width: int) -> str:
    """Each strip under its label and total; parts are named inside where there is room, and below where not."""
    inside, y = [], 2.0
    for label, total, parts in figure.strips:
        inside.append(text(0, y + SIZE, label, kind="strong"))
        inside.append(text(width, y + SIZE, total, "end", "value"))
        y += SIZE + 8
        whole, x = sum(part.value for part in parts) or 1.0, 0.0
        for part in parts:
            long = width * part.value / whole
            inside.append(rectangle(x, y, long - (1 if long > 3 else 0), 30, f"f{part.colour}", part.hover))
            inside += _named(part, x, y, long, whole)
            x += long
        y += 30 + _GAP + 6
    y += _key(figure, inside, y - 6, width)
    return drawing(width, y, inside, f"{figure.title}: {figure.says}", "narrow" if width < WIDE else "wide")


def _named(part: Part, x: float, y: float, long: float, whole: float) -> list[str]:
    percent = f"{part.value / whole:.0%}"
    for words in (f"{part.name} {percent}", part.name):
        if width_of(words, 12) + 8 <= long:
            return [text(x + long / 2, y + 19.5, words, "middle", "on")]
    return []


def names_of_colours(figure: Strips) -> dict[int, str]:
    """All parts that have a colour: what lies outside of blocks shares one."""
    known = dict.fromkeys((part.name, part.colour) for _, _, parts in figure.strips for part in parts)
    names: dict[int, str] = {}
    for name, colour in known:
        names[colour] = f"{names[colour]}, {name}" if colour in names else name
    return names


def _key(figure: Strips, inside: list[str], y: float, width: int) -> float:
    """Colours and names of all parts; the height that it takes."""
    x, top = 0.0, y
    for colour, name in names_of_colours(figure).items():
        if x and x + 22 + width_of(name, 12) > width:
            x, y = 0.0, y + 20
        inside.append(rectangle(x, y, 12, 12, f"f{colour}"))
        inside.append(text(x + 18, y + 10.5, name, kind="small"))
        x += 18 + width_of(name, 12) + 18
    return y - top + 20
