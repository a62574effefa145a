"""Figures of kernels: the roofline with every one of them, and attention over sequence lengths and head counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vit_bench.profiling.sweep import TOKENS_AT_ONCE, VIT_TOKENS
from vit_bench.profiling.times import evidence_of, seconds_of
from vit_bench.report.data import FIRST_MODEL, Book, Item, Section, Table, evidence, kernels_of, microseconds, percent
from vit_bench.report.figures import Axis, Curves, Dot, Line
from vit_bench.results import OURS, Row, Run
from vit_bench.timed.machine import datasheet, known_gpu

_MANY = 64  # images, of the batch that the roofline shows beside batch 1
_LEAST_POINTS = 3  # of a curve


def roofline(book: Book) -> Section | None:
    """One for each device and dtype: the kernels of a model at batch 1 and at the largest batch up to 64."""
    items = []
    for (device, dtype), rows in _kernel_rows(book).items():
        model = FIRST_MODEL if any(row.model == FIRST_MODEL for row in rows) else rows[0].model
        own = [row for row in rows if row.model == model]
        batches = sorted({row.shape["batch"] for row in own})
        shown = sorted({batches[0], max((b for b in batches if b <= _MANY), default=batches[0])})
        run = book.results.runs[own[0].run]
        ceilings = list(_ceilings(run, device, dtype))
        if not ceilings:
            continue
        lines, table = [], []
        for place, batch in enumerate(reversed(shown)):
            points = [one for row in own if row.shape["batch"] == batch for one in _points(row)]
            dots = tuple(
                Dot(one["flops"] / one["bytes"], one["flops"] / one["s"] / 1e12, _hover(one, batch), one["launch"])
                for one in points
            )
            lines.append(Line(f"batch {batch}", dots, place, "marks", hollow=place > 0))
            table += [_cells(one, batch, ceilings[0][1]) for one in points]
        most = max(dot.x for one in lines for dot in one.dots)
        least = min(dot.x for one in lines for dot in one.dots)
        limits = [_limit(name, peak, bandwidth, least, most) for name, peak, bandwidth in ceilings]
        figure = Curves(
            name=f"roofline {model} {dtype} {device}",
            title=f"{model} on {device}, {dtype}",
            says=_roof_says(lines[0], ceilings[0]),
            evidence=evidence(own),
            x=Axis("FLOP per byte of operands, each counted once", log=True),
            y=Axis("TFLOP/s", log=True),
            lines=(*limits, *lines),
        )
        heads = ("batch", "launch", "FLOP/byte", "TFLOP/s", "of peak", "µs", "bound, µs", "bound by")
        items.append(Item(figure.title, figure, Table(heads, tuple(table), frozenset({0, 2, 3, 4, 5, 6}))))
    note = (
        "How far a kernel lies below the roof is how much longer it takes than arithmetic or memory alone would. "
        "Launches that multiply no matrices, and those without a time of their own, are not on it."
    )
    return Section("roofline", "Roofline", tuple(items), note) if items else None


def _kernel_rows(book: Book) -> dict[tuple[str, str], list[Row]]:
    """By device and dtype: measured kernels where there are any, those of a forward pass otherwise."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in (*(row for row in book.rows if row.suite != "model"), *book.passes):
        if row.contender == OURS and row.source in ("gpu", "compiled") and list(_points(row)):
            found.setdefault((row.device, row.dtype), []).append(row)
    for key, rows in found.items():
        timed = [row for row in rows if row.suite == "kernels" and row.seconds]
        passes = [row for row in rows if row.suite == "model"]
        found[key] = timed or passes or rows
    return {key: rows for key, rows in found.items() if rows[0].suite != "attention"}


def _points(row: Row) -> Iterator[dict[str, Any]]:
    """What a row says of single kernels that multiply matrices."""
    if row.suite == "kernels" and row.seconds and row.flops and row.nbytes:
        bound = {"bound_s": row.bound_s} if row.bound_s else {}
        yield {"launch": row.label, "flops": row.flops, "bytes": row.nbytes, "s": row.seconds.median, **bound}
        return
    for one in kernels_of(row):
        # A launch that has a bound alone would lie on the roof by definition.
        if one.get("flops") and one.get("bytes") and (one.get("seconds") or one.get("modelled_s")):
            yield one


def _ceilings(run: Run, device: str, dtype: str) -> Iterator[tuple[str, float, float]]:
    """(name, FLOP/s, bytes/s), as far as they are known."""
    sheet, reached = run.datasheet or datasheet(known_gpu(device)) or {}, run.ceilings
    peak = sheet.get("single" if dtype == "fp32" else "half")
    if peak and sheet.get("bandwidth"):
        yield "datasheet", peak, sheet["bandwidth"]
    if reached and reached.matmul.get(dtype):
        matmul = reached.matmul[dtype]
        yield "measured peaks", matmul, reached.copy


def _limit(name: str, peak: float, bandwidth: float, least: float, most: float) -> Line:
    """The roof from the leftmost kernel, or a little before the ridge, to the right of all."""
    ridge = peak / bandwidth
    low, high = min(least * 0.8, ridge / 4), max(most * 1.3, ridge * 2)
    dots = (Dot(low, low * bandwidth / 1e12, name), Dot(ridge, peak / 1e12, name), Dot(high, peak / 1e12, name))
    return Line(name, dots, 6, "limit")


def _hover(one: dict[str, Any], batch: int) -> str:
    rate = one["flops"] / one["s"] / 1e12
    return f"{one['launch']}, batch {batch}: {rate:,.1f} TFLOP/s at {one['flops'] / one['bytes']:,.0f} FLOP/byte"


def _cells(one: dict[str, Any], batch: int, peak: float) -> tuple[str, ...]:
    rate = one["flops"] / one["s"]
    return (
        str(batch),
        str(one["launch"]),
        f"{one['flops'] / one['bytes']:,.0f}",
        f"{rate / 1e12:,.1f}",
        percent(rate / peak),
        microseconds(one["s"]),
        microseconds(one["bound_s"]) if one.get("bound_s") else "",
        str(one.get("bound", "")),
    )


def _roof_says(many: Line, ceiling: tuple[str, float, float]) -> str:
    best, (name, peak, bandwidth) = max(many.dots, key=lambda dot: dot.y), ceiling
    return (
        f"The roof is {peak / 1e12:,.0f} TFLOP/s and {bandwidth / 1e12:.3g} TB/s ({name}). At {many.name} {best.label} "
        f"comes nearest to its top: {best.y * 1e12 / peak:.0%} of it."
    )


def attention(book: Book) -> Section | None:
    """Curves over sequence lengths, for each head count, and over head counts, for each length."""
    items: list[Item] = []
    for axis, fixed in (("tokens", "heads"), ("heads", "tokens")):
        for key, rows in _sweeps(book, axis, fixed).items():
            items.append(_curve(book, axis, fixed, key, rows, folded=any(i.title.startswith(axis) for i in items)))
    note = "TFLOP/s of what the result needs: what tiles compute in vain is not counted."
    return Section("attention", "Attention", tuple(items), note) if items else None


def _sweeps(book: Book, axis: str, fixed: str) -> dict[tuple[Any, ...], list[Row]]:
    """By device, dtype, head width and the fixed quantity; only where there are enough points."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in book.rows:
        if row.suite == "attention" and evidence_of(row) in ("measured", "modelled") and row.flops:
            found.setdefault((row.device, row.dtype, row.shape["head_dim"], row.shape[fixed]), []).append(row)
    return {key: rows for key, rows in found.items() if len({row.shape[axis] for row in rows}) >= _LEAST_POINTS}


def _curve(book: Book, axis: str, fixed: str, key: tuple[Any, ...], rows: Sequence[Row], folded: bool) -> Item:
    device, dtype, width, count = key
    chosen = {name: _one_batch(axis, [row for row in rows if row.contender == name]) for name in _names(rows)}
    lines = [
        Line(name, tuple(_dot(row, axis) for row in some), book.colours[name]) for name, some in chosen.items() if some
    ]
    ours = chosen.get(OURS, [])
    bounds = tuple(
        Dot(row.shape[axis], row.flops / row.bound_s / 1e12, "") for row in ours if row.bound_s and row.flops
    )
    if len(bounds) > 1:
        lines.insert(0, Line("bound by datasheet", bounds, 6, "limit"))
    ticks = tuple(sorted({row.shape[axis] for row in rows} & _ROUND)) if axis == "tokens" else ()
    title = f"{'Sequence length' if axis == 'tokens' else 'Head count'}: {count} {fixed}, head width {width}, {dtype}"
    figure = Curves(
        name=f"attention over {axis} {fixed} {count} width {width} {dtype} {device}",
        title=title,
        says=_curve_says(axis, ours),
        evidence=evidence(rows),
        x=Axis("tokens" if axis == "tokens" else "heads", log=True, ticks=ticks or _every(rows, axis)),
        y=Axis("TFLOP/s"),
        lines=tuple(lines),
    )
    heads = ("tokens", "heads", "batch", "contender", "TFLOP/s", "µs", "of peak", "bound, µs", "tile", "waves", "waste")
    cells = tuple(_attention_cells(book, row) for some in chosen.values() for row in some)
    return Item(title, figure, Table(heads, cells, frozenset({0, 1, 2, 4, 5, 6, 7, 9, 10})), folded=folded)


_ROUND = {64 << n for n in range(16)}


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(sorted((row.contender for row in rows), key=lambda name: name != OURS)))


def _every(rows: Sequence[Row], axis: str) -> tuple[float, ...]:
    return tuple(sorted({row.shape[axis] for row in rows}))


def _one_batch(axis: str, rows: Sequence[Row]) -> list[Row]:
    """At each place the batch with about as many tokens as everywhere else."""
    found: dict[int, Row] = {}
    for row in rows:
        kept = found.get(row.shape[axis])
        if kept is None or _off(row) < _off(kept):
            found[row.shape[axis]] = row
    return [found[place] for place in sorted(found)]


def _off(row: Row) -> float:
    tokens = row.shape["batch"] * row.shape["tokens"]
    return max(tokens / TOKENS_AT_ONCE, TOKENS_AT_ONCE / tokens)


def _dot(row: Row, axis: str) -> Dot:
    seconds, flops = seconds_of(row), row.flops
    assert seconds and flops
    rate = flops / seconds / 1e12
    said = f"{row.contender}, {row.shape['tokens']} tokens, {row.shape['heads']} heads, batch {row.shape['batch']}: "
    timed = row.seconds
    spread = (flops / timed.p80 / 1e12, flops / timed.p20 / 1e12) if timed else (None, None)
    hover = said + f"{rate:,.1f} TFLOP/s {evidence_of(row)}"
    tokens = row.shape["tokens"]
    marked = axis == "tokens" and row.contender == OURS and tokens in VIT_TOKENS and tokens not in _ROUND
    return Dot(row.shape[axis], rate, hover, str(tokens) if marked else "", spread[0], spread[1])


def _curve_says(axis: str, ours: Sequence[Row]) -> str:
    if not ours:
        return ""
    best = max(ours, key=lambda row: (row.flops or 0) / (seconds_of(row) or 1))
    rate = (best.flops or 0) / (seconds_of(best) or 1) / 1e12
    return f"Ours comes to {rate:,.0f} TFLOP/s at {best.shape[axis]:,} {axis}."


def _attention_cells(book: Book, row: Row) -> tuple[str, ...]:
    seconds = seconds_of(row)
    assert seconds and row.flops
    kernel = next(iter(row.code.get("kernels", ())), {})
    sheet = book.results.runs[row.run].datasheet or {}
    peak = sheet.get("single" if row.dtype == "fp32" else "half")
    return (
        *(str(row.shape[name]) for name in ("tokens", "heads", "batch")),
        row.contender,
        f"{row.flops / seconds / 1e12:,.1f}",
        microseconds(seconds),
        percent(row.flops / seconds / peak) if peak else "",
        microseconds(row.bound_s) if row.bound_s else "",
        "x".join(map(str, kernel.get("tile", {}).values())),
        f"{kernel['waves']:.2f}" if "waves" in kernel else "",
        f"{kernel['tile_waste']:.2f}" if "tile_waste" in kernel else "",
    )
