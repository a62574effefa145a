"""Attention over sequence lengths and head counts on a GPU that is not here: compiled, bounded and modelled.

    rows = compiled_rows(points, recording.gpu("h100"), run=0, model="vit_base_patch16_224")

The rows are of `vit_bench.results`, suite "attention". None of them has a time: nothing is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

import vit_kernels
from vit_bench import records
from vit_bench.plan import DTYPES
from vit_bench.profiling.recorded import recorded
from vit_bench.profiling.sweep import Point
from vit_bench.profiling.times import seconds_of
from vit_bench.profiling.trace import Range
from vit_bench.recording import recording, require_compiler
from vit_bench.results import OURS, Row
from vit_bench.roofline import attention_flops
from vit_bench.timed.attentions import ATTENTIONS
from vit_kernels.device import Device

MODELLED = "modelled time and bound by datasheet: compiled only, nothing was executed"
Progress = Callable[[Point], object]


def packed_qkv(point: Point, device: torch.device | str) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, N, H, D] as views of one projection [B, N, 3, H, D], as a ViT has them; N(0, 1), empty on meta."""
    shape = (point.batch, point.tokens, 3, point.heads, point.head_dim)
    return torch.randn(shape, dtype=DTYPES[point.dtype], device=device).unbind(2)


def flops_of(point: Point) -> int:
    return attention_flops(point.batch, point.heads, point.tokens, point.tokens, point.head_dim)


def bytes_of(point: Point) -> int:
    """q, k, v and the result, each once."""
    elements = 4 * point.batch * point.tokens * point.heads * point.head_dim
    return elements * DTYPES[point.dtype].itemsize


def no_progress(_: Point) -> None: ...


def compiled_rows(
    points: Iterable[Point], device: Device, run: int, model: str, progress: Progress = no_progress
) -> Iterator[Row]:
    """Our kernel at each point, compiled for `device` under the recording driver.

    run: place of the run in the file's list. Raises RuntimeError where Triton interprets instead of compiling.
    """
    require_compiler()
    with recording(device, torch_device="meta") as recorder:
        for point in points:
            progress(point)
            recorder.launches.clear()
            vit_kernels.attention(*packed_qkv(point, "meta"))
            (launch,) = recorder.launches
            found = recorded(launch, DTYPES[point.dtype], device)
            yield Row(
                run,
                "attention",
                str(point),
                "attention",
                OURS,
                device.name,
                point.dtype,
                "compiled",
                model=model,
                shape=point.shape,
                settings={"triton": records.versions()["triton"]},
                reason=MODELLED,
                flops=found.roofline.flops,
                nbytes=bytes_of(point),
                launches=1,
                modelled_s=found.modelled_s,
                bound_s=found.roofline.seconds,
                code={"kernels": [{"launch": "attention", "times": 1, **found.as_code()}]},
            )


def rows_not_run(dtype: str, device: str, run: int, model: str, *, gpu: bool) -> Iterator[Row]:
    """One row for each contender that takes no part: none without a GPU, those that are installed with one."""
    for contender in ATTENTIONS:
        reason = contender.missing() if gpu else "times are measured on a GPU only"
        if reason and contender.name != OURS:
            yield Row(
                run, "attention", "attention", "attention", contender.name, device, dtype, "not run",
                model=model, reason=reason,
            )  # fmt: skip


def ranges(rows: Iterable[Row]) -> list[Range]:
    """A lane for each contender with one call of each shape, one behind the other, for `vit_bench.profiling.trace`."""
    found, ends = [], dict[str, float]()
    for row in rows:
        seconds = seconds_of(row)
        if seconds is None or row.source == "not run":
            continue
        start = ends.get(row.contender, 0.0)
        ends[row.contender] = start + seconds
        arguments = {**row.shape, **next(iter(row.code.get("kernels", ())), {})}
        found.append(Range(row.contender, row.case, start, seconds, "kernel", arguments))
    return found
