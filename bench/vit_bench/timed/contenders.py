"""Who takes part in a comparison: a name, what has to be installed, and a function that gets it ready to run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vit_bench.records import version
from vit_bench.results import OURS

Run = Callable[[], torch.Tensor]

COMPILE_MODES = ("default", "max-autotune")
# Kernels are timed inside a CUDA graph of ours, where another one cannot be captured.
KERNEL_COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")


class CannotRunError(Exception):
    """A contender cannot run a case; the message says why."""


@dataclass(frozen=True)
class Contender:
    """make: from a problem of its suite to what is run, CannotRunError where it cannot; packages: distributions that it
    needs, the first of them names its version; settings: how it is set up; devices: where it can run; by_torch: whether
    PyTorch runs it, so that its memory and operators can be seen."""

    name: str
    make: Callable[[Any], Run] = field(repr=False)
    packages: tuple[str, ...] = ("torch",)
    settings: dict[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cuda", "cpu")
    by_torch: bool = True

    def missing(self) -> str:
        """Why it cannot run on this installation; empty if it can."""
        lacking = [package for package in self.packages if version(package) is None]
        return f"not installed: pip install {' '.join(lacking)}" if lacking else ""

    def labelled(self) -> dict[str, str]:
        """Versions and settings, for `results.Row.settings`."""
        return {package: version(package) or "" for package in self.packages} | self.settings


def taking_part(contenders: Sequence[Contender], device: torch.device) -> list[Contender]:
    """Those that there are for this kind of device, ours first."""
    found = [one for one in contenders if device.type in one.devices]
    return sorted(found, key=lambda one: one.name != OURS)


def compiled(make: Callable[[Any], Run], mode: str) -> Callable[[Any], Run]:
    """The same through torch.compile, compiled by its first run for exactly these shapes."""

    @functools.wraps(make)
    def make_compiled(problem: Any) -> Run:
        return torch.compile(make(problem), mode=mode, dynamic=False)

    return make_compiled
