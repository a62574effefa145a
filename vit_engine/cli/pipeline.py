"""``vit-engine run`` from its options to its result, without printing the result."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import digits
from ..checkpoint import read_metadata
from ..images import ImageError, find_images
from ..vit import ViT
from . import report
from .child import ChildError
from .classify import DTYPES, Child, Outcome, Preparation, Source, Timed, agreement, classify, disagreement
from .interrupt import INTERRUPTED, termination_as_interrupt
from .labels import labels_from_json, read_labels, read_truth

ALL_FINE, SOME_FAILED, NOTHING_USABLE = 0, 1, 2
_CHECKED, _CHECKED_IN_INTERPRETER = 8, 1


class UsageError(Exception):
    """Nothing can be done with what was asked for; the message is for the user."""


@dataclass(frozen=True)
class Options:
    """The options of ``vit-engine run``, under the names they have there."""

    images: tuple[str, ...]
    checkpoint: Path | None
    model: str | None
    labels: Path | None
    truth: Path | None
    device: str
    dtype: str
    backend: str
    batch_size: int
    top_k: int
    resize: str
    crop_fraction: float
    check: int | None


def execute(options: Options) -> tuple[int, dict[str, Any]]:
    """Exit code and the object that ``--json`` prints. Files that fail are named on stderr as they come.

    Raises UsageError when there is nothing to run.
    """
    device = _device(options.device)
    if options.backend == "interpret" and options.dtype == "bf16":
        raise UsageError("Triton's interpreter computes bfloat16 wrongly: use --dtype fp32 or fp16 with it")
    if options.backend == "interpret" and device.type != "cpu":
        raise UsageError(f"the interpreter runs on the CPU, not on {device}: add --device cpu")
    _check_device(device)
    with _usage_errors(), warnings.catch_warnings():
        # Pillow warns about odd metadata and large images; what matters of it becomes one line per file.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        paths, errors, truth = _inputs(options)
        labels = None if options.labels is None else read_labels(options.labels)
        source = Source(options.checkpoint or digits.CHECKPOINT, options.model, None if labels is None else len(labels))
        return _classify_and_compare(options, device, source, paths, errors, labels, truth)


def _classify_and_compare(
    options: Options,
    device: torch.device,
    source: Source,
    paths: Sequence[Path],
    errors: Sequence[ImageError],
    labels: Sequence[str] | None,
    truth: dict[Path, str],
) -> tuple[int, dict[str, Any]]:
    dtype = DTYPES[options.dtype]
    interpreted = options.backend == "interpret"
    model = source.open(backend="torch" if interpreted else options.backend, device=device, dtype=dtype)
    labels = _labels_for(model, options, labels)
    backend = "interpret" if interpreted else model.backend
    preparation = Preparation(model.config.image_hw, model.config.in_channels, options.resize, options.crop_fraction)
    outcome, interrupted, compared, problems = Outcome(backend), False, None, []
    try:
        with termination_as_interrupt():
            with _progress(len(paths), errors) as tick:
                classify(
                    paths,
                    preparation,
                    Child(model, dtype) if interpreted else Timed(model),
                    outcome,
                    batch_size=options.batch_size,
                    top_k=options.top_k,
                    sample_size=_sample_size(options, device),
                    report=tick,
                )
            compared, problems = _compare(source, outcome, device, dtype)
    except KeyboardInterrupt:
        interrupted = True
        done = len(outcome.predictions) + len(outcome.errors)
        problems = [f"interrupted: {done} of {len(paths)} images done, kernels and PyTorch not compared"]
        print(f"vit-engine run: {problems[0]}", file=sys.stderr)
    outcome.errors[:0] = errors
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    result = report.as_json(outcome, labels, truth, compared, problems, name, options.dtype)
    if interrupted:
        return INTERRUPTED, result
    if not outcome.predictions:
        return NOTHING_USABLE, result
    return SOME_FAILED if outcome.errors or problems else ALL_FINE, result


def _inputs(options: Options) -> tuple[list[Path], list[ImageError], dict[Path, str]]:
    truth = {} if options.truth is None else read_truth(options.truth)
    if options.images:
        paths, errors = find_images(options.images)
        if options.truth is not None and paths and not any(path.resolve() in truth for path in paths):
            folder = options.truth.parent
            print(f"vit-engine run: no image is named in {options.truth} (names count from {folder})", file=sys.stderr)
        return paths, errors, truth
    if options.checkpoint is not None:
        raise UsageError("--checkpoint needs images: name files or folders")
    known = digits.heldout()
    return list(known), [], truth or {path.resolve(): label for path, label in known.items()}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such kind of device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: PyTorch sees {count} GPUs here; use --device cpu or auto")
    return device


def _check_device(device: torch.device) -> None:
    """Raises UsageError unless tensors can have values there."""
    if device.type == "meta":
        raise UsageError(f"--device {device}: it computes no values; use auto, cpu, cuda or cuda:N")
    try:
        torch.empty(1, device=device)
    except Exception as error:  # a PyTorch built without that kind of device says so in many ways
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--device {device}: {reason}; use auto, cpu, cuda or cuda:N") from error


def _labels_for(model: ViT, options: Options, labels: Sequence[str] | None) -> Sequence[str] | None:
    classes = model.config.num_classes
    if not classes:
        raise UsageError(f"{options.checkpoint} has no classifier (num_classes is 0): nothing to tell classes by")
    if options.checkpoint is None and labels is None:
        return digits.LABELS
    if labels is None and options.checkpoint is not None and options.checkpoint.suffix.lower() == ".safetensors":
        text = read_metadata(options.checkpoint).get("labels")
        labels = None if text is None else labels_from_json(text, f"{options.checkpoint}, labels in its metadata")
    if labels is not None and len(labels) != classes:
        raise UsageError(f"{len(labels)} class names for a model with {classes} classes")
    return labels


def _sample_size(options: Options, device: torch.device) -> int:
    if options.check is not None:
        return options.check
    if find_spec("triton") is None:
        print("vit-engine run: no kernels to compare PyTorch with: triton is not installed", file=sys.stderr)
        return 0
    # A large model takes minutes per image in the interpreter; the bundled one takes about a second.
    slow = device.type != "cuda" and options.checkpoint is not None
    return _CHECKED_IN_INTERPRETER if slow else _CHECKED


def _compare(
    source: Source, outcome: Outcome, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Any] | None, list[str]]:
    problems: list[str] = []
    compared = None
    try:
        compared = agreement(source, outcome, device, dtype)
        if compared is not None:
            problems += filter(None, [disagreement(compared)])
    except (ChildError, RuntimeError) as error:
        problems.append(f"kernels and PyTorch could not be compared: {str(error).splitlines()[0]}")
    for problem in problems:
        print(f"vit-engine run: {problem}", file=sys.stderr)
    return compared, problems


@contextmanager
def _usage_errors() -> Iterator[None]:
    """What cannot be worked around becomes one message instead of a traceback."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError("not enough GPU memory: try a smaller --batch-size, or --dtype bf16") from error
    except ChildError as error:
        raise UsageError(f"the kernels failed in Triton's interpreter: {error}") from error
    # CheckpointError and LabelError are ValueErrors; a backend that cannot run raises RuntimeError with the way out.
    except (ValueError, OSError, RuntimeError) as error:
        raise UsageError(str(error)) from error


@contextmanager
def _progress(total: int, errors: Sequence[ImageError]) -> Iterator[Callable[[ImageError | None], None]]:
    """A bar on stderr if that is a terminal, and a line there for every file that failed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=total)

        def tick(error: ImageError | None) -> None:
            if error is not None:
                bar.console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            bar.advance(task)

        for error in errors:
            bar.console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        yield tick
