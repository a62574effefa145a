"""``vit-engine warmup``: all kernels of a model, compiled ahead of time for one GPU, which need not be here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .in_child import compile_in_child

_DTYPES = ("fp32", "fp16", "bf16")


def warmup_command(
    model: Annotated[
        str,
        typer.Option("--model", help="A preset, or timm:NAME, torchvision:NAME, transformers:NAME for accelerate()."),
    ],
    gpu: Annotated[
        str,
        typer.Option("--gpu", help="h100, h200, a100, rtx4090, rtx3090, b200, rtx5090, sm_90 etc., or sm_89:58."),
    ],
    into: Annotated[Path, typer.Option("--into", help="Folder to write; new, or empty.")],
    batch: Annotated[list[int], typer.Option("--batch", min=1, help="Images per forward pass.")],
    more: Annotated[
        list[int] | None, typer.Argument(metavar="BATCH", min=1, help="More of them: --batch 1 8 64.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, fp16 or bf16.")] = "bf16",
    tuned: Annotated[
        Path | None, typer.Option("--tuned", help="A file of vit-engine tune whose winners the server will launch.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Compile all kernels of a model into a folder that vit_engine.load_kernels() loads without compiling."""
    batches = sorted({*batch, *(more or ())})
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(_DTYPES)}", param_hint="--dtype")
    if os.environ.get("TRITON_INTERPRET"):
        # Triton decides at its import whether it compiles, and this process may be past that.
        words = ["--model", model, "--gpu", gpu, "--into", str(into), "--dtype", dtype]
        words += [word for size in batches for word in ("--batch", str(size))]
        words += ["--tuned", str(tuned)] if tuned is not None else []
        raise typer.Exit(compile_in_child(["warmup", *words, *["--json"] * as_json]))
    from vit_bench import recording, warmup

    with _named("--model"):
        warmup.find(model)
    with _named("--gpu"):
        recording.target(gpu)
    with _named("--into"):
        _check_folder(into)
    with _named("--tuned"):
        if tuned is not None:
            warmup.tuned_for(tuned, gpu)
    try:
        made = warmup.compile_model(model, gpu, batches, dtype, into, tuned)
    except warmup.BatchError as error:
        raise typer.BadParameter(str(error), param_hint="--batch") from error
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--into") from error
    size = sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
    if as_json:
        print(json.dumps({"into": str(into), "kernels": made.kernels, "bytes": size, "versions": made.versions}))
        return
    shapes = ", ".join("x".join(map(str, shape)) for shape in made.shapes)
    print(f"{made.kernels} kernels of {model}, {dtype}, for {gpu}: images {shapes}; compiled only, nothing was run")
    print(f"{into}: {size / 1e6:.1f} MB. On the server: vit_engine.load_kernels({str(into)!r})")


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Whatever is refused in this block is the fault of that option."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _check_folder(folder: Path) -> None:
    """Refuses, before anything is compiled, a folder that could not be written afterwards."""
    from vit_engine.artefacts import check_empty

    check_empty(folder)
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise ValueError(f"{folder} cannot be made: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: no permission to write in {there}")
