"""A forward pass launch by launch on a GPU that is not here: compiled, bounded and modelled, in the order it runs.

    steps = planned("vit_base_patch16_224", recording.gpu("h100"), batch=64, dtype="bf16")

A step's seconds are the modelled ones, at least the bound; those of a launch without a model are its bound.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vit_bench import records
from vit_bench.inspection import recorded_launches
from vit_bench.plan import DTYPES, model_calls
from vit_bench.profiling.attention import MODELLED
from vit_bench.profiling.recorded import Recorded, recorded
from vit_bench.profiling.trace import Range
from vit_bench.recording import require_compiler
from vit_bench.results import OURS, Row, Spread
from vit_bench.roofline import PEAKS
from vit_engine.config import ViTConfig
from vit_kernels.device import Device


@dataclass(frozen=True)
class Step:
    """One launch at its place in the forward pass. block: number of the encoder block, None outside of them; start,
    seconds: in seconds from the pass's begin; figures: of its compiled code, None where it was only measured."""

    label: str
    kernel: str
    block: int | None
    start: float
    seconds: float
    figures: Recorded | None = None


class Known(NamedTuple):
    """A launch before it has a time. figures: None for GPUs without a datasheet in `vit_bench.roofline`; block: the
    number of the first encoder block that makes it, None outside of them; times: how many blocks do."""

    label: str
    kernel: str
    figures: Recorded | None
    block: int | None = None
    times: int = 1


def distinct(config: ViTConfig, device: Device, batch: int, dtype: str) -> list[Known]:
    """Each distinct launch of a forward pass, in order; those of a block stand there once.

    Raises RuntimeError where Triton interprets instead of compiling.
    """
    require_compiler()
    found = []
    for call, label, launch in recorded_launches(model_calls(config, batch, DTYPES[dtype]), device):
        figures = recorded(launch, DTYPES[dtype], device) if device in PEAKS else None
        block = {"each": 0, "last": config.depth - 1}.get(call.block)
        found.append(Known(label, launch.kernel, figures, block, call.times))
    return found


def in_order(launches: Sequence[Known]) -> list[Known]:
    """Every launch of the pass, from the distinct ones."""
    found: list[Known] = []
    for block, group in itertools.groupby(launches, lambda one: one.block):
        alike = list(group)
        if block is None:
            found += alike
        else:
            found += [one._replace(block=block + n, times=1) for n in range(alike[0].times) for one in alike]
    return found


def planned(model: str, device: Device, batch: int, dtype: str) -> list[Step]:
    """Every launch of one forward pass of a preset, one behind the other by modelled time.

    Raises ValueError for a name that is no preset, RuntimeError where Triton interprets instead of compiling.
    """
    config = ViTConfig.preset(model)
    steps, at = [], 0.0
    for label, kernel, figures, block, _ in in_order(distinct(config, device, batch, dtype)):
        if figures is None:
            raise ValueError(f"device must be one of {', '.join(d.name for d in PEAKS)}; got {device.name!r}")
        steps.append(Step(label, kernel, block, at, figures.seconds, figures))
        at += figures.seconds
    return steps


@dataclass(frozen=True)
class Share:
    """All launches of one label. bound_s: None where it is not known."""

    label: str
    kernel: str
    launches: int
    seconds: float
    bound_s: float | None
    share: float


def shares(steps: Sequence[Step]) -> list[Share]:
    """Where the time goes, by label, in the order of the pass."""
    total = sum(step.seconds for step in steps)
    found = []
    for label in dict.fromkeys(step.label for step in steps):
        own = [step for step in steps if step.label == label]
        seconds = sum(step.seconds for step in own)
        bounds = [step.figures.roofline.seconds for step in own if step.figures is not None]
        bound = sum(bounds) if len(bounds) == len(own) else None
        found.append(Share(label, own[0].kernel, len(own), seconds, bound, seconds / total if total else 0.0))
    return found


def ranges(steps: Iterable[Step]) -> list[Range]:
    """A lane of blocks and a lane of kernels, for `vit_bench.profiling.trace`."""
    found, blocks = [], {}
    for step in steps:
        arguments: dict[str, Any] = {"kernel": step.kernel}
        if step.figures is not None:
            bound = step.figures.roofline
            arguments |= {"bound_us": round(bound.seconds * 1e6, 3), "bound": bound.bound, **step.figures.as_code()}
        found.append(Range("kernels", step.label, step.start, step.seconds, "kernel", arguments))
        name = step.label if step.block is None else f"block {step.block}"
        start, _ = blocks.get(name, (step.start, 0.0))
        blocks[name] = start, step.start + step.seconds
    outer = [Range("blocks", name, start, end - start, "block") for name, (start, end) in blocks.items()]
    return [*outer, *found]


def row(steps: Sequence[Step], device: str, model: str, batch: int, dtype: str, forward: float | None = None) -> Row:
    """The pass for `vit_bench.results`, suite "model"; `code["kernels"]` has its distinct launches in order.

    forward: seconds of a pass where the steps were measured, None where they were planned. A kernel that was measured
    has its median over the blocks, "seconds".
    """
    config, known = ViTConfig.preset(model), [step.figures for step in steps if step.figures is not None]
    whole = len(known) == len(steps)
    kernels = []
    for label in dict.fromkeys(step.label for step in steps):
        own = [step for step in steps if step.label == label]
        figures = own[0].figures.as_code() if own[0].figures is not None else {"kernel": own[0].kernel}
        timed = {} if forward is None else {"seconds": statistics.median(step.seconds for step in own)}
        kernels.append({"launch": label, "times": len(own), **figures, **timed})
    return Row(
        run=0,
        suite="model",
        case=f"model/{model}/b{batch}",
        label="forward",
        contender=OURS,
        device=device,
        dtype=dtype,
        source="compiled" if forward is None else "gpu",
        model=model,
        shape={"batch": batch, "tokens": config.num_tokens, "heads": config.num_heads, "head_dim": config.head_dim},
        settings={"triton": records.versions()["triton"]},
        reason=MODELLED if forward is None else "kernels by torch.profiler, caches as the pass leaves them",
        images=batch,
        seconds=None if forward is None else Spread(forward, forward, forward, 1),
        flops=sum(one.roofline.flops for one in known) if whole else None,
        nbytes=sum(one.roofline.bytes for one in known) if whole else None,
        launches=len(steps),
        modelled_s=sum(one.seconds for one in known) if whole and any(one.modelled_s for one in known) else None,
        bound_s=sum(one.roofline.seconds for one in known) if whole else None,
        code={"kernels": kernels},
    )
