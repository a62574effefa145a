"""``vit-engine report``: results of benchmarks and profiles as one HTML page, and as plots for papers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .given import refuse_beside
from .in_child import compile_in_child
from .outputs import check_apart, check_file

if TYPE_CHECKING:
    from vit_bench.results import Results

_DTYPES = ("fp32", "fp16", "bf16")


def report_command(
    context: typer.Context,
    results: Annotated[
        list[Path] | None, typer.Argument(help="Files of vit-engine bench and profile; none: compiled here.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
    plots: Annotated[Path | None, typer.Option("--plots", help="Folder for PNG and SVG plots, by matplotlib.")] = None,
    model: Annotated[str, typer.Option("--model", help="Without results: a preset's name.")] = "vit_base_patch16_224",
    gpu: Annotated[str, typer.Option("--gpu", help="Without results: h100, a100, rtx4090, or sm_90 etc.")] = "h100",
    dtype: Annotated[str, typer.Option("--dtype", help="Without results: fp32, fp16 or bf16.")] = "bf16",
) -> None:
    """One HTML page that needs no network: throughput, attention, roofline, where time goes, memory, accuracy.

    Every figure says whether it was measured or modelled. Without files the page is made from compiled code, bounds and
    modelled times, on any machine.
    """
    if results:
        why = "the page is made from these files, and has no use for"
        refuse_beside(context, "RESULTS", why, but=("results", "out", "plots"))
    check_file("--out", out)
    check_apart({"--out": out}, results or ())
    if plots is not None:
        _check_folder(plots)
        _need_matplotlib()
    if results:
        _write(_loaded(results), out, plots)
        return
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(_DTYPES)}", param_hint="--dtype")
    if os.environ.get("TRITON_INTERPRET"):
        # Triton decides at its import whether it compiles, and this process may be past that.
        words = ["--out", str(out), *(["--plots", str(plots)] if plots else [])]
        raise typer.Exit(compile_in_child(["report", *words, "--model", model, "--gpu", gpu, "--dtype", dtype]))
    _write(_compiled(model, gpu, dtype), out, plots)


def _check_folder(plots: Path) -> None:
    """Refuses a path that is, or goes through, something that is no folder: it could not be made."""
    there = next(path for path in (plots.absolute(), *plots.absolute().parents) if path.exists())
    if not there.is_dir():
        raise typer.BadParameter(f"{plots}: {there} is no folder", param_hint="--plots")


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        typer.echo('vit-engine report: --plots needs matplotlib: pip install "vit-engine[plots]"', err=True)
        raise typer.Exit(2)


def _loaded(paths: list[Path]) -> Results:
    from vit_bench.report.data import merged
    from vit_bench.results import load

    found = []
    try:
        for path in paths:
            found.append(load(path))
            for row in found[-1].rows:
                if row.suite in ("kernels", "model") and row.source != "not run" and "batch" not in row.shape:
                    raise ValueError(f"{path}: damaged benchmark results: the shape of {row.case} has no batch")
        return merged(found)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="RESULTS") from error


def _compiled(model: str, gpu: str, dtype: str) -> Results:
    from rich.console import Console

    from vit_bench import recording
    from vit_bench.report.compiled import compiled_results
    from vit_engine import ViTConfig

    for option, known, name in (("--model", ViTConfig.preset, model), ("--gpu", recording.gpu, gpu)):
        try:
            known(name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=option) from error
    command = " ".join(["vit-engine", *sys.argv[1:]])
    with Console(file=sys.stderr).status("compiling") as status:
        return compiled_results(model, gpu, dtype, command, progress=lambda at: status.update(f"compiling: {at}"))


def _write(results: Results, out: Path, plots: Path | None) -> None:
    from vit_bench.report.page import page

    # Half a surrogate pair, which JSON can hold and UTF-8 cannot, is shown as an escape.
    out.write_text(page(results), encoding="utf-8", errors="backslashreplace")
    typer.echo(f"{out}: {out.stat().st_size / 1e3:.0f} kB, {len(results.rows)} rows")
    if plots is not None:
        from vit_bench.report.plots import write_plots

        for path in write_plots(results, plots):
            typer.echo(str(path))
