"""What this machine reaches here and now: a large copy and a large matrix product, in the process that times."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vit_bench.full.timing import LONGEST, Run, taken_in_turns
from vit_bench.plan import DTYPES
from vit_bench.results import Ceilings
from vit_bench.roofline import gemm_flops
from vit_bench.timed.timing import LONGEST_ON_CPU, synchronised, wall_clock

# Far past every cache, and long enough that launching costs nothing beside them.
COPIED = {"cuda": 1 << 30, "cpu": 256 << 20}  # bytes read, and as many written
SQUARE = {"cuda": 8192, "cpu": 1024}  # rows and columns of the factors


@torch.inference_mode()
def measure(device: torch.device, dtypes: Sequence[str]) -> Ceilings:
    """Bytes/s of a copy, reading and writing counted, and FLOP/s of a matrix product in each dtype, by the fastest
    timing of each: a ceiling is what can be reached."""
    return Ceilings(_copy_rate(device), {dtype: _product_rate(device, DTYPES[dtype]) for dtype in dtypes})


def _least_seconds(run: Run, device: torch.device) -> float:
    on_cpu = device.type == "cpu"
    contender = {"it": run}
    clock, longest = (wall_clock, LONGEST_ON_CPU / 4) if on_cpu else (synchronised, LONGEST)
    return min(taken_in_turns(contender, clock, longest)["it"][0])


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), device)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = SQUARE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return gemm_flops(side, side, side) / _least_seconds(lambda: torch.mm(a, b, out=product), device)
