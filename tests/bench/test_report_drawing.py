"""Figures as SVG: scales and ticks, lengths in proportion, everything inside the drawing, labels apart."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from vit_bench.report import svg
from vit_bench.report.draw_bars import bars, strips
from vit_bench.report.draw_curves import curves, free_place
from vit_bench.report.figures import Axis, Bar, Bars, Curves, Dot, Line, Part, Strips
from vit_bench.report.svg import NARROW, WIDE, logarithmic, scale, short, steps

BARS = Bars(
    "name", "Title & more", "What it says <here>.", "measured on X", "images/s", "bound by datasheet",
    (
        ("batch 1", (Bar("ours", 50.0, "50 images/s", 0, False, 45.0, 60.0, 100.0), Bar("a <b>", 25.0, "25", 1))),
        ("batch 8", (Bar("ours", 10.0, "10 images/s", 0, modelled=True),)),
    ),
)  # fmt: skip
CURVES = Curves(
    "name", "Title", "", "modelled", Axis("tokens", log=True, ticks=(64, 256, 1024)), Axis("TFLOP/s"),
    (
        Line("bound", (Dot(64, 100, ""), Dot(1024, 400, "")), 6, "limit"),
        Line("ours", (Dot(64, 50, "a"), Dot(256, 80, "b", "256 & co", 75, 90), Dot(1024, 200, "c")), 0),
        Line("other", (Dot(64, 48, "d"), Dot(1024, 199, "e")), 1),
        Line("points", (Dot(300, 82, "f", "near"), Dot(310, 84, "g", "nearer")), 2, "marks", hollow=True),
    ),
)  # fmt: skip
STRIPS = Strips(
    "name", "Title", "", "modelled",
    (("one", "8 us", (Part("long <part>", 7.7, "7 us", 0), Part("x", 0.15, "h", 1), Part("y", 0.15, "h", 1))),),
)  # fmt: skip


def parsed(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(drawing)


def numbers(element: ElementTree.Element, *names: str) -> list[float]:
    return [float(element.get(name, "nan")) for name in names]


def test_scales():
    linear, log = scale(0, 10, 100, 200), scale(1, 100, 0, 50, log=True)
    assert (linear(0), linear(5), linear(10)) == (100, 150, 200)
    assert (log(1), log(10), log(100)) == pytest.approx((0, 25, 50))
    assert scale(5, 5, 0, 10)(5) == 0, "all values alike"


def test_ticks_are_round_and_cover_the_values():
    assert steps(0, 481, 6) == [0, 100, 200, 300, 400, 500] and steps(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1]
    assert steps(0, 989.4, 6)[-1] == 1000
    assert logarithmic(0.3, 1000, 6) == [1, 10, 100, 1000] and logarithmic(20, 700, 10) == [20, 50, 100, 200, 500]
    assert logarithmic(20, 700, 3) == [30, 100, 300]
    assert [short(n) for n in (0.5, 64, 1000, 1024, 2500, 16384, 50_000)] == [
        "0.5",
        "64",
        "1,000",
        "1k",
        "2,500",
        "16k",
        "50k",
    ]


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize(("draw", "figure"), [(bars, BARS), (curves, CURVES), (strips, STRIPS)])
def test_drawings_are_well_formed_named_and_nothing_lies_outside(draw, figure, width):
    root = parsed(draw(figure, width))
    assert root.get("role") == "img" and root.get("aria-label", "").startswith(figure.title)
    assert root.get("class") == ("wide" if width == WIDE else "narrow")
    _, _, right, bottom = (float(v) for v in root.get("viewBox", "").split())
    assert right == width
    for element in root.iter():
        x, y = (float(element.get(name, "0")) for name in ("x", "y"))
        assert 0 <= x <= right and 0 <= y <= bottom, ElementTree.tostring(element)
        if element.tag == "text":
            wide = svg.width_of(element.text or "", 12)
            left = x - {"end": wide, "middle": wide / 2}.get(element.get("text-anchor", ""), 0)
            assert left >= -1 and left + wide <= right + 1, element.text
        if element.tag == "rect":
            assert x + float(element.get("width", "0")) <= right + 0.1


def test_bars_of_a_group_are_in_proportion_from_zero():
    root = parsed(bars(BARS, WIDE))
    found = {
        rect.get("class"): numbers(rect, "x", "width") for rect in root.iter("rect") if rect.find("title") is not None
    }
    (x, ours), (x_other, other) = found["f0"], found["f1"]
    assert x == x_other and ours == pytest.approx(2 * other, abs=0.2)
    limit = next(line for line in root.iter("line") if line.get("class") == "limit")
    assert numbers(limit, "x1")[0] - x == pytest.approx(2 * ours, abs=0.2)
    spread = [numbers(line, "x1", "x2") for line in root.iter("line") if line.get("class") == "spread"]
    assert [x + ours * share for share in (0.9, 1.2)] == pytest.approx(spread[0], abs=0.2)
    titles = [title.text or "" for title in root.iter("title")]
    assert "45 to 60 images/s" in titles[0] and "bound by datasheet: 100 images/s" in titles[0]


def test_modelled_bars_are_hatched_and_the_key_says_so():
    root = parsed(bars(BARS, WIDE))
    rects = [rect.get("class") for rect in root.iter("rect")]
    assert rects.count("o0") == rects.count("hatch") == 2, "the bar and its key"
    words = [text.text for text in root.iter("text")]
    assert {"not measured", "measured", "20th to 80th percentile", "bound by datasheet"} <= set(words)


def test_values_stand_behind_their_bars_and_not_behind_a_limit():
    root = parsed(bars(BARS, WIDE))
    label = next(text for text in root.iter("text") if text.text == "50 images/s")
    limit = next(line for line in root.iter("line") if line.get("class") == "limit")
    assert numbers(label, "x")[0] + svg.width_of("50 images/s") < numbers(limit, "x1")[0]


def test_bars_of_one_contender_are_named_by_their_groups():
    alone = Bars("n", "T", "", "e", "u", "l", tuple((f"batch {n}", (Bar("ours", n, f"{n} u", 0),)) for n in (1, 2)))
    words = [text.text for text in parsed(bars(alone, WIDE)).iter("text")]
    assert words == ["batch 1", "1 u", "batch 2", "2 u"]


def test_lines_follow_their_values():
    root = parsed(curves(CURVES, WIDE))
    line = next(line for line in root.iter("polyline") if line.get("class") == "l0 thick")
    (x1, y1), (x2, y2), (x3, y3) = [[float(v) for v in point.split(",")] for point in line.get("points", "").split()]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2), "logarithmic: 64 to 256 as 256 to 1024"
    assert (y1 - y2) / (y2 - y3) == pytest.approx(30 / 120, rel=0.02), "linear"
    axis = next(line for line in root.iter("line") if line.get("class") == "axis" and line.get("y1") == line.get("y2"))
    assert (numbers(axis, "y1")[0] - y3) / (numbers(axis, "y1")[0] - y1) == pytest.approx(4, rel=0.02), "from zero"
    assert {text.text for text in root.iter("text")} >= {"64", "256", "1k", "tokens", "TFLOP/s", "256 & co"}


def test_marks_differ_in_shape_and_tell_their_values():
    root = parsed(curves(CURVES, WIDE))
    assert {e.tag for e in root.iter() if e.find("title") is not None} == {"circle", "polygon"}
    assert {t.text for t in root.iter("title")} >= {"a", "b", "c", "d", "e", "f", "g"}
    assert any(e.get("class") == "h2" for e in root.iter("polygon")), "hollow"


def test_names_at_the_ends_of_lines_keep_apart():
    root = parsed(curves(CURVES, WIDE))
    at = sorted(numbers(t, "y")[0] for t in root.iter("text") if t.text in ("bound", "ours", "other"))
    assert all(b - a >= 15.9 for a, b in itertools.pairwise(at)) and len(at) == 3


def test_labels_take_free_places_or_none():
    taken: list[tuple[float, float, float, float]] = []
    room = (0.0, 0.0, 300.0)
    places = [free_place("label", 100, 100, room, taken) for _ in range(40)]
    found = [place for place in places if place is not None]
    assert 4 < len(found) < 40 and len(set(found)) == len(found) == len(taken)
    for a, b in itertools.combinations(taken, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert free_place("too long for its room", 100, 100, (60.0, 0.0, 140.0), []) is None


def test_parts_are_in_proportion_and_named_where_there_is_room():
    root = parsed(strips(STRIPS, WIDE))
    widths = [numbers(r, "width")[0] for r in root.iter("rect") if r.find("title") is not None]
    assert sum(widths) == pytest.approx(WIDE, abs=4) and widths[0] / widths[1] == pytest.approx(7.7 / 0.15, rel=0.1)
    words = [text.text for text in root.iter("text")]
    assert words == ["one", "8 us", "long <part> 96%", "x", "y", "long <part>", "x, y"]


def test_coordinates_are_short():
    assert not re.search(r"\d\.\d{2}", curves(CURVES, WIDE).replace(CURVES.title, ""))
