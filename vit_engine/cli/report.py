"""What ``vit-engine run`` prints: one JSON object, or a table and a few lines."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..images import printable

if TYPE_CHECKING:
    from .classify import Outcome, Prediction


def versions() -> dict[str, str | None]:
    """Versions of what computes; None for what is not installed. Imports nothing."""
    from vit_engine import __version__

    found: dict[str, str | None] = {"vit_engine": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "safetensors", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def name_of(labels: Sequence[str] | None, number: int) -> str:
    """The class name, or the number of the output where there are no names."""
    return str(number) if labels is None else labels[number]


def truth_of(prediction: Prediction, truth: dict[Path, str]) -> str | None:
    """The true label of the image, where it is known."""
    return truth.get(prediction.path.resolve()) if truth else None


def accuracy_of(outcome: Outcome, labels: Sequence[str] | None, truth: dict[Path, str]) -> tuple[int, int]:
    """(right, judged): images whose best class is the true one, and images whose true label is known."""
    pairs = [(truth_of(prediction, truth), prediction) for prediction in outcome.predictions]
    judged = [(label, prediction) for label, prediction in pairs if label is not None]
    return sum(name_of(labels, prediction.top[0][0]) == label for label, prediction in judged), len(judged)


def as_json(
    outcome: Outcome,
    labels: Sequence[str] | None,
    truth: dict[Path, str],
    agreement: dict[str, Any] | None,
    problems: Sequence[str],
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """The object that ``--json`` prints."""
    right, judged = accuracy_of(outcome, labels, truth)
    predictions = []
    for prediction in outcome.predictions:
        top = [
            {"index": number, "label": name_of(labels, number), "probability": round(probability, 6)}
            for number, probability in prediction.top
        ]
        entry: dict[str, Any] = {"file": str(prediction.path), **top[0], "top": top}
        true_label = truth_of(prediction, truth)
        if true_label is not None:
            entry["truth"] = true_label
        if prediction.note is not None:
            entry["note"] = prediction.note
        predictions.append(entry)
    rate = outcome.images_per_second
    return {
        "predictions": predictions,
        "accuracy": round(right / judged, 6) if judged else None,
        "backend": outcome.backend,
        "agreement": agreement,
        "images_per_second": None if rate is None else round(rate, 3),
        "device": device,
        "dtype": dtype,
        "versions": versions(),
        "errors": [{"file": str(error.path), "reason": error.reason} for error in outcome.errors]
        + [{"file": None, "reason": problem} for problem in problems],
    }


def print_report(result: dict[str, Any], shown: int | None) -> None:
    """The same for people: a table of the first ``shown`` predictions (all for None) and what was measured."""
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Tables in files and pipes are not cut to the width of a terminal that is not there.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    predictions = result["predictions"]
    if predictions:
        known = any("truth" in prediction for prediction in predictions)
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        table.add_column("image", overflow="fold")
        table.add_column("class")
        table.add_column("probability", justify="right")
        if known:
            table.add_column("true class")
        table.add_column("next best")
        for prediction in predictions[:shown]:
            rest = ", ".join(f"{printable(t['label'])} {t['probability']:.1%}" for t in prediction["top"][1:])
            cells = [_shorten(prediction["file"], len(predictions) > 1), prediction["label"]]
            cells.append(f"{prediction['probability']:.1%}")
            if known:
                true = prediction.get("truth", "")
                cells.append(true if true in ("", prediction["label"]) else f"{true} (wrong)")
            table.add_row(*(Text(printable(cell)) for cell in (*cells, rest)))
        console.print(table)
        if shown is not None and len(predictions) > shown:
            console.print(f"... and {len(predictions) - shown} more (--json gives all)")
        console.print()
    for line in summary(result):
        console.print(Text(line), soft_wrap=True)


def _shorten(file: str, several: bool) -> str:
    path = Path(file)
    return str(Path(path.parent.name, path.name)) if several and path.is_absolute() else file


def summary(result: dict[str, Any]) -> list[str]:
    """What was measured, a line each."""
    count, lines = len(result["predictions"]), []
    if result["accuracy"] is not None:
        judged = [p for p in result["predictions"] if "truth" in p]
        right = sum(p["truth"] == p["label"] for p in judged)
        lines.append(f"accuracy    {right / len(judged):.2%} ({right} of {len(judged)} images)")
    lines.append(f"backend     {result['backend']} on {result['device']}, {result['dtype']}")
    rate = result["images_per_second"]
    if rate:
        lines.append(f"time        {count / rate:.3g} s for {count} images, {rate:,.0f} images/s (forward pass alone)")
    agreement = result["agreement"]
    if agreement is not None:
        how = "Triton's interpreter" if agreement["kernels"] == "interpret" else "Triton on the GPU"
        same = round(agreement["top1"] * agreement["images"])
        error, scale = agreement["max_abs_error"], agreement["max_abs_logit"]
        finite = error is not None and scale is not None
        largest = f"{error:.2g} (logits up to {scale:.2g})" if finite else "not finite"
        lines.append(
            f"agreement   kernels in {how} ({agreement['dtype']}) and PyTorch (fp32): "
            f"same class for {same} of {agreement['images']} images, "
            f"largest logit error {largest}"
        )
    installed = result["versions"]
    shown = (f"{name} {installed[name] or 'not installed'}" for name in ("vit_engine", "torch", "triton", "python"))
    lines.append("versions    " + ", ".join(shown))
    return lines
