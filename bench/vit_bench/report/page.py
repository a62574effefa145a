"""Results as one HTML page that needs nothing but itself: no network, no script, no font.

Values show when a mark is pointed at (SVG's own titles), and stand in a table below each figure.
"""

from __future__ import annotations

from html import escape

from vit_bench.modelled import CLOCKS, how_far_off
from vit_bench.profiling.times import evidence_of, seconds_of
from vit_bench.report.data import Book, Item, Section, Table, all_measured, rank
from vit_bench.report.draw_bars import bars, strips
from vit_bench.report.draw_curves import curves
from vit_bench.report.figures import Bars, Curves, Figure
from vit_bench.report.sections import sections
from vit_bench.report.style import PAGE
from vit_bench.report.svg import NARROW, WIDE
from vit_bench.results import OURS, Results, Row

_HATCH = (
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs><pattern id="hatch" width="6" '
    'height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><line x1="0" y1="0" x2="0" y2="6" '
    'stroke="var(--s0)" stroke-width="1.4" stroke-opacity=".55"/></pattern></defs></svg>'
)


def page(results: Results) -> str:
    """The whole document."""
    book = Book(results)
    made = sections(book)
    links = "".join(f'<a href="#{one.anchor}">{escape(one.title)}</a>' for one in made)
    body = "\n".join(_section(one) for one in made)
    title = f"vit-engine: {_subject(book)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{PAGE}</style>\n</head>\n<body>\n{_HATCH}\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(_lead(book))}</p>{_cards(book)}<nav>{links}</nav></header>\n"
        f"<main>\n{body}\n</main>\n<footer>{escape(_foot(book))}</footer>\n</body>\n</html>\n"
    )


_FOOT = (
    "Measured: run and timed, after its result was compared with float64. Modelled: cycles by which tiles are chosen, "
    "over the clock under load, of compiled code that was not executed. Bound: the least time that the datasheet's "
    "arithmetic and memory allow."
)


def _foot(book: Book) -> str:
    """What the words mean, and how far the model is off on the GPUs of modelled times."""
    modelled = {row.device for row in book.rows if evidence_of(row) == "modelled"}
    return " ".join([_FOOT, *(how_far_off(device) for device in CLOCKS if device.name in modelled)])


def _subject(book: Book) -> str:
    known = sorted((row for row in book.rows if seconds_of(row) is not None), key=lambda row: rank([row]))
    devices = list(dict.fromkeys(row.device for row in known))
    return "results" + (f" on {', '.join(devices)}" if devices else "")


def _lead(book: Book) -> str:
    kinds = {evidence_of(row) for row in book.rows} - {"not run"}
    count = sum(row.seconds is not None for row in book.rows)
    days = sorted({run.started[:10] for run in book.results.runs})
    when = f"{days[0]} to {days[-1]}" if len(days) > 1 else "".join(days)
    if not kinds:
        return f"{when}. Nothing was timed or modelled."
    if kinds == {"measured"}:
        return f"{when}. {count} times, all measured."
    if "measured" in kinds:
        return f"{when}. {count} times were measured; the others are modelled, and every figure says which it shows."
    return (
        f"{when}. No GPU was used and nothing was timed: kernels were compiled for the GPU named, and their times are "
        "modelled and bounded by its datasheet."
    )


def _cards(book: Book) -> str:
    """The few figures that one wants first, of one model, dtype and device."""
    groups = book.groups("model", "device", "dtype", "model")
    cards = []
    if groups:
        (_, dtype, model), rows = groups[0]
        ours = sorted((row for row in rows if row.contender == OURS), key=lambda row: row.images)
        if ours:
            cards += [
                _card(
                    f"{(seconds_of(ours[0]) or 0) * 1e3:.3g} ms", f"{model}, batch {ours[0].images}, {dtype}", ours[0]
                )
            ]
            last = ours[-1]
            cards += [
                _card(f"{last.images / (seconds_of(last) or 1):,.0f}/s", f"images, batch {last.images}, {dtype}", last)
            ]
            if last.launches:
                cards.append(_card(f"{last.launches} launches", "of a forward pass", last, counted=True))
    fastest = [row for row in book.rows if row.suite == "attention" and row.contender == OURS and row.flops]
    fastest = [row for row in fastest if seconds_of(row) is not None]
    if fastest:
        best = max(fastest, key=lambda row: (row.flops or 0) / (seconds_of(row) or 1))
        rate = (best.flops or 0) / (seconds_of(best) or 1) / 1e12
        cards.append(_card(f"{rate:,.0f} TFLOP/s", f"attention, {best.shape['tokens']:,} tokens", best))
    return f'<ul class="cards">{"".join(cards)}</ul>' if cards else ""


def _card(value: str, what: str, row: Row, counted: bool = False) -> str:
    how = "recorded" if counted and row.seconds is None else evidence_of(row)
    lines = "".join(f"<small>{escape(words)}</small>" for words in (what, f"{how}, {row.device}"))
    return f"<li><b>{escape(value)}</b>{lines}</li>"


def _section(section: Section) -> str:
    intro = f"<p>{escape(section.intro)}</p>" if section.intro else ""
    items = "\n".join(_item(one) for one in section.items)
    return f'<section id="{section.anchor}">\n<h2>{escape(section.title)}</h2>\n{intro}\n{items}\n</section>'


def _item(item: Item) -> str:
    made = _figure(item) if item.figure is not None else _tabled(item)
    return f"<details><summary>{escape(item.title)}</summary>{made}</details>" if item.folded else made


def _figure(item: Item) -> str:
    figure = item.figure
    assert figure is not None
    kind = "measured" if all_measured(figure.evidence) else ""
    said = f"<p>{escape(figure.says)}</p>" if figure.says else ""
    values = f"<details><summary>Values</summary>{_table(item.table)}</details>" if item.table else ""
    return (
        f'<figure><figcaption><b>{escape(figure.title)}</b> <span class="rung {kind}">{escape(figure.evidence)}</span>'
        f"{said}</figcaption>\n{drawn(figure, WIDE)}\n{drawn(figure, NARROW)}\n{values}</figure>"
    )


def drawn(figure: Figure, width: int) -> str:
    """A figure as an SVG element."""
    if isinstance(figure, Bars):
        return bars(figure, width)
    return curves(figure, width) if isinstance(figure, Curves) else strips(figure, width)


def _tabled(item: Item) -> str:
    title = f"<h3>{escape(item.title)}</h3>" if item.title and not item.folded else ""
    note = f"<p>{escape(item.note)}</p>" if item.note else ""
    return f"{title}{note}{_table(item.table) if item.table else ''}"


def _table(table: Table) -> str:
    """Without heads on top, as of an environment, the first cell of a row is its head."""

    def cells(values: tuple[str, ...], *tags: str) -> str:
        return "".join(
            f"<{tag}{' class=number' * (place in table.numbers)}>{escape(value)}</{tag.split()[0]}>"
            for place, (value, tag) in enumerate(zip(values, (*tags, *tags[-1:] * len(values)), strict=False))
        )

    headed = any(table.heads)
    head = f"<thead><tr>{cells(table.heads, 'th')}</tr></thead>" if headed else ""
    first = ("td",) if headed else ('th scope="row"', "td")
    rows = "".join(f"<tr>{cells(row, *first)}</tr>" for row in table.rows)
    return f'<div class="scroll" tabindex="0"><table>{head}<tbody>{rows}</tbody></table></div>'
