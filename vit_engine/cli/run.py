"""``vit-engine run``: image files in, classes out."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

_BUNDLED_SHOWN = 10


class DType(str, Enum):
    """Precisions of the forward pass."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Backend(str, Enum):
    """What the forward pass runs on; see vit_engine.ViT."""

    auto = "auto"
    torch = "torch"
    triton = "triton"
    interpret = "interpret"


class Resize(str, Enum):
    """How images are brought to the model's size; see vit_engine.images.load_image."""

    crop = "crop"
    squash = "squash"
    pad = "pad"


def run_command(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGES or FOLDER", help="Image files, and folders to search for image files."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights (*.safetensors, *.npz). Without: the bundled digit classifier.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Architecture by timm's name, for a checkpoint that does not describe its model itself."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Class names: text with one per line, or a JSON list or mapping.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="CSV file with the columns file and label: prints the accuracy.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[DType, typer.Option(help="Precision. fp16 and bf16 are much faster on a GPU.")] = DType.fp32,
    backend: Annotated[
        Backend, typer.Option(help="auto is triton on an NVIDIA GPU and torch elsewhere; interpret is slow.")
    ] = Backend.auto,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    top_k: Annotated[int, typer.Option(min=1, help="Classes reported per image.")] = 3,
    resize: Annotated[
        Resize, typer.Option(help="crop the centre, squash to the shape, or pad with white.")
    ] = Resize.crop,
    crop_fraction: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, help="With crop: share of the largest crop that is used (timm's ViTs at 224: 0.9)."
        ),
    ] = 1.0,
    check: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Images on which kernels and PyTorch are compared; 0 for none. Default: 8, but 1 in the interpreter "
            "with a checkpoint of your own, because that can take minutes for a large model, and 0 without Triton.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Classify images. Without arguments: the bundled digit classifier on the digits held out from its training.

    Files that cannot be used are named on stderr and the others are classified.

    Exit code: 0 all fine, 1 some files failed or kernels and PyTorch disagree, 2 wrong usage or nothing usable, 130
    interrupted (Ctrl-C), which prints the images that were classified before.
    """
    from .pipeline import NOTHING_USABLE, Options, UsageError, execute

    options = Options(
        images=tuple(images or ()),
        checkpoint=checkpoint,
        model=model,
        labels=labels,
        truth=truth,
        device=device,
        dtype=dtype.value,
        backend=backend.value,
        batch_size=batch_size,
        top_k=top_k,
        resize=resize.value,
        crop_fraction=crop_fraction,
        check=check,
    )
    try:
        code, result = execute(options)
    except UsageError as error:
        print(f"vit-engine run: {error}", file=sys.stderr)
        raise typer.Exit(NOTHING_USABLE) from None
    if as_json:
        print(json.dumps(result, allow_nan=False))
    elif result["predictions"]:
        from .report import print_report

        print_report(result, None if images else _BUNDLED_SHOWN)
    raise typer.Exit(code)
