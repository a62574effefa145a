"""``vit-engine bench``: the table of shapes, measured where there is hardware for it, compiled where there is none."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .given import refuse_beside
from .in_child import compile_in_child
from .interrupt import INTERRUPTED, termination_as_interrupt
from .outputs import check_apart, check_file

if TYPE_CHECKING:
    from vit_bench.results import Run
    from vit_bench.timed.runner import Job

_SUITES = ("kernels", "model", "attention")
_DTYPES = ("fp32", "fp16", "bf16")
_COMPILED_FOR = "h100"  # where there is no GPU and none was named


@dataclass(frozen=True)
class _Wanted:
    """What was asked for; empty means that the defaults of the device count."""

    suites: Sequence[str]
    models: Sequence[str]
    batches: Sequence[int]
    dtypes: Sequence[str]
    only: Sequence[str]


def bench_command(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="SUITE", help="kernels, model, attention, or several; all by default."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Of the table; * and ? are wildcards. Repeatable, as all lists.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Images per call, of the table: --batch 1 8 64 256.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="fp32, fp16 or bf16; bf16 by default, fp32 on the CPU.")
    ] = None,
    gpu: Annotated[
        str, typer.Option("--gpu", help="Compile for it instead of timing: h100, a100, rtx4090, or sm_90 etc.")
    ] = "",
    only: Annotated[list[str] | None, typer.Option("--only", help="Names of cases, with wildcards.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Results to add this run to (JSON).")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="The rows of this run as a table.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last run in --out on this machine.")] = False,
    just_list: Annotated[bool, typer.Option("--list", help="Print the names of the cases and run nothing.")] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", help="Two results: FILE (its latest rows) or FILE#RUN (0, 1, ... or -1, the last)."),
    ] = None,
) -> None:
    """Benchmark kernels, whole models and attention, beside every baseline that is installed.

    Each contender's result is compared with the reference before it is timed; a wrong one is never timed. With a GPU
    everything is timed on it. Without one, models are timed on the CPU, and kernels and attention are compiled for
    --gpu, with bounds and modelled times instead of measured ones. --compare exits with 1 if something of ours became
    slower outside the noise.
    """
    if compare is not None:
        from .bench_tables import compare_command

        refuse_beside(context, "--compare", "it compares whole files, and has no use for", but=("compare",))
        raise typer.Exit(compare_command(*compare))
    suites, more = _taken_apart(words or ())
    if more and not batch:
        raise typer.BadParameter(f"{more[0]}: numbers of images belong behind --batch", param_hint="SUITE")
    for one in dtype or ():
        if one not in _DTYPES:
            raise typer.BadParameter(f"{one!r} is not one of {', '.join(_DTYPES)}", param_hint="--dtype")
    if resume and out is None:
        raise typer.BadParameter("there is nothing to go on with: name the results with --out", param_hint="--resume")
    wanted = _Wanted(suites or _SUITES, model or (), [*(batch or ()), *more], dtype or (), only or ())
    if just_list:
        _list(wanted)
        return
    if os.environ.get("TRITON_INTERPRET") and (gpu or set(suites) != {"model"}):
        # Triton decides at its import whether it compiles, and this process may be past that.
        raise typer.Exit(compile_in_child(["bench", *_words(wanted, gpu, out, csv, resume)]))
    raise typer.Exit(_bench(wanted, gpu, out, csv, resume))


def _taken_apart(words: Sequence[str]) -> tuple[list[str], list[int]]:
    """Suites, and numbers of images: the option takes one, and what follows it comes as an argument."""
    suites, numbers = [word for word in words if word in _SUITES], [word for word in words if word.isdecimal()]
    if bad := [word for word in words if word not in (*suites, *numbers)]:
        raise typer.BadParameter(f"{bad[0]!r} is not one of {', '.join(_SUITES)}", param_hint="SUITE")
    return suites, [int(number) for number in numbers]


def _words(wanted: _Wanted, gpu: str, out: Path | None, csv: Path | None, resume: bool) -> list[str]:
    """The command line that was given."""
    words = [*wanted.suites]
    lists = {"--model": wanted.models, "--batch": wanted.batches, "--dtype": wanted.dtypes, "--only": wanted.only}
    for option, values in lists.items():
        words += [word for value in values for word in (option, str(value))]
    single = {"--gpu": gpu, "--out": out and str(out), "--csv": csv and str(csv)}
    words += [word for option, value in single.items() if value for word in (option, value)]
    return words + ["--resume"] * resume


def _selected(wanted: _Wanted, models: Sequence[str], batches: Sequence[int]) -> list:
    """The cases that were asked for; of these models and batches where neither they nor names of cases were given."""
    from vit_bench.timed.shapes import select

    chosen_models = wanted.models or (() if wanted.only else models)
    chosen_batches = wanted.batches or (() if wanted.only else batches)
    options = {"models": "--model", "batches": "--batch", "only": "--only"}
    try:
        return select(wanted.suites, chosen_models, chosen_batches, wanted.only)
    except ValueError as error:
        argument, message = error.args
        raise typer.BadParameter(message, param_hint=options[argument]) from error


def _list(wanted: _Wanted) -> None:
    for case in _selected(wanted, (), ()):
        typer.echo(case.name)


def _bench(wanted: _Wanted, gpu: str, out: Path | None, csv: Path | None, resume: bool) -> int:
    from vit_bench.results import Results, load, save, write_csv
    from vit_bench.timed.runner import begin, perform
    from vit_bench.tuning import GpuLostError

    from .bench_tables import Lines, print_not_run

    check_file("--out", out, replaced=True)
    check_file("--csv", csv)
    check_apart({"--out": out, "--csv": csv})
    results = Results()
    if out is not None and out.exists():
        try:
            results = load(out)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--out") from error
    jobs = _jobs(wanted, gpu)
    if not any(job.cases for job, _ in jobs):
        raise typer.BadParameter("no case has all that was asked for; see --list", param_hint="--only")
    lines, runs, status = Lines(), [], 0
    keep = partial(save, results, out) if out is not None else lambda: None
    try:
        with termination_as_interrupt(), lines.shown():
            for job, is_compiled in jobs:
                if not job.cases:
                    continue
                number = begin(results, _run_of(job, is_compiled), resume)
                runs.append(number)
                lines.header(results, number, job, is_compiled)
                perform(job, results, number, keep, lines)
    except KeyboardInterrupt:
        status = INTERRUPTED
        lines.console.print("Interrupted." + (f" {out} has what was done; go on with --resume." if out else ""))
    except GpuLostError as error:
        status = 1
        lines.console.print(f"{error.args[0]}. What was measured before is kept.")
    rows = [row for row in results.rows if row.run in runs]
    print_not_run(lines.console, rows)
    if csv is not None:
        write_csv(results, rows, csv)
    return status


def _jobs(wanted: _Wanted, gpu: str) -> list[tuple[Job, bool]]:
    """What this machine can do of it, and whether that is compiling: one job per device that rows are about."""
    import torch

    from vit_bench.recording import gpu as described
    from vit_bench.timed.compiled import Compiling
    from vit_bench.timed.measured import Measuring
    from vit_bench.timed.runner import Job
    from vit_bench.timed.shapes import DEFAULT_MODEL

    try:
        device = described(gpu or _COMPILED_FOR)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpu") from error
    half, single = wanted.dtypes or ("bf16",), wanted.dtypes or ("fp32",)
    large = _selected(wanted, (DEFAULT_MODEL,), ())
    if gpu:
        return [(Job(large, half, Compiling(device)), True)]
    if torch.cuda.is_available():
        return [(Job(large, half, Measuring(torch.device("cuda", torch.cuda.current_device()))), False)]
    small = _selected(wanted, ("vit_tiny_patch16_224", "vit_small_patch16_224"), (1, 8))
    on_cpu = [case for case in small if case.suite == "model"]
    compiled = [case for case in large if case.suite != "model"]
    jobs = [(Job(on_cpu, single, Measuring(torch.device("cpu"))), False)] if on_cpu else []
    return jobs + ([(Job(compiled, half, Compiling(device)), True)] if compiled else [])


def _run_of(job: Job, is_compiled: bool) -> Run:
    """What is known of the run before its first row: the machine, and what it reaches where something is measured."""
    from vit_bench.full.report import now
    from vit_bench.results import Run
    from vit_bench.timed import ceilings, machine
    from vit_bench.timed.measured import Measuring

    measured = job.measures if isinstance(job.measures, Measuring) else None
    environment = machine.environment(job.measures.label)
    environment["times"] = "compiled" if is_compiled else "measured"
    command = " ".join(["vit-engine", *sys.argv[1:]])
    if measured is None or is_compiled:
        return Run(now(), command, environment)
    name = environment["gpu"]["name"] if measured.device.type == "cuda" else ""
    peaks = machine.datasheet(machine.known_gpu(name))
    return Run(now(), command, environment, ceilings.measure(measured.device, job.dtypes), peaks)
