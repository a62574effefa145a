"""Times of several contenders side by side in one process, and a GPU's state meanwhile."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], object]

TIMINGS = 30  # of each contender
SHORTEST = 0.02  # seconds that one timing covers at least
LONGEST = 60.0  # seconds that all timings of one contender may take; at least five are made

SMI_FIELDS = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def timed(run: Run, passes: int) -> float:
    """Seconds per pass by CUDA events, from an idle GPU on."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(passes):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / passes


def taken_in_turns(
    contenders: dict[str, Run], measure: Callable[[Run, int], float], longest: float = LONGEST
) -> dict[str, tuple[list[float], int]]:
    """Seconds per pass of each timing of each contender, and the passes of one timing.

    They take turns, so that a clock that falls or a neighbour on the machine hits all of them alike. Every timing
    covers so many passes that it lasts `SHORTEST` seconds; warm-up passes come before and are not counted. longest:
    seconds that all timings of one contender may take; at least five are made.
    """
    passes, count = {}, TIMINGS
    for name, run in contenders.items():
        run()
        rough = measure(run, 1)
        if rough < 1.0:
            run()
            rough = max(min(measure(run, 3) for _ in range(2)), 1e-7)
        passes[name] = max(1, round(SHORTEST / rough))
        measure(run, passes[name])
        count = min(count, max(5, int(longest / (rough * passes[name]))))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(count):
        for name, run in contenders.items():
            seconds[name].append(measure(run, passes[name]))
    return {name: (found, passes[name]) for name, found in seconds.items()}


def interleaved(contenders: dict[str, Run], measure: Callable[[Run, int], float] = timed) -> dict[str, dict[str, Any]]:
    """Median and spread of the seconds per pass of each contender, `taken_in_turns`."""
    return {
        name: {
            "median_ms": 1000 * statistics.median(found),
            "fastest_ms": 1000 * min(found),
            "slowest_ms": 1000 * max(found),
            "timings": len(found),
            "passes_per_timing": passes,
        }
        for name, (found, passes) in taken_in_turns(contenders, measure).items()
    }


def _smi_command(uuid: str) -> list[str] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    return [program, "-i", uuid, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]


def state_under_load(run: Run, uuid: str) -> dict[str, str]:
    """What nvidia-smi says about clocks (MHz), power (W) and temperature (C) of a GPU while `run` keeps it busy.

    Empty where nvidia-smi is not installed or does not answer within 20 seconds.
    """
    command = _smi_command(uuid)
    if command is None:
        return {}
    begin = time.monotonic()
    while time.monotonic() - begin < 0.5:
        timed(run, 1)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while process.poll() is None and time.monotonic() - begin < 20:
            timed(run, 1)
        process.kill()
        output = process.communicate()[0]
    values = [value.strip() for value in output.strip().split(",")]
    return dict(zip(SMI_FIELDS, values, strict=True)) if len(values) == len(SMI_FIELDS) else {}
