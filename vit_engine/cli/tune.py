"""``vit-engine tune``: measures on the GPU at hand which tile, or PyTorch itself, serves each part of a model best."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .given import refuse_beside
from .in_child import compile_in_child
from .inspect import check_batches
from .outputs import check_file

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from vit_bench.tuning import Outcome
    from vit_bench.tuning_dry import Listed
    from vit_bench.tuning_problems import LauncherCall, Problem
    from vit_kernels.device import Device
    from vit_kernels.tuned import Gpu, Tuned

_DTYPES = ("fp32", "fp16", "bf16")
_WIDTH = 100


def tune_command(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="A preset, or timm:NAME, torchvision:NAME, transformers:NAME.")],
    batch: Annotated[list[int], typer.Option("--batch", min=1, help="Images per forward pass.")],
    more: Annotated[
        list[int] | None, typer.Argument(metavar="BATCH", min=1, help="More of them: --batch 1 8 64.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, fp16 or bf16.")] = "bf16",
    out: Annotated[Path, typer.Option("--out", help="The tuned file to write.")] = Path("tuned.json"),
    resume: Annotated[bool, typer.Option("--resume", help="Add to --out what it has no entry for.")] = False,
    pytorch: Annotated[
        bool, typer.Option("--pytorch/--no-pytorch", help="PyTorch's own operators may win, too.")
    ] = True,
    wide: Annotated[
        bool, typer.Option("--wide", help="Several times as many tiles: the neighbours of those in the tables.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List and compile the candidates; run nothing.")] = False,
    gpu: Annotated[
        str, typer.Option("--gpu", help="With --dry-run: h100, a100, rtx4090, sm_90 etc., or sm_89:58.")
    ] = "",
) -> None:
    """Time every tile that is right on this GPU, and PyTorch's operators, and save the fastest for accelerate().

    Candidates are compiled first; those that spill registers, do not fit, fail or disagree with the float64 reference
    are discarded with the reason. The others are timed in CUDA graphs with a cold L2 cache. Use the file with
    accelerate(model, tuned=FILE) or vit_kernels.use_tuned(FILE).
    """
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(_DTYPES)}", param_hint="--dtype")
    if dry_run != bool(gpu):
        raise typer.BadParameter("--dry-run and --gpu belong together: --dry-run --gpu h100", param_hint="--gpu")
    if dry_run:
        listed = ("model", "batch", "more", "dtype", "pytorch", "wide", "dry_run", "gpu")
        refuse_beside(context, "--dry-run", "nothing is measured or written, so there is no use for", but=listed)
    batches = sorted({*batch, *(more or ())})
    if os.environ.get("TRITON_INTERPRET"):
        _need_no_interpreter(dry_run)
        arguments = ["--model", model, *(word for size in batches for word in ("--batch", str(size)))]
        arguments += [
            "--dtype",
            dtype,
            "--dry-run",
            "--gpu",
            gpu,
            *["--no-pytorch"] * (not pytorch),
            *["--wide"] * wide,
        ]
        raise typer.Exit(compile_in_child(["tune", *arguments]))
    if dry_run:
        _dry_run(model, batches, dtype, gpu, pytorch, wide)
    else:
        check_file("--out", out, replaced=True)
        raise typer.Exit(_tune(model, batches, dtype, out, resume, pytorch, wide))


def _fail(message: str) -> typer.Exit:
    typer.echo(f"vit-engine tune: {message}", err=True)
    return typer.Exit(2)


def _need_no_interpreter(dry_run: bool) -> None:
    if not dry_run:
        raise _fail("TRITON_INTERPRET is set, so kernels would be interpreted: unset it. Nothing was measured")


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def _calls(model: str, batches: list[int], dtype: str, device: Device) -> list[LauncherCall]:
    """The launcher calls of a preset, or of another library's model, accelerated."""
    from vit_bench.plan import DTYPES
    from vit_bench.tuning_problems import accelerated_calls, preset_calls
    from vit_bench.warmup import BatchError, find
    from vit_engine import ViTConfig

    try:
        if ":" not in model:
            config = ViTConfig.preset(model)
            check_batches(model, batches)
            return list(preset_calls(config, batches, DTYPES[dtype]))
        warmed = find(model)(DTYPES[dtype])
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise typer.BadParameter(f"{model!r}: {error}", param_hint="--model") from error
    calls = (accelerated_calls(run, warmed.size, batches, DTYPES[dtype], device) for run in warmed.runs)
    try:
        return [call for each in calls for call in each]
    except BatchError as error:
        raise typer.BadParameter(str(error), param_hint="--batch") from error


def _dry_run(model: str, batches: list[int], dtype: str, gpu: str, pytorch: bool, wide: bool) -> None:
    from vit_bench import recording
    from vit_bench.tuning_dry import NOTE, dry_run

    try:
        device = recording.target(gpu)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpu") from error
    calls, console = _calls(model, batches, dtype, device), _console()
    console.print(f"{model}, batch {', '.join(map(str, batches))}, {dtype}, on {device.name} (sm_{device.capability})")
    console.print(NOTE)
    for problem, listed in dry_run(calls, device, with_pytorch=pytorch, wide=wide):
        _print_listed(console, problem, listed)


def _print_listed(console: Console, problem: Problem, listed: list[Listed]) -> None:
    from rich.table import Table
    from rich.text import Text

    from vit_bench.tuning_candidates import title

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("candidate", "registers", "spilled", "shared memory", "cycles", "verdict"):
        text = name in ("candidate", "verdict")
        # Names of candidates wrap, too: beside a long one a verdict, which can be a sentence, would fold to syllables.
        table.add_column(name, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    for one in listed:
        first = ", default" if one.choice == problem.default else ""
        columns = (
            "/".join(str(kernel.registers) for kernel in one.kernels),
            "/".join(f"{kernel.spilled} B" for kernel in one.kernels),
            "/".join(f"{kernel.shared / 1024:.1f} KiB" for kernel in one.kernels),
            "" if one.cycles is None else f"{one.cycles:,.0f}",
            one.why_not or "fits",
        )
        table.add_row(*(Text(cell) for cell in (f"{title(one.choice)}{first}", *columns)))
    console.print()
    console.print(Text(str(problem), style="bold"))
    console.print(table)


def _here(model: str, batch: int) -> tuple[torch.device, Device, Gpu]:
    """The current GPU: for PyTorch, for the tile choice, and for the file. Ends with status 2 where there is none."""
    import torch

    from vit_kernels import UnsupportedDeviceError, device_of
    from vit_kernels.tuned import gpus_here

    if not torch.cuda.is_available():
        raise _fail(
            "no NVIDIA GPU here, and tuning runs every candidate on one. To see what would be tried: "
            f"vit-engine tune --model {model} --batch {batch} --dry-run --gpu h100"
        )
    here = torch.device("cuda", torch.cuda.current_device())
    try:
        device = device_of(torch.empty(0, device=here))
    except UnsupportedDeviceError as error:
        raise _fail(str(error)) from error
    return here, device, next(gpu for where, gpu in gpus_here().items() if where is not None and where[1] == here.index)


def _tune(model: str, batches: list[int], dtype: str, out: Path, resume: bool, pytorch: bool, wide: bool) -> int:
    from vit_bench.tuning import GpuLostError, tune
    from vit_bench.tuning_gpu import gpu_bench
    from vit_bench.tuning_problems import problems_of
    from vit_kernels.tuned import write_tuned

    here, device, gpu = _here(model, batches[0])
    table = _begin(out, resume, gpu)
    problems = problems_of(_calls(model, batches, dtype, device), device)
    console = _console()
    console.print(f"{model}, batch {', '.join(map(str, batches))}, {dtype}, on {gpu}: {len(problems)} problems")
    watch, save = _Watch(console), partial(write_tuned, out)
    try:
        with watch.shown():
            done = tune(problems, table, gpu_bench(here), save, with_pytorch=pytorch, wide=wide, progress=watch)
    except KeyboardInterrupt:
        kept = f"{out} has what was measured; go on with --resume." if out.exists() else "Nothing was measured yet."
        console.print(f"Interrupted. {kept}", soft_wrap=True)
        return 130
    except GpuLostError as error:
        console.print(f"{error.args[0]}. {out} remembers that; go on with --resume, which leaves it out.")
        return 1
    console.print(f"{out}: {len(done.entries)} entries. vit_engine.accelerate(model, tuned={str(out)!r}) uses them.")
    if watch.unsolved:
        console.print(f"No candidate was right for {len(watch.unsolved)} of them.")
    return 1 if watch.unsolved else 0


def _begin(out: Path, resume: bool, gpu: Gpu) -> Tuned:
    """The table to add to: that of --out with --resume, else an empty one for the GPU at hand."""
    from vit_bench.records import today
    from vit_kernels.tuned import Tuned, TunedFileError, read_tuned, versions_here

    if not out.exists():
        return Tuned(gpu, versions_here(), today())
    if not resume:
        raise _fail(f"{out} exists: --resume adds to it, or name another file with --out")
    try:
        before = read_tuned(out)
    except (OSError, TunedFileError) as error:
        raise _fail(str(error)) from error
    if (before.gpu, dict(before.versions)) != (gpu, versions_here()):
        raise _fail(
            f"{out} was measured on {before.gpu} with {_listed(before.versions)}; here is {gpu} with "
            f"{_listed(versions_here())}. Name another file with --out"
        )
    return Tuned(gpu, before.versions, today(), before.entries, before.lost)


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


class _Watch:
    """Shows how far the tuner is, and a line for each problem."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = console
        self.unsolved: list[str] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=None)

    def shown(self) -> Any:
        return self._bar

    def started(self, problem: Problem, number: int, count: int) -> None:
        self._bar.update(self._task, description=str(problem), completed=number - 1, total=count)

    def done(self, outcome: Outcome) -> None:
        from rich.text import Text

        from vit_bench.tuning_candidates import title

        if outcome.entry is None:
            self.unsolved.append(str(outcome.problem))
            self.console.print(Text(f"{outcome.problem}: no candidate was right"))
        else:
            times = outcome.entry.measured["times"]
            (name, spread), *rest = times.items()
            default = title(outcome.problem.default)
            text = f"{outcome.problem}: {name} {spread[1]:.1f} us"
            for other in dict.fromkeys((default, "PyTorch")):
                text += f", {other} {times[other][1]:.1f} us" if other in dict(rest) else ""
            self.console.print(Text(text))
        for choice, why in outcome.discarded:
            self.console.print(Text(f"    discarded: {title(choice)}: {why}"))
