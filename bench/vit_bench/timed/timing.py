"""Seconds of contenders side by side, and what may be said of two of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from vit_bench.full.timing import taken_in_turns
from vit_bench.results import Spread
from vit_bench.tuning_gpu import cold_times

Run = Callable[[], object]

LONGEST_ON_CPU = 10.0  # seconds for all timings of one contender
NOISE_RULE = (
    "A difference is named only where the ranges from the 20th to the 80th percentile do not overlap; everything else "
    "is within the noise."
)


def spread(seconds: Sequence[float]) -> Spread:
    """Of at least two timings; percentiles between two of them by linear interpolation."""
    p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return Spread(statistics.median(seconds), p20, p80, len(seconds))


def verdict(ours: Spread, other: Spread) -> str:
    """What `ours` is beside `other`: "faster", "slower", or "within the noise" (`NOISE_RULE`)."""
    if ours.p80 < other.p20:
        return "faster"
    return "slower" if ours.p20 > other.p80 else "within the noise"


def wall_clock(run: Run, passes: int) -> float:
    """Seconds per pass on the CPU."""
    begin = time.perf_counter()
    for _ in range(passes):
        run()
    return (time.perf_counter() - begin) / passes


def synchronised(run: Run, passes: int) -> float:
    """Seconds per pass by the wall clock, from an idle GPU to an idle GPU: what a caller waits for, Python included."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(passes):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / passes


def whole_passes(runs: Mapping[str, Run], device: torch.device) -> dict[str, Spread | str]:
    """By the wall clock, in turns; several passes a timing where one is short."""
    if device.type == "cpu":
        found = taken_in_turns(dict(runs), wall_clock, LONGEST_ON_CPU)
    else:
        found = taken_in_turns(dict(runs), synchronised)
    return {name: spread(seconds) for name, (seconds, _) in found.items()}


def single_kernels(runs: Mapping[str, Run], device: torch.device) -> dict[str, Spread | str]:
    """By CUDA events around CUDA graphs with a cold L2 cache, in turns, or why one cannot be timed so; on the CPU like
    whole passes."""
    if device.type == "cpu":
        return whole_passes(runs, device)
    found = cold_times(list(runs.values()), device)
    return {
        name: seconds if isinstance(seconds, str) else spread(seconds)
        for name, seconds in zip(runs, found, strict=True)
    }
