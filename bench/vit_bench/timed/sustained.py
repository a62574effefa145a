"""What a kernel takes without a pause, and the clock of the SMs meanwhile.

A GPU at its power limit lowers its clock. A product timed now and then, between things that take little power, shows
what its code is worth; timed without a pause it shows what the power limit leaves of that. On an H100 (700 W) large
16-bit products ran at 1.6 to 1.8 GHz the one way and at 1.2 to 1.6 GHz the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
import triton
import triton.language as tl

from vit_bench.results import Sustained
from vit_bench.tuning_gpu import captured

_CALLS = 100  # of a graph; the stamps around them are launches, too
_LEAST = 0.4  # seconds without a pause before the clock has settled
_STAMP = 3  # numbers: SM, its cycles, nanoseconds

Stamps = Mapping[int, tuple[int, int]]


@triton.jit
def stamp_kernel(out_ptr):  # [programs, 3]
    """This program writes which SM it is on, and that SM's cycles and the GPU's nanoseconds now."""
    program = tl.program_id(0)
    sm = tl.inline_asm_elementwise(
        "{ .reg .u32 s; mov.u32 s, %smid; cvt.u64.u32 $0, s; } // $1", "=l,r", [program], tl.int64, False, 1
    )
    cycles = tl.inline_asm_elementwise("mov.u64 $0, %clock64; // $1", "=l,r", [program], tl.int64, False, 1)
    nanoseconds = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer; // $1", "=l,r", [program], tl.int64, False, 1)
    tl.store(out_ptr + program * 3, sm)
    tl.store(out_ptr + program * 3 + 1, cycles)
    tl.store(out_ptr + program * 3 + 2, nanoseconds)


def between(before: Stamps, after: Stamps) -> tuple[float, float]:
    """Nanoseconds between two stamps of the same SMs, and cycles a nanosecond: medians of theirs. Cycles of different
    SMs have nothing in common.

    before, after: by SM, its cycles and the nanoseconds. ValueError where no SM has both.
    """
    spans = [(after[sm][0] - before[sm][0], after[sm][1] - before[sm][1]) for sm in before.keys() & after.keys()]
    if not spans:
        raise ValueError("before and after must have an SM in common; got none")
    return statistics.median(passed for _, passed in spans), statistics.median(c / passed for c, passed in spans)


def _read(stamps: torch.Tensor) -> dict[int, tuple[int, int]]:
    return {sm: (cycles, nanoseconds) for sm, cycles, nanoseconds in stamps.tolist()}


def sustained(run: Callable[[], object], device: torch.device) -> Sustained:
    """Seconds of a call among many without a pause, in a CUDA graph, caches warm, and the clock meanwhile.

    RuntimeError for what cannot be captured.
    """
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    before, after = (torch.zeros(sms, _STAMP, dtype=torch.int64, device=device) for _ in range(2))

    def call() -> None:
        run()
        stamp_kernel[(sms,)](after)

    def body() -> None:
        stamp_kernel[(sms,)](before)
        for _ in range(_CALLS):
            run()
        stamp_kernel[(sms,)](after)

    graph = captured(call, body)
    begin = time.perf_counter()
    while time.perf_counter() - begin < _LEAST:
        graph.replay()
        torch.cuda.synchronize(device)
    nanoseconds, rate = between(_read(before), _read(after))
    return Sustained(nanoseconds / 1e9 / _CALLS, rate * 1e9)
