"""The page as a document: it needs nothing but itself, says what everything rests on, and opens clean in Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.bench.chromium import needs_chromium, opened
from tests.bench.report_results import BASE, compiled, results, row, run
from vit_bench.modelled import how_far_off
from vit_bench.report import facts
from vit_bench.report.page import page
from vit_bench.report.style import DARK, DRAWING, LIGHT, PAPER
from vit_bench.results import Results
from vit_kernels.device import A100, H100

VOID = {"meta", "br", "img", "input", "hr", "link"}


class Document(HTMLParser):
    """Elements with their attributes, and whether every element that opens is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """What takes seconds is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "digits", lambda: (360, 364))
        patch.setattr(facts, "_records", lambda _: facts.Table((), ()))
        yield


@pytest.fixture(scope="module")
def html() -> str:
    return page(results())


def test_it_is_one_document_that_needs_nothing_else(html):
    document = Document(html)
    assert document.open == [] and html.startswith("<!doctype html>") and document.all("html")[0]["lang"] == "en"
    assert not document.all("script") and not document.all("link") and not document.all("img")
    assert not re.search(r"https?://|@import|url\((?!#hatch)", html)
    assert [meta.get("content") for meta in document.all("meta")][1] == "width=device-width, initial-scale=1"


def test_names_from_files_are_text(html):
    assert "<b>compiled</b>" not in html and "&lt;b&gt;compiled&lt;/b&gt;" in html
    assert "alert(1)" in html and "&lt;script&gt;" in html and "vit-engine bench &lt;all&gt;" in html


def test_links_lead_to_sections_and_headings_are_in_order(html):
    document = Document(html)
    anchors = {section["id"] for section in document.all("section")}
    links = [link["href"].removeprefix("#") for link in document.all("a")]
    assert set(links) == anchors and len(links) == len(set(links))
    expected = [
        "throughput",
        "attention",
        "roofline",
        "block",
        "timeline",
        "memory",
        "accuracy",
        "not-run",
        "environment",
    ]
    assert links == expected
    assert len(document.all("h1")) == 1 and len(document.all("h2")) == len(links)


def test_every_figure_says_what_it_rests_on_and_has_its_values_as_a_table(html):
    figures = html.split("<figure>")[1:]
    assert len(figures) >= 8
    for figure in figures:
        figure = figure.split("</figure>")[0]
        said = re.search(r'<span class="rung (measured)?">([^<]+)</span>', figure)
        assert said is not None and ("measured on" in said[2] or "modelled for" in said[2])
        assert ("measured on" in said[2]) == (said[1] == "measured")
        assert "<details><summary>Values</summary>" in figure and figure.count("<tr>") > 1
        assert figure.count('role="img"') == 2 and figure.count("aria-label=") == 2


def test_the_head_has_the_figures_that_one_wants_first(html):
    cards = re.findall(r"<li><b>([^<]*)</b><small>([^<]*)</small><small>([^<]*)</small></li>", html)
    assert cards[0] == ("0.4 ms", f"{BASE}, batch 1, bf16", "measured, H100 SXM")
    assert cards[1][0] == "12,800/s" and cards[2][0] == "63 launches" and cards[3][0].endswith("TFLOP/s")
    assert "18 times were measured; the others are modelled" in html


def test_nothing_modelled_is_called_measured():
    html = page(Results([run()], [compiled(1), compiled(64)]))
    assert "nothing was timed" in html and 'class="rung measured"' not in html and "measured on" not in html
    assert "modelled, H100 SXM" in html and "recorded, H100 SXM" in html
    assert how_far_off(H100) in html and how_far_off(A100) not in html
    empty = page(Results([run()], [row(source="not run", reason="no GPU")]))
    assert "Nothing was timed or modelled." in empty and "<figure>" not in empty and "modelled at" not in empty


def test_a_figure_that_is_measured_in_part_is_not_marked_as_measured():
    timed = [one | {"seconds": 3e-6} for one in compiled().code["kernels"]]
    for rows, marked in (((row(code={"kernels": timed}),), True), ((row(code={"kernels": timed}), compiled(1)), False)):
        html = page(Results([run()], list(rows)))
        (block,) = (one for one in html.split("<figure>") if "One encoder block" in one)
        assert ('class="rung measured"' in block) is marked


def test_the_names_of_an_environment_are_heads_of_rows(html):
    section = html[html.index('<section id="environment">') :]
    assert '<tr><th scope="row">command</th><td>' in section and "<tr><td>command" not in section
    assert "<thead>" not in section and '<th scope="row">' not in html[: html.index('<section id="environment">')]


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("colours", "paper"), [(LIGHT, PAPER), (DARK, "#17181b")])
def test_series_stand_out_from_the_paper(colours, paper):
    """WCAG: 3 to 1 for graphics, 4.5 to 1 for text; names of series are text in their colour."""
    for colour in colours[:-1]:
        light, dark = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour
    assert all(f".f{n} " in DRAWING and f".l{n} " in DRAWING for n in range(len(colours)))


MEASURE = """<script>
addEventListener('load', () => {
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
    && getComputedStyle(e).position !== 'absolute' && e.getBoundingClientRect().right > innerWidth + 1);
  document.querySelectorAll('details').forEach(e => e.open = true);
  const texts = [...document.querySelectorAll('svg text')].filter(e => e.getClientRects().length);
  const box = e => e.getBoundingClientRect();
  const found = {
    width: innerWidth, page: document.documentElement.scrollWidth, wide: wide.map(e => e.tagName + e.className),
    shown: [...document.querySelectorAll('svg[role]')].filter(e => e.getClientRects().length).map(e => e.classList[0]),
    least: Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize) * box(e.ownerSVGElement).width
      / e.ownerSVGElement.viewBox.baseVal.width)),
    outside: texts.filter(e => box(e).left < box(e.ownerSVGElement).left - 3 || box(e).right > innerWidth)
      .map(e => e.textContent),
    paper: getComputedStyle(document.body).backgroundColor,
    bar: getComputedStyle(document.querySelector('svg .f0')).fill,
  };
  parent.document.title = JSON.stringify(found);
});
</script></head>"""


def measured(html: str, folder: Path, width: int, dark: bool) -> tuple[Any, list[str]]:
    """In a frame of that width: headless windows are at least 500 pixels wide."""
    path = folder / f"page-{width}-{dark}.html"
    inner = escape(html.replace("</head>", MEASURE, 1))
    frame = f'<iframe width="{width}" height="900" style="border: 0" srcdoc="{inner}"></iframe>'
    outer = (
        f'<html><head><title></title><meta name="color-scheme" content="light dark"></head><body>{frame}</body></html>'
    )
    path.write_text(outer, encoding="utf-8")
    found = opened(path, max(width, 500), dark)
    title = re.search(r"<title>(\{.*?\})</title>", found.dom)
    assert title is not None, found.dom[:500]
    return json.loads(unescape(title[1])), found.console


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_opens_clean_and_fits_its_window(html, tmp_path, width, dark):
    found, console = measured(html, tmp_path, width, dark)
    assert console == [] and found["width"] == width
    assert found["page"] <= width and found["wide"] == [] and found["outside"] == []
    assert set(found["shown"]) == {"wide" if width > 736 else "narrow"}, "one drawing of each figure"
    assert found["least"] >= 11, "CSS pixels of the smallest text in a figure"
    assert found["paper"] == ("rgb(23, 24, 27)" if dark else "rgb(253, 253, 252)")
    assert found["bar"] == ("rgb(122, 165, 240)" if dark else "rgb(47, 95, 179)")


@needs_chromium
def test_errors_in_the_console_would_be_seen(html, tmp_path):
    path = tmp_path / "broken.html"
    path.write_text(html.replace("</body>", "<script>undefinedFunction()</script></body>"), encoding="utf-8")
    assert any("undefinedFunction" in line for line in opened(path, 390, False).console)
