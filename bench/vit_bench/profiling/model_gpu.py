"""A forward pass kernel by kernel on the GPU at hand, by torch.profiler.

The order of our launches is known (`vit_bench.profiling.model`), so each kernel that ran gets its label and its block
from its place; where the names differ from what was expected, kernels keep their own names. Triton's launch hooks open
an NVTX range for every block and kernel, so that Nsight Systems shows the same names.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs

from vit_bench.full.timing import timed
from vit_bench.plan import DTYPES
from vit_bench.profiling.model import Known, Step, distinct, in_order
from vit_bench.timed.machine import known_gpu
from vit_bench.whole_model import redraw
from vit_engine import ViT, ViTConfig
from vit_kernels.device import device_of

PASSES = 10
_NO_KERNELS = ("Memcpy", "Memset")
Push = Callable[[str], object]
Pop = Callable[[], object]


@dataclass
class NamedLaunches:
    """Opens a range for each launch, and one for each block around them.

    expected: what one pass launches, in order; a launch with another name is a range of its own name.
    """

    expected: Sequence[Known]
    push: Push
    pop: Pop
    _at: int = 0
    _outer: str = ""

    def enter(self, metadata: Any) -> None:
        kernel = metadata.get()["name"]
        known = self.expected[self._at % len(self.expected)] if self.expected else None
        self._at += 1
        named = known is not None and known.kernel == kernel
        outer = f"block {known.block}" if known is not None and named and known.block is not None else ""
        if outer != self._outer:
            self.close()
            if outer:
                self.push(outer)
            self._outer = outer
        self.push(f"{known.label}: {kernel}" if known is not None and named else kernel)

    def leave(self, metadata: Any) -> None:
        self.pop()

    def close(self) -> None:
        if self._outer:
            self.pop()
        self._outer = ""


@contextmanager
def named_launches(expected: Sequence[Known]) -> Iterator[NamedLaunches]:
    """NVTX ranges in this block, by Triton's hooks."""
    names = NamedLaunches(expected, torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop)
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    enter.add(names.enter)
    leave.add(names.leave)
    try:
        yield names
    finally:
        enter.remove(names.enter)
        leave.remove(names.leave)
        names.close()


def steps_of(events: Sequence[Any], passes: int, expected: Sequence[Known]) -> list[Step]:
    """The steps of a pass from a profiler's events of `passes` passes: medians by place.

    A kernel that the hardware let begin before the one in front of it had ended counts from that end on. Raises
    RuntimeError where the passes launched different numbers of kernels.
    """
    kernels = sorted(
        (
            event
            for event in events
            if event.device_type.name == "CUDA"
            and not getattr(event, "is_user_annotation", False)
            and not event.name.startswith(_NO_KERNELS)
        ),
        key=lambda event: event.time_range.start,
    )
    if not kernels or len(kernels) % passes:
        raise RuntimeError(f"{len(kernels)} kernels in {passes} passes: the passes are not alike, or none was seen")
    count = len(kernels) // passes
    each = [kernels[number * count : (number + 1) * count] for number in range(passes)]
    known = _matching(each[0], expected)
    steps, seen = [], [_times(one) for one in each]
    for place in range(count):
        start = statistics.median(times[place][0] for times in seen)
        seconds = statistics.median(times[place][1] for times in seen)
        one = known[place]
        steps.append(Step(one.label, one.kernel, one.block, start, seconds, one.figures))
    return steps


def _matching(kernels: Sequence[Any], expected: Sequence[Known]) -> list[Known]:
    if [event.name for event in kernels] == [one.kernel for one in expected]:
        return list(expected)
    return [Known(event.name, event.name, None) for event in kernels]


def _times(kernels: Sequence[Any]) -> list[tuple[float, float]]:
    """(start from the pass's begin, duration) in seconds; the profiler counts microseconds."""
    found, begin, end = [], kernels[0].time_range.start, 0.0
    for event in kernels:
        start = max(event.time_range.start, end)
        end = max(event.time_range.end, start)
        found.append(((start - begin) / 1e6, (end - start) / 1e6))
    return found


@torch.no_grad()
def measured(name: str, gpu: torch.device, batch: int, dtype: str) -> tuple[list[Step], float]:
    """The steps of a preset's forward pass on this GPU, and the seconds of a pass without the profiler."""
    config = ViTConfig.preset(name)
    model = ViT(config, backend="torch").eval()
    redraw(model)
    model = model.to(gpu, DTYPES[dtype]).set_backend("triton")
    images = torch.randn(batch, config.in_channels, *config.image_hw, device=gpu, dtype=DTYPES[dtype])
    device = known_gpu(torch.cuda.get_device_name(gpu)) or device_of(images)
    expected = in_order(distinct(config, device, batch, dtype))

    def run() -> object:
        return model(images)

    for _ in range(3):
        run()
    seconds = statistics.median(timed(run, PASSES) for _ in range(5))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with named_launches(expected), torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PASSES):
            run()
        torch.cuda.synchronize(gpu)
    return steps_of(list(profiler.events() or ()), PASSES, expected), seconds
