"""What is no figure: accuracy, environments, and what was not run, with the reasons."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vit_bench
from vit_bench import records
from vit_bench.report.data import Book, Item, Section, Table
from vit_bench.results import Row, Run

EVIDENCE = Path(vit_bench.__file__).parent.parent / "evidence"  # of a checkout; an installed package has none


def digits() -> tuple[int, int]:
    """(right, all) of the held-out digits, read by the bundled classifier on the CPU, fp32, the torch backend."""
    from vit_engine import digits
    from vit_engine.checkpoint import load_model
    from vit_engine.images import load_image

    model = load_model(digits.CHECKPOINT, backend="torch")
    images = digits.heldout()
    size, channels = model.config.image_hw, model.config.in_channels
    pixels = torch.stack([load_image(path, size, channels=channels).pixels for path in images])
    with torch.inference_mode():
        found = model(pixels).argmax(-1).tolist()
    right = sum(digits.LABELS[one] == label for one, label in zip(found, images.values(), strict=True))
    return right, len(images)


def accuracy(book: Book, evidence: Path = EVIDENCE) -> Section:
    right, every = digits()
    said = (
        f"The bundled digit classifier reads {right} of {every} held-out images ({right / every:.2%}) on this "
        "machine's CPU, fp32, by PyTorch's operators. "
        "A kernel may be twice as wrong as PyTorch at the same precision, plus two units in the last place."
    )
    timed = [row for row in book.rows if row.errors.get("row_allowed")]
    items = []
    if timed:
        items.append(Item("What was timed, compared with float64 first", table=_errors(timed)))
    shown = _records(evidence)
    if shown.rows:
        items.append(Item("Every kernel's cases, with the source at hand", table=shown, folded=bool(timed)))
    return Section("accuracy", "Accuracy", tuple(items), said)


def _errors(rows: Sequence[Row]) -> Table:
    """The row of each contender, dtype and device that came nearest to what is allowed."""
    worst: dict[tuple[str, ...], Row] = {}
    count: dict[tuple[str, ...], int] = {}
    for row in rows:
        key = row.contender, row.suite, row.dtype, row.device
        count[key] = count.get(key, 0) + 1
        if key not in worst or _share(row) > _share(worst[key]):
            worst[key] = row
    cells = tuple(
        (
            *key,
            str(count[key]),
            row.case,
            f"{row.errors['row']:.1e}",
            f"{row.errors['row_allowed']:.1e}",
            f"{_share(row):.0%}",
        )
        for key, row in worst.items()
    )
    heads = (
        "contender",
        "suite",
        "dtype",
        "device",
        "cases",
        "nearest to the limit",
        "row error",
        "allowed",
        "of allowed",
    )
    return Table(heads, cells, frozenset({4, 6, 7, 8}))


def _share(row: Row) -> float:
    return row.errors["row"] / row.errors["row_allowed"]


def _records(folder: Path) -> Table:
    """Of each kernel, dtype and rung with figures: the comparison that came nearest to what is allowed."""
    hashes = functools.cache(records.source_hash)
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for rung in ("executed", "emulated", "interpreted"):
        for record in records.load(folder / f"{rung}.json"):
            if record.passed and record.source == hashes(record.kernel):
                outputs = [one for case in record.detail.get("passed", {}).values() for one in case.values()]
                known = [one for one in outputs if isinstance(one, dict) and one.get("row_allowed")]
                found.setdefault((record.kernel, record.dtype, rung), []).extend(known)
    cells = []
    for key, figures in sorted(found.items()):
        if figures:
            worst = max(figures, key=lambda one: one["row"] / one["row_allowed"])
            share = worst["row"] / worst["row_allowed"]
            cells.append(
                (*key, str(len(figures)), f"{worst['row']:.1e}", f"{worst['row_allowed']:.1e}", f"{share:.0%}")
            )
    heads = ("kernel", "dtype", "rung", "comparisons", "row error nearest to the limit", "allowed", "of allowed")
    return Table(heads, tuple(cells), frozenset({3, 4, 5, 6}))


def environment(book: Book) -> Section:
    items = []
    for number, run in reversed(list(enumerate(book.results.runs))):
        count = sum(row.run == number for row in book.results.rows)
        title = f"{run.started[:16].replace('T', ' ')} UTC: {count} rows"
        items.append(Item(title, table=Table(("", ""), tuple(_flat(run))), folded=bool(items)))
    return Section("environment", "Environment", tuple(items))


def _flat(run: Run) -> list[tuple[str, str]]:
    found = [("command", run.command)]
    for name, value in run.environment.items():
        if name == "kernel_sources" or value is None:
            continue
        found.append((name.replace("_", " "), _words(value)))
    if run.datasheet:
        sheet = run.datasheet
        words = [f"{sheet['half'] / 1e12:,.0f} TFLOP/s in 16 bits"] if "half" in sheet else []
        words += [f"{sheet['single'] / 1e12:,.0f} in fp32"] if "single" in sheet else []
        words += [f"{sheet['bandwidth'] / 1e12:.3g} TB/s"] if "bandwidth" in sheet else []
        found.append(("datasheet", ", ".join(words)))
    if run.ceilings:
        matmul = ", ".join(f"{dtype} {rate / 1e12:,.3g} TFLOP/s" for dtype, rate in run.ceilings.matmul.items())
        found.append(("reached by a large copy and product", f"{run.ceilings.copy / 1e12:.3g} TB/s; {matmul}"))
    return found


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items() if one is not None)
    return str(value)


def not_run(book: Book) -> Section | None:
    """Reasons, and who is concerned where."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in book.rows:
        if row.source == "not run":
            found.setdefault((row.contender, row.reason), []).append(f"{row.case} {row.dtype}")
    cells = tuple(
        (name, reason, cases[0] + (f" and {len(cases) - 1} more" if len(cases) > 1 else ""))
        for (name, reason), cases in found.items()
    )
    if not cells:
        return None
    intro = "Neither faster nor slower: nothing is known of these."
    return Section("not-run", "Not run", (Item("", table=Table(("contender", "why", "case"), cells)),), intro)
