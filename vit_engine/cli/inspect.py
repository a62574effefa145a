"""``vit-engine inspect``: one model on one GPU, launch by launch, from compiled code and datasheets; no GPU is used."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from .in_child import compile_in_child
from .profile_tables import LAUNCH_COST
from .tables import plain_console, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from vit_bench.inspection import Inspection, LaunchReport
    from vit_bench.pipes import Section

_DTYPES = ("fp32", "fp16", "bf16")
_MIX_SHOWN = 7
_PIPE_NAMES = {"exponential": "exp", "conversion": "conv", "load_store": "ld/st"}


def inspect_command(
    model: Annotated[str, typer.Option("--model", help="A preset's name, such as vit_base_patch16_224.")],
    gpu: Annotated[str, typer.Option("--gpu", help="h100, h200, a100, rtx4090, rtx3090, b200, rtx5090, or sm_90 etc.")],
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per forward pass.")] = 1,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, fp16 or bf16.")] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Bounds for every launch of a model on a GPU, from its compiled code: no GPU needed, nothing measured."""
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(_DTYPES)}", param_hint="--dtype")
    if os.environ.get("TRITON_INTERPRET"):
        # Triton decides at its import whether it compiles, and this process may be past that.
        arguments = ["--model", model, "--gpu", gpu, "--batch", str(batch), "--dtype", dtype, *["--json"] * as_json]
        raise typer.Exit(compile_in_child(["inspect", *arguments]))
    _check_names(model, gpu)
    check_batches(model, [batch])
    from vit_bench.inspection import inspect_model

    found = inspect_model(model, gpu, batch, dtype)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        _print(found)


def _check_names(model: str, gpu: str) -> None:
    from vit_bench import recording
    from vit_engine import ViTConfig

    for option, known, name in (("--model", ViTConfig.preset, model), ("--gpu", recording.gpu, gpu)):
        try:
            known(name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=option) from error


def check_batches(model: str, batches: list[int]) -> None:
    """Refuses, under --batch, more images of a preset than kernels can be launched for."""
    from vit_bench.plan import check_batch
    from vit_engine import ViTConfig

    for batch in batches:
        try:
            check_batch(ViTConfig.preset(model), batch)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--batch") from error


def _print(found: Inspection) -> None:
    from vit_bench.inspection import NOTE

    console = plain_console()
    device = found.device
    console.print(
        f"{found.model}, batch {found.batch}, {found.dtype}, on {device.name} "
        f"(sm_{device.capability}, {device.sm_count} SMs)"
    )
    console.print(NOTE)
    _launches(console, found.launches)
    _resources(console, found.launches)
    _loops(console, found.launches)
    _epilogues(console, found.launches)
    _roofline(console, found)
    if found.forward.modelled_s is not None:
        _modelled(console, found, found.forward.modelled_s)


def _launches(console: Console, launches: list[LaunchReport]) -> None:
    def rows() -> Iterator[list[str]]:
        for launch in launches:
            x, y, z = launch.grid
            yield [
                launch.label,
                f"x{launch.times}",
                launch.kernel.removesuffix("_kernel"),
                "x".join(map(str, launch.tile.values())),
                str(launch.num_warps),
                str(launch.num_stages),
                str(x) if y == z == 1 else f"{x}x{y}x{z}",
                str(launch.ctas_per_sm),
                f"{launch.waves:.2f}",
            ]

    heads = ("launch", "times", "kernel", "tile", "warps", "stages", "grid", "CTAs/SM", "waves")
    print_table(console, "Launches of one forward pass", "", heads, rows())


def _resources(console: Console, launches: list[LaunchReport]) -> None:
    def rows() -> Iterator[list[str]]:
        for launch in launches:
            yield [
                launch.label,
                str(launch.registers),
                f"{launch.stack} B",
                f"{launch.shared / 1024:.1f} of {launch.shared_limit / 1024:.0f} KiB",
                launch.code.tensor if launch.code.tensor.endswith("MMA") else "no",
                "yes" if launch.code.tma else "no",
                f"{launch.code.load_bytes} B",
                "yes" if launch.code.specialized else "no",
            ]

    heads = ("launch", "registers", "spills, stack", "shared memory", "tensor cores", "TMA", "loads", "specialised")
    print_table(console, "What each takes", "Loads: the widest global load of a thread.", heads, rows())


def _loops(console: Console, launches: list[LaunchReport]) -> None:
    sections = [(label, section) for launch in launches for label, section in _sections(launch)]
    pipes = [pipe for pipe in sections[0][1].cycles if any(section.cycles[pipe] for _, section in sections)]
    heads = ("main loop", *(_PIPE_NAMES.get(pipe, pipe) for pipe in pipes), "bound by")
    rows = [
        [label, *(f"{section.cycles[pipe]:.0f}" for pipe in pipes), _PIPE_NAMES.get(section.bound, section.bound)]
        for label, section in sections
    ]
    note = (
        "Cycles of one of the SM's four sub-cores for one warp and one trip, each pipe for itself. exp: MUFU; conv: "
        "conversions to packed 16 bits; ld/st: memory instructions and shuffles; shared: data through shared memory."
    )
    print_table(console, "Main loops", note, heads, rows)
    for launch in launches:
        if launch.repeated is not None and launch.repeated > 1:
            console.print(f"{launch.label}: products are made {launch.repeated:.2f} times, warps repeat each other's.")
    mixes = [[label, str(section.instructions), _mix(section.mix)] for label, section in sections]
    heads = ("main loop", "all", "most frequent instructions")
    note = "Instructions of one warp and one trip; --json has all."
    print_table(console, "Instruction mix", note, heads, mixes, texts=(0, 2))


def _mix(mix: dict[str, int]) -> str:
    """The most frequent instructions, those of tensor cores in any case."""
    shown = [name for name in mix if name.endswith("MMA")]
    shown += [name for name in mix if name not in shown][: _MIX_SHOWN - len(shown)]
    return ", ".join(f"{name} {mix[name]}" for name in mix if name in shown)


def _sections(launch: LaunchReport) -> Iterator[tuple[str, Section]]:
    several = len(launch.main_loops) > 1
    for number, section in enumerate(launch.main_loops, 1):
        yield f"{launch.label}, {number}" if several else launch.label, section
    if launch.whole is not None:
        yield f"{launch.label}, all", launch.whole


def _epilogues(console: Console, launches: list[LaunchReport]) -> None:
    def rows() -> Iterator[list[str]]:
        for launch in launches:
            cost = launch.epilogue
            if cost is not None:
                known = cost.outputs_per_thread is not None and cost.slots_per_output is not None
                apart = "" if cost.handed_over is None else f", {cost.handed_over:.1f} of them to hand over"
                yield [
                    launch.label,
                    str(cost.instructions),
                    f"{cost.outputs_per_thread:.0f}" if known else "unknown",
                    f"{cost.slots_per_output:.1f}{apart}" if known else "unknown",
                ]

    heads = ("launch", "instructions", "outputs per thread", "issue slots per output")
    what = (
        "What a thread executes behind its last main loop. Where others finish than those that multiply: what one of "
        "these executes in a trip of its loop, and what handing sums over to it takes, per output."
    )
    print_table(console, "Epilogues", what, heads, rows())


def _roofline(console: Console, found: Inspection) -> None:
    from vit_bench.roofline import PEAKS

    peaks = PEAKS[found.device]
    rate, unit = (peaks.single, "fp32 without tensor cores") if found.dtype == "fp32" else (peaks.half, "tensor cores")
    rows = []
    for launch in found.launches:
        one = launch.roofline
        rows.append(
            [
                launch.label,
                f"x{launch.times}",
                f"{one.flops / 1e9:.2f}",
                f"{one.bytes / 1e6:.1f}",
                f"{one.compute_s * 1e6:.1f}",
                f"{one.memory_s * 1e6:.1f}",
                one.bound,
            ]
        )
    whole = found.forward
    larger = "compute" if whole.compute_s > whole.memory_s else "memory"
    times = [f"{seconds * 1e6:.1f}" for seconds in (whole.compute_s, whole.memory_s)]
    rows.append(["forward", "", f"{whole.flops / 1e9:.2f}", f"{whole.bytes / 1e6:.1f}", *times, larger])
    note = (
        f"Peaks: {rate / 1e12:.1f} TFLOP/s ({unit}), {peaks.bandwidth / 1e12:.3g} TB/s. GFLOP of matrix products; MB: "
        "every operand once, as if none were in the L2 cache. The forward's row sums its launches."
    )
    heads = ("launch", "times", "GFLOP", "MB", "compute, us", "memory, us", "larger")
    print_table(console, "Roofline", note, heads, rows)
    console.print(
        f"Bound of the forward, each launch at the larger of its two times: {whole.bound_s * 1e6:.0f} us, "
        f"{whole.images_per_s:,.0f} images/s. Not a measurement."
    )


def _modelled(console: Console, found: Inspection, forward: float) -> None:
    from vit_bench.modelled import checks
    from vit_bench.roofline import PEAKS

    peak = PEAKS[found.device].half
    rows = []
    for launch in found.launches:
        seconds, bound = launch.modelled_s, launch.roofline
        if seconds is None:
            rows.append([launch.label, f"x{launch.times}", "no model", f"{bound.seconds * 1e6:.1f}", ""])
            continue
        share = bound.flops / peak / seconds
        figures = [f"{seconds * 1e6:.1f}", f"{bound.seconds * 1e6:.1f}", f"{share:.0%}"]
        rows.append([launch.label, f"x{launch.times}", *figures])
    share = f"{found.forward.flops / peak / forward:.0%}"
    rows.append(["forward", "", f"{forward * 1e6:.0f}", f"{found.forward.bound_s * 1e6:.0f}", share])
    note = (
        f"Cycles by which the tiles were chosen, over the clock under load. {LAUNCH_COST} A launch without a model "
        "counts in the forward with its bound. Peak: of the tensor cores."
    )
    heads = ("launch", "times", "modelled, us", "bound, us", "of peak")
    print_table(console, "Modelled time, not a measurement", note, heads, rows)
    ratios = [[one.label, f"{one.seconds * 1e6:.1f}", f"{ratio:.2f}"] for one, ratio in checks(found.device)]
    heads = ("plain Triton GEMM that was run on this GPU", "measured, us", "modelled / measured")
    print_table(console, "How far this model is off", "The same model on kernels with known times.", heads, ratios)
