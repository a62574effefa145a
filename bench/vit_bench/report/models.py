"""Figures of whole forward passes: throughput, memory, where the time of a block goes, the launches one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vit_bench.profiling.times import evidence_of, seconds_of
from vit_bench.report.data import (
    FIRST_MODEL,
    Book,
    Item,
    Section,
    Table,
    evidence,
    kernels_of,
    microseconds,
    percent,
)
from vit_bench.report.figures import Bar, Bars, Part, Strips
from vit_bench.results import OURS, Row, Spread
from vit_bench.timed.compare import is_ours
from vit_bench.timed.timing import verdict

# Colours of the launches of a block: attention and the products around it are told apart, what lies outside is grey.
_PART_COLOURS = {"qkv": 0, "attention": 1, "projection": 2, "fc1": 3, "fc2": 4, "mlp": 3}
_IN_BLOCK = tuple(_PART_COLOURS)
_OUTSIDE = 6


def throughput(book: Book) -> Section | None:
    items, seen = [], set()
    for (device, dtype, model), rows in book.groups("model", "device", "dtype", "model"):
        groups = []
        for batch, some in _by_batch(rows):
            groups.append((f"batch {batch}", tuple(_rate_bar(book, row) for row in some)))
        title = f"{model}, {dtype}"
        figure = Bars(
            name=f"throughput {model} {dtype} {device}",
            title=title,
            says=_says(rows),
            evidence=evidence(rows),
            unit="images/s",
            limit_name="bound by datasheet",
            groups=tuple(groups),
        )
        items.append(Item(title, figure, _rate_table(book, rows), folded=device in seen))
        seen.add(device)
    note = "Images per second of one forward pass. Bars of one batch size share a scale from 0."
    return Section("throughput", "Throughput", tuple(items), note) if items else None


def _by_batch(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    """Ours first in each, then the fastest."""
    found: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.contender != OURS, seconds_of(row))):
        found.setdefault(row.shape.get("batch", row.images), []).append(row)
    return sorted(found.items())


def _rate_bar(book: Book, row: Row) -> Bar:
    seconds = seconds_of(row)
    assert seconds is not None
    rate, timed = row.images / seconds, row.seconds
    return Bar(
        name=row.contender,
        value=rate,
        label=f"{rate:,.0f} images/s, {seconds * 1e3:.3g} ms",
        colour=book.colours[row.contender],
        modelled=timed is None,
        low=row.images / timed.p80 if timed else None,
        high=row.images / timed.p20 if timed else None,
        limit=row.images / row.bound_s if row.bound_s and row.source != "cpu" and evidence_of(row) != "bound" else None,
    )


def _says(rows: Sequence[Row]) -> str:
    """Ours beside the fastest of the others at each batch size, or what is modelled at the largest."""
    said = []
    for batch, some in _by_batch(rows):
        ours, others = some[0].seconds, [row for row in some if row.seconds and not is_ours(row)]
        if some[0].contender != OURS or ours is None or not others:
            continue
        said.append(f"batch {batch}, {_beside(ours, others[0])}")
    if said:
        return "Ours beside the fastest of the others: " + "; ".join(said) + "."
    ours = [row for row in rows if row.contender == OURS]
    if not ours:
        return ""
    last = max(ours, key=lambda row: row.images)
    if evidence_of(last) == "bound":
        return "There is no time model for this: bars are what the datasheet allows at most."
    seconds = seconds_of(last)
    assert seconds is not None
    reached = f", {last.bound_s / seconds:.0%} of what the datasheet allows" if last.bound_s else ""
    return f"Batch {last.images}: {last.images / seconds:,.0f} images/s{reached}."


def _beside(ours: Spread, other: Row) -> str:
    """A ratio, unless the ranges overlap: then there is no winner."""
    theirs = other.seconds
    assert theirs is not None
    if verdict(ours, theirs) == "within the noise":
        return f"within the noise of {other.contender}"
    return f"{theirs.median / ours.median:.2f} times the speed of {other.contender}"


def _rate_table(book: Book, rows: Sequence[Row]) -> Table:
    found = []
    for batch, some in _by_batch(rows):
        for row in some:
            seconds, timed, shares = seconds_of(row), row.seconds, book.results.shares(row)
            assert seconds is not None
            found.append(
                (
                    str(batch),
                    row.contender,
                    f"{row.images / seconds:,.0f}",
                    f"{seconds * 1e3:.4g}",
                    f"{timed.p20 * 1e3:.4g} to {timed.p80 * 1e3:.4g}" if timed else evidence_of(row),
                    f"{row.bound_s * 1e3:.4g}" if row.bound_s else "",
                    percent(shares.get("datasheet flops")),
                    percent(shares.get("measured flops")),
                    str(row.launches or ""),
                    ", ".join(f"{name} {value}".strip() for name, value in row.settings.items()),
                )
            )
    heads = ("batch", "contender", "images/s", "ms", "p20 to p80", "bound, ms", "of datasheet", "of measured peak")
    return Table((*heads, "launches", "settings"), tuple(found), frozenset({0, 2, 3, 5, 6, 7, 8}))


def memory(book: Book) -> Section | None:
    items = []
    rows = [row for row in book.rows if row.suite == "model" and row.peak_bytes]
    for key in dict.fromkeys((row.device, row.dtype, row.model) for row in rows):
        device, dtype, model = key
        own = [row for row in rows if (row.device, row.dtype, row.model) == key]
        figure = Bars(
            name=f"memory {model} {dtype} {device}",
            title=f"{model}, {dtype}",
            says=_memory_says(own),
            evidence=_memory_evidence(own),
            unit="MB",
            limit_name="",
            groups=tuple(
                (f"batch {batch}", tuple(_memory_bar(book, row) for row in some)) for batch, some in _sized(own)
            ),
        )
        values = tuple(
            (str(batch), row.contender, f"{(row.peak_bytes or 0) / 1e6:,.1f}")
            for batch, some in _sized(own)
            for row in some
        )
        table = Table(("batch", "contender", "MB"), values, frozenset({0, 2}))
        items.append(Item(figure.title, figure, table, folded=bool(items) and model != FIRST_MODEL))
    note = "Most memory that a pass holds beyond its input and its weights. Shorter is better."
    return Section("memory", "Memory", tuple(items), note) if items else None


def _sized(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    found: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.contender != OURS, row.peak_bytes)):
        found.setdefault(row.shape.get("batch", row.images), []).append(row)
    return sorted(found.items())


def _memory_bar(book: Book, row: Row) -> Bar:
    size = (row.peak_bytes or 0) / 1e6
    label = f"{size:,.0f} MB" if size >= 10 else f"{size:.2g} MB"
    return Bar(row.contender, size, label, book.colours[row.contender], modelled=row.source != "gpu")


def _memory_evidence(rows: Sequence[Row]) -> str:
    """Rows are of one device: PyTorch's allocator knows a GPU's peak, everywhere else allocations are counted."""
    device, sources = rows[0].device, {row.source for row in rows}
    counted = "counted from recorded allocations"
    if "gpu" in sources:
        return f"measured on {device}" + (f"; the rest {counted}" if len(sources) > 1 else "")
    return f"{counted} on {device}" if "cpu" in sources else f"{counted}, no GPU used"


def _memory_says(rows: Sequence[Row]) -> str:
    batch, some = _sized(rows)[-1]
    other = next((row for row in some if not is_ours(row)), None)
    if some[0].contender != OURS or other is None:
        return ""
    ours = some[0].peak_bytes
    return f"At batch {batch} ours holds {(ours or 0) / (other.peak_bytes or 1):.2f} times what {other.contender} does."


def _planned(book: Book) -> list[Row]:
    """Rows of ours that know their kernels: of one model, device and dtype, measured ones before others."""
    rows = [row for row in book.passes if row.contender == OURS]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.device, row.dtype), []).append(row)
    order = sorted(groups, key=lambda key: (key[0] != FIRST_MODEL, groups[key][0].source != "gpu"))
    return sorted(groups[order[0]], key=lambda row: row.images) if order else []


def breakdown(book: Book) -> Section | None:
    rows = _planned(book)
    if not rows:
        return None
    strips, table = [], []
    for row in rows:
        block = [one for one in kernels_of(row) if one["launch"] in _IN_BLOCK]
        total = sum(one["s"] for one in block)
        parts = tuple(Part(_name(one), one["s"], _hover(one), _PART_COLOURS.get(_name(one), _OUTSIDE)) for one in block)
        strips.append((f"batch {row.images}, {evidence_of(row)}", f"{microseconds(total)} µs a block", parts))
        table += [(str(row.images), *_kernel_cells(one, total)) for one in block]
    last = rows[-1]
    longest = max((one for one in kernels_of(last) if one["launch"] in _IN_BLOCK), key=lambda one: one["s"])
    figure = Strips(
        name=f"block {last.model} {last.dtype} {last.device}",
        title=f"One encoder block of {last.model}, {last.dtype}",
        says=f"At batch {last.images} most of it is {_name(longest)}, {longest['s'] * 1e6:,.0f} µs.",
        evidence=evidence(rows),
        strips=tuple(strips),
    )
    heads = ("batch", "launch", "kernel", "µs", "share", "bound, µs", "bound by", "tile", "waves", "registers")
    items = [Item(figure.title, figure, Table(heads, tuple(table), frozenset({0, 3, 4, 5, 8, 9})))]
    items += _traffic(last)
    return Section("block", "Where the time of a block goes", tuple(items), "Each strip is one block, cut to scale.")


def _name(kernel: dict[str, Any]) -> str:
    return str(kernel["launch"]).removeprefix("final norm, ").replace("class token", "final norm")


def _hover(kernel: dict[str, Any]) -> str:
    bound = f", bound {microseconds(kernel['bound_s'])} µs" if kernel.get("bound_s") else ""
    return f"{kernel['launch']}: {microseconds(kernel['s'])} µs{bound} ({kernel['kernel']})"


def _kernel_cells(kernel: dict[str, Any], total: float) -> tuple[str, ...]:
    tile = kernel.get("tile", {})
    return (
        str(kernel["launch"]),
        str(kernel["kernel"]),
        microseconds(kernel["s"]),
        percent(kernel["s"] / total),
        microseconds(kernel["bound_s"]) if kernel.get("bound_s") is not None else "",
        str(kernel.get("bound", "")),
        "x".join(map(str, tile.values() if isinstance(tile, dict) else [tile])),
        f"{kernel['waves']:.2f}" if "waves" in kernel else "",
        str(kernel.get("registers", "")),
    )


def _traffic(row: Row) -> list[Item]:
    """What a block moves, where the benchmark counted it."""
    block = row.code.get("block")
    if not block:
        return []
    quoted = block.get("quoted", {})
    names = {OURS: block["ours"], "eager PyTorch": block["eager"], **quoted}
    rows = tuple(
        (
            name + (" (quoted)" if name in quoted else ""),
            str(one.get("launches", one.get("operators", ""))),
            f"{one['activations']:.1f}",
            f"{one['weight_bytes'] / 1e6:.1f}" if "weight_bytes" in one else "",
        )
        for name, one in names.items()
    )
    heads = ("who", "launches a block", "activations, elements per token and width", "weights, MB")
    said = "; ".join(str(one["quoted for"]) for one in quoted.values() if "quoted for" in one)
    note = f"Counted, each operand once. Quoted: {said}." if said else "Counted, each operand once."
    return [Item("What a block moves", table=Table(heads, rows, frozenset({1, 2, 3})), note=note)]


def timeline(book: Book) -> Section | None:
    """Every launch of one pass to scale, and one block of it."""
    rows = _planned(book)
    if not rows:
        return None
    row = min(rows, key=lambda row: abs(row.images - 8))
    kernels = kernels_of(row)
    block = [one for one in kernels if one["launch"] in _IN_BLOCK]
    first = kernels.index(block[0])
    order = [*kernels[:first], *block * int(block[0]["times"]), *kernels[first + len(block) :]]
    strips = []
    for label, some in ((f"forward, {len(order)} launches", order), ("one block", block)):
        parts = tuple(Part(_name(one), one["s"], _hover(one), _PART_COLOURS.get(_name(one), _OUTSIDE)) for one in some)
        strips.append((label, f"{microseconds(sum(one['s'] for one in some))} µs", parts))
    figure = Strips(
        name=f"timeline {row.model} {row.dtype} {row.device}",
        title=f"{row.model}, batch {row.images}, {row.dtype}",
        says="Kernels one behind the other, without what lies between them.",
        evidence=evidence([row]),
        strips=tuple(strips),
    )
    total = sum(one["s"] for one in order)
    heads = (
        "launch",
        "kernel",
        "µs each",
        "share of pass",
        "bound, µs",
        "bound by",
        "tile",
        "waves",
        "registers",
        "times",
    )
    cells = []
    for one in kernels:
        name, kernel, each, _, *rest = _kernel_cells(one, total)
        cells.append((name, kernel, each, percent(one["s"] * one["times"] / total), *rest, str(one["times"])))
    table = Table(heads, tuple(cells), frozenset({2, 3, 4, 7, 8, 9}))
    return Section("timeline", "Launch timeline", (Item(figure.title, figure, table),))
