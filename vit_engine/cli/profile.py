"""``vit-engine profile``: attention over sequence lengths and head counts, and a forward pass kernel by kernel."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .in_child import compile_in_child
from .inspect import check_batches
from .interrupt import INTERRUPTED, termination_as_interrupt
from .outputs import check_apart, check_file
from .tables import plain_console

if TYPE_CHECKING:
    import torch

    from vit_bench.profiling.sweep import Point
    from vit_bench.profiling.trace import Range
    from vit_bench.results import Row, Run
    from vit_engine.config import ViTConfig
    from vit_kernels.device import Device

_DTYPES = ("fp32", "fp16", "bf16")
_WITHOUT = "h100"  # modelled where there is no GPU and none was named

profile_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Where time goes: measured on a GPU, modelled without one.",
)

Model = Annotated[str, typer.Option("--model", help="A preset's name, such as vit_base_patch16_224.")]
Dtype = Annotated[str, typer.Option("--dtype", help="fp32, fp16 or bf16.")]
Gpu = Annotated[
    str, typer.Option("--gpu", help="Model this GPU instead of measuring: h100, a100, rtx4090, or sm_90 etc.")
]
Out = Annotated[Path | None, typer.Option("--out", help="File of results to add to, for vit-engine report.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="The same as a table, written anew.")]
Trace = Annotated[Path | None, typer.Option("--trace", help="A trace for ui.perfetto.dev or chrome://tracing.")]


@dataclass(frozen=True)
class _Where:
    """gpu: the one at hand, None where times are modelled; device: that whose datasheet counts, None for none."""

    name: str
    device: Device | None
    gpu: torch.device | None = None

    def times(self, modelled: bool) -> str:
        """What times are. modelled: whether there is a model for this GPU and precision."""
        if self.gpu is not None:
            return f"measured: {self.name}"
        words = "modelled, not measured" if modelled else "bound by datasheet, neither modelled nor measured"
        return f"{words}: {self.name}"

    def how_far_off(self, modelled: bool) -> str:
        """What to say of modelled times, if these are."""
        if self.gpu is not None or not modelled or self.device is None:
            return ""
        from vit_bench.modelled import how_far_off

        return how_far_off(self.device)


@profile_app.command("attention")
def attention_command(
    context: typer.Context,
    model: Model = "vit_base_patch16_224",
    tokens: Annotated[str, typer.Option("--tokens", help="Sequence lengths, FIRST:LAST or one.")] = "50:16384",
    heads: Annotated[str, typer.Option("--heads", help="Head counts at the model's own length.")] = "1:32",
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Images; by default as many as have 16384 tokens together.")
    ] = None,
    dtype: Dtype = "bf16",
    gpu: Gpu = "",
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what --out has of this GPU and dtype.")] = False,
    csv: Csv = None,
    trace: Trace = None,
) -> None:
    """Attention's throughput over sequence lengths and head counts: our kernel beside those that are installed.

    On a GPU everything is compared with float64, then timed in CUDA graphs with a cold L2 cache. Without one, or with
    --gpu, our kernel is compiled, bounded by the datasheet and modelled. Ctrl-C keeps what was done.
    """
    if resume and out is None:
        raise typer.BadParameter("it goes on with the file of --out, and there is none", param_hint="--resume")
    where, config = _begin(context, model, dtype, gpu)
    from vit_bench.profiling.attention import ranges, rows_not_run
    from vit_bench.profiling.sweep import points, span

    try:
        found = points(config, span(tokens, "--tokens"), span(heads, "--heads"), batch, dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    left = _left(found, out, where) if resume else found
    rows, ended = list(rows_not_run(dtype, where.name, 0, model, gpu=where.gpu is not None)), False
    run = _run_of(where)
    keep = _kept_in(out, run)
    with _kept(out), _bar(left) as step:
        for row in _attention_rows(left, where, model, step):
            if rows and row.case != rows[-1].case:
                keep(rows)  # whatever ends the run, the points before this one are in the file
            rows.append(row)
        ended = True
    keep(rows)
    from .profile_tables import print_attention

    modelled = any(row.modelled_s is not None for row in rows)
    times = where.times(modelled)
    print_attention(plain_console(), rows, times, config, _peak(where, dtype))
    _print_if(where.how_far_off(modelled))
    if trace is not None:
        _write_trace(trace, ranges(rows), times, {"model": model, "dtype": dtype})
    _say_written(run, rows, out, csv)
    if not ended:
        raise typer.Exit(INTERRUPTED)


@profile_app.command("model")
def model_command(
    context: typer.Context,
    model: Model = "vit_base_patch16_224",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per forward pass.")] = 64,
    dtype: Dtype = "bf16",
    gpu: Gpu = "",
    out: Out = None,
    csv: Csv = None,
    trace: Trace = None,
) -> None:
    """Where the time of a forward pass goes, kernel by kernel; as a trace, with a range for each block and kernel.

    On a GPU by torch.profiler, with NVTX ranges for Nsight Systems; without one, or with --gpu, from the launch plan
    with modelled times and bounds.
    """
    where, _ = _begin(context, model, dtype, gpu)
    check_batches(model, [batch])
    from vit_bench.profiling import model as planning

    from .profile_tables import print_model

    forward = None
    if where.gpu is None:
        assert where.device is not None
        steps = planning.planned(model, where.device, batch, dtype)
    else:
        from vit_bench.profiling.model_gpu import measured

        steps, forward = measured(model, where.gpu, batch, dtype)
    modelled = any(step.figures is not None and step.figures.modelled_s is not None for step in steps)
    times = where.times(modelled)
    print_model(plain_console(), planning.shares(steps), f"{model}, batch {batch}, {dtype}; {times}", forward)
    _print_if(where.how_far_off(modelled))
    if trace is not None:
        _write_trace(trace, planning.ranges(steps), times, {"model": model, "batch": batch, "dtype": dtype})
    run, rows = _run_of(where), [planning.row(steps, where.name, model, batch, dtype, forward)]
    _kept_in(out, run)(rows)
    _say_written(run, rows, out, csv)


def _print_if(line: str) -> None:
    if line:
        typer.echo(line)


def _begin(context: typer.Context, model: str, dtype: str, gpu: str) -> tuple[_Where, ViTConfig]:
    """Where times come from, and the model; ends here where a child had to do the work."""
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(_DTYPES)}", param_hint="--dtype")
    _check_files(context.params)
    if os.environ.get("TRITON_INTERPRET"):
        # Triton decides at its import whether it compiles, and this process may be past that.
        words = [word for name, value in context.params.items() for word in _words(name, value)]
        raise typer.Exit(compile_in_child(["profile", str(context.info_name), *words]))
    from vit_engine import ViTConfig

    try:
        config = ViTConfig.preset(model)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    return _where(gpu), config


def _check_files(options: dict[str, Any]) -> None:
    """Refuses, before anything is measured, what could not be written afterwards."""
    from vit_bench.results import load

    for name in ("out", "csv", "trace"):
        check_file(f"--{name}", options.get(name), replaced=name == "out")
    check_apart({f"--{name}": options.get(name) for name in ("out", "csv", "trace")})
    out = options.get("out")
    if out is not None and out.exists():
        try:
            load(out)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--out") from error


def _words(name: str, value: Any) -> list[str]:
    if value is None or value is False or value == "":
        return []
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def _where(gpu: str) -> _Where:
    import torch

    from vit_bench import recording

    if not gpu and torch.cuda.is_available():
        from vit_bench.timed.machine import gpu_label, known_gpu

        here = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(here)
        return _Where(gpu_label(name), known_gpu(name), here)
    try:
        device = recording.gpu(gpu or _WITHOUT)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpu") from error
    return _Where(device.name, device)


def _attention_rows(points: list[Point], where: _Where, model: str, step: Any) -> Iterator[Row]:
    if where.gpu is None:
        from vit_bench.profiling.attention import compiled_rows

        assert where.device is not None
        yield from compiled_rows(points, where.device, 0, model, step)
        return
    import torch

    from vit_bench.profiling.attention_gpu import measured_rows
    from vit_bench.timed.attentions import ATTENTIONS

    present = [one for one in ATTENTIONS if not one.missing()]
    name = torch.cuda.get_device_name(where.gpu)
    yield from measured_rows(points, where.gpu, name, present, 0, model, step)


def _left(points: list[Point], out: Path | None, where: _Where) -> list[Point]:
    """The points that the file has no row of ours for on this GPU: measured, or compiled where nothing is measured."""
    from vit_bench.results import OURS, Results, load

    before = load(out) if out is not None and out.exists() else Results()
    sources = ("gpu",) if where.gpu is not None else ("compiled",)
    own = (row for row in before.rows if (row.contender, row.device) == (OURS, where.name) and row.source in sources)
    done = {(row.case, row.dtype) for row in own}
    return [point for point in points if (str(point), point.dtype) not in done]


@contextmanager
def _kept(out: Path | None) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end this block alone."""
    try:
        with termination_as_interrupt():
            yield
    except KeyboardInterrupt:
        on = "" if out is None else " --resume goes on."
        typer.echo(f"Interrupted: what follows is what was done until then.{on}", err=True)


@contextmanager
def _bar(points: list[Point]) -> Iterator[Any]:
    """A progress bar on the terminal's error stream, and what to tell it that a point has begun."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=len(points), completed=-1)
        yield lambda point: bar.update(task, description=str(point), advance=1)


def _peak(where: _Where, dtype: str) -> float | None:
    from vit_bench.roofline import PEAKS

    if where.device not in PEAKS:
        return None
    return PEAKS[where.device].single if dtype == "fp32" else PEAKS[where.device].half


def _write_trace(path: Path, ranges: list[Range], times: str, about: dict[str, Any]) -> None:
    from vit_bench.profiling.trace import write_trace

    write_trace(ranges, path, times, about)
    typer.echo(f"{path}: open it in ui.perfetto.dev or chrome://tracing; times are {times}")


def _run_of(where: _Where) -> Run:
    from vit_bench.profiling.runs import this_run

    return this_run(" ".join(["vit-engine", *sys.argv[1:]]), where.name, where.device)


def _kept_in(out: Path | None, run: Run) -> Callable[[Sequence[Row]], None]:
    """What writes rows of this run to the file of --out, if there is one."""
    if out is None:
        return lambda rows: None
    from vit_bench.profiling.runs import kept_in

    return kept_in(out, run)


def _say_written(run: Run, rows: list[Row], out: Path | None, csv: Path | None) -> None:
    """Says what --out has now, and writes the table of --csv."""
    from vit_bench.results import Results, write_csv

    if out is not None:
        typer.echo(f"{out}: {_count(rows)} added. vit-engine report {out} --out report.html")
    if csv is not None:
        write_csv(Results([run], rows), rows, csv)
        typer.echo(f"{csv}: {_count(rows)}")


def _count(rows: list[Row]) -> str:
    return f"{len(rows)} row{'' if len(rows) == 1 else 's'}"
