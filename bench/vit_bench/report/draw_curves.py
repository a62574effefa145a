"""`Curves` as SVG: axes, lines, marks, and labels that keep out of each other's way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from vit_bench.report.figures import Axis, Curves, Line
from vit_bench.report.svg import (
    SIZE,
    WIDE,
    drawing,
    line,
    logarithmic,
    mark,
    polyline,
    scale,
    short,
    steps,
    text,
    width_of,
)

_LEFT, _TOP, _BOTTOM = 46, 30, 46
Box = tuple[float, float, float, float]  # left, top, right, bottom
Scale = Callable[[float], float]


def curves(figure: Curves, width: int) -> str:
    narrow = width < WIDE
    height = 330 if narrow else 430
    dots = [dot for one in figure.lines for dot in one.dots]
    right = width - (12 if narrow else _room(figure))
    low_x, high_x = _range(figure.x, [dot.x for dot in dots])
    low_y, high_y = _range(figure.y, [v for dot in dots for v in (dot.y, dot.low, dot.high) if v is not None])
    x = scale(low_x, high_x, _LEFT, right, figure.x.log)
    y = scale(low_y, high_y, height - _BOTTOM, _TOP, figure.y.log)
    inside = [text(0, 14, figure.y.label, kind="small")]
    for value in _ticks(figure.y, low_y, high_y, 6):
        inside.append(line(_LEFT, y(value), right, y(value), "grid"))
        inside.append(text(_LEFT - 8, y(value) + 4, short(value), "end", "small"))
    for value in _ticks(figure.x, low_x, high_x, 5 if narrow else 10):
        inside.append(line(x(value), height - _BOTTOM, x(value), height - _BOTTOM + 5, "axis"))
        inside.append(text(x(value), height - _BOTTOM + 19, short(value), "middle", "small"))
    inside.append(line(_LEFT, height - _BOTTOM, right, height - _BOTTOM, "axis"))
    inside.append(text((_LEFT + right) / 2, height - 8, figure.x.label, "middle", "small"))
    taken: list[Box] = []
    for one in figure.lines:
        inside += _line(one, x, y, taken)
    for one in figure.lines:
        inside += _labels(one, x, y, right, taken)
    if narrow:
        height += _key(figure, inside, height + 6, width)
    else:
        inside += _ends(figure, x, y, right, height - _BOTTOM)
    return drawing(width, height, inside, f"{figure.title}: {figure.says}", "narrow" if narrow else "wide")


def _room(figure: Curves) -> float:
    """For the names of lines at their ends."""
    return 18 + max((width_of(one.name, 12) for one in figure.lines), default=0)


def _range(axis: Axis, values: list[float]) -> tuple[float, float]:
    low, high = min((*values, *axis.ticks)), max((*values, *axis.ticks))
    if axis.log:
        spare = (high / low) ** 0.04
        return low / spare, high * spare
    return 0.0, steps(0.0, high, 6)[-1]


def _ticks(axis: Axis, low: float, high: float, most: int) -> list[float]:
    if axis.ticks:
        skip = -(-len(axis.ticks) // max(most, 1)) if most < len(axis.ticks) else 1
        return list(axis.ticks[::skip])
    return logarithmic(low, high, most) if axis.log else steps(low, high, most)


def _line(one: Line, x: Scale, y: Scale, taken: list[Box]) -> Iterator[str]:
    places = [(x(dot.x), y(dot.y)) for dot in one.dots]
    if one.kind == "limit":
        yield polyline(places, "ceiling")
        taken += along(places)
        return
    if one.kind == "line":
        yield polyline(places, f"l{one.colour}" + (" thick" if one.colour == 0 else ""))
    for dot, (px, py) in zip(one.dots, places, strict=True):
        if dot.low is not None and dot.high is not None:
            yield line(px, y(dot.low), px, y(dot.high), "spread")
        yield mark(px, py, one.colour, dot.hover, one.hollow, 4.5 if one.kind == "marks" else 3.6)
        taken.append((px - 5, py - 5, px + 5, py + 5))


def along(places: list[tuple[float, float]]) -> Iterator[Box]:
    """Boxes that cover a line."""
    for (x1, y1), (x2, y2) in itertools.pairwise(places):
        count = int(max(abs(x2 - x1), abs(y2 - y1)) / 6) + 1
        for n in range(count + 1):
            px, py = x1 + (x2 - x1) * n / count, y1 + (y2 - y1) * n / count
            yield (px - 3, py - 3, px + 3, py + 3)


def _labels(one: Line, x: Scale, y: Scale, right: float, taken: list[Box]) -> Iterator[str]:
    """Beside their points, where nothing else is."""
    for dot in one.dots:
        if dot.label:
            place = free_place(dot.label, x(dot.x), y(dot.y), (_LEFT, _TOP - 8, right + 4), taken)
            if place is not None:
                yield text(*place, dot.label, kind="small label")


def free_place(
    words: str, px: float, py: float, room: tuple[float, float, float], taken: list[Box], size: float = 12
) -> tuple[float, float] | None:
    """Where a text beside a point begins, its baseline below: the first place that nothing takes, which it takes then.

    room: left, top and right end of the drawing; y grows downwards. None where there is no place: the point still tells
    its values when it is pointed at, and the table has them.
    """
    wide, tall = width_of(words, size), size + 1
    below, above = tall + 4, -9
    near = ((9, 4), (-9 - wide, 4), (-wide / 2, above), (-wide / 2, below + 2), (9, above), (9, below))
    near += ((-9 - wide, above), (-9 - wide, below))
    further = tuple((dx, dy + (14 if dy > 0 else -14)) for dx, dy in near)
    for dx, dy in (*near, *further):
        box = (px + dx, py + dy - tall + 3, px + dx + wide, py + dy + 3)
        inside = box[0] >= room[0] and box[1] >= room[1] and box[2] <= room[2]
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return px + dx, py + dy
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ends(figure: Curves, x: Scale, y: Scale, right: float, bottom: float) -> Iterator[str]:
    """Names at the ends of lines, moved apart; marks alone are named in a key above."""
    named = sorted(((y(one.dots[-1].y), one) for one in figure.lines if one.kind != "marks"), key=lambda item: item[0])
    at = -1e9
    places = []
    for wanted, one in named:
        at = max(wanted, at + 16)
        places.append([at, wanted, one])
    overflow = (places[-1][0] - bottom) if places else 0
    for place in reversed(places):
        place[0] -= max(overflow, 0)
        overflow -= 16
    for at, wanted, one in places:
        end = x(one.dots[-1].x)
        if abs(at - wanted) > 6:
            yield line(end + 5, wanted, right + 8, at, "grid")
        yield text(right + 12, at + 4, one.name, kind="small dim" if one.kind == "limit" else f"small t{one.colour}")
    left = _LEFT + width_of(figure.y.label, 12) + 16
    for one in figure.lines:
        if one.kind == "marks":
            yield mark(left, 10, one.colour, one.name, one.hollow)
            yield text(left + 11, 14, one.name, kind=f"small t{one.colour}")
            left += 11 + width_of(one.name, 12) + 26


def _key(figure: Curves, inside: list[str], y: float, width: int) -> float:
    """On narrow screens the names stand below; the height that it takes."""
    left, top = 0.0, y
    for one in figure.lines:
        if left and left + 34 + width_of(one.name, 12) > width:
            left, y = 0.0, y + 20
        if one.kind == "limit":
            inside.append(line(left, y + 4, left + 22, y + 4, "ceiling"))
        else:
            inside += [line(left, y + 4, left + 22, y + 4, f"l{one.colour}")] if one.kind == "line" else []
            inside.append(mark(left + 11, y + 4, one.colour, one.name, one.hollow))
        inside.append(text(left + 29, y + 8.5, one.name, kind="small"))
        left += 29 + width_of(one.name, 12) + 18
    return y - top + SIZE + 10
