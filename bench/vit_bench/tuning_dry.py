"""The candidates of a model's problems on a GPU that is not there: compiled and put in the order of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import vit_kernels
from vit_bench.recording import recording
from vit_bench.tuning_candidates import Compiled, by_model, candidates, compiled, modelled_cycles
from vit_bench.tuning_problems import LauncherCall, Problem, problems_of
from vit_kernels import tiles
from vit_kernels.device import Device

NOTE = "Compiled only: no GPU was used, and nothing was run, verified or timed. Cycles are the tile choice's model."


@dataclass(frozen=True)
class Listed:
    """One candidate. kernels: what it compiles to; why_not: why it may not run, "" if it may; cycles: modelled."""

    choice: Any
    kernels: list[Compiled]
    why_not: str
    cycles: float | None


def dry_run(
    calls: Sequence[LauncherCall], device: Device, *, with_pytorch: bool = True, wide: bool = False
) -> Iterator[tuple[Problem, list[Listed]]]:
    """Each problem with its candidates, the modelled choice first, the others by modelled cycles."""
    for problem in problems_of(calls, device):
        found = []
        launcher = getattr(vit_kernels, problem.kernel)
        with recording(device, torch_device="meta"):
            for choice in by_model(problem, candidates(problem, with_pytorch=with_pytorch, wide=wide), device):
                kernels, why_not = [], ""
                if choice is not tiles.TORCH:
                    kernels, why_not = compiled(problem.kernel, choice, partial(launcher, **problem.call.arguments))
                found.append(Listed(choice, kernels, why_not, modelled_cycles(problem, choice, device)))
        yield problem, found
