"""The table of shapes under pytest-benchmark: `pytest bench --benchmark-only`, or once each with `--benchmark-disable`.

A result is compared with the reference before it is timed. With a GPU, ours is timed on it. Without one, what runs is
the CPU path: models on the `torch` backend, and in place of each kernel PyTorch's operators, in a table of their own
that says so. Cases that are too large for a CPU are skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vit_bench.plan import DTYPES
from vit_bench.results import OURS
from vit_bench.timed.machine import cpu_label, gpu_label
from vit_bench.timed.problems import Problems
from vit_bench.timed.shapes import Case, table
from vit_bench.timed.work import work

MOST_ON_CPU = 5e9  # FLOP of a case

GPU = torch.cuda.is_available()
DTYPE = "bf16" if GPU else "fp32"


def group(case: Case) -> str:
    """What a table of times is of."""
    if GPU:
        return f"{case.suite} on {gpu_label(torch.cuda.get_device_name())}, {DTYPE}"
    what = "models, backend torch" if case.suite == "model" else "PyTorch's operators: these are no times of kernels"
    return f"{what}; {cpu_label()}, {DTYPE}"


@pytest.fixture(scope="module")
def problems() -> Problems:
    return Problems(torch.device("cuda" if GPU else "cpu"))


@pytest.mark.parametrize("case", table(), ids=str)
@torch.no_grad()
def test_time(benchmark: Any, problems: Problems, case: Case) -> None:
    flops, _ = work(case, DTYPES[DTYPE])
    if not GPU and flops > MOST_ON_CPU:
        pytest.skip(f"more than {MOST_ON_CPU / 1e9:.0f} GFLOP: needs a GPU")  # one line for all of them
    problem = problems.of(case, DTYPES[DTYPE])
    contender = next((one for one in problem.contenders if one.name == OURS), problem.contenders[0])
    run = contender.make(problem.given)
    benchmark.group = group(case)
    with torch.inference_mode():
        benchmark.extra_info |= {"contender": contender.name, "flops": flops, **problem.judge(contender, run)}
        benchmark((lambda: (run(), torch.cuda.synchronize())) if GPU else run)
