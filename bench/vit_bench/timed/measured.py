"""Rows of one case, measured on the device at hand: right first, then timed, everyone in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[reportPrivateImportUsage]

from vit_bench.dropin_launches import OneAttention
from vit_bench.full.timing import state_under_load
from vit_bench.launch_plan import OtherWork
from vit_bench.memory import peak_of
from vit_bench.plan import DTYPES
from vit_bench.results import OURS, Row, Spread
from vit_bench.timed.contenders import CannotRunError, Contender, Run
from vit_bench.timed.machine import cpu_label, gpu_label
from vit_bench.timed.problems import Figures, Problem, Problems
from vit_bench.timed.shapes import Case
from vit_bench.timed.sustained import sustained
from vit_bench.timed.work import work
from vit_bench.tuning import GpuLostError
from vit_bench.tuning_candidates import reason


@dataclass
class _Entrant:
    """A contender that may be timed, or why not."""

    contender: Contender
    run: Run | None = None
    errors: Figures | None = None
    why_not: str = ""


def _never(problem: Any) -> Run:
    raise CannotRunError("there is no problem to be made ready for")


# Stands in the row of a case that could not even be made ready for ours.
_NOBODY = Contender(OURS, _never, ("vit-engine", "torch"))


class Measuring:
    """Measures cases on one device. Not for several threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.source = "cpu" if device.type == "cpu" else "gpu"
        self.label = cpu_label() if device.type == "cpu" else gpu_label(torch.cuda.get_device_name(device))
        self._problems = Problems(device)

    @torch.no_grad()
    def rows(self, case: Case, dtype: str, run: int) -> list[Row]:
        """One row per contender. Raises GpuLostError when a contender left the GPU unusable.

        Models are made outside of inference mode, as users make theirs, and run in it.
        """
        flops, nbytes = work(case, DTYPES[dtype])
        entrants, times, state = self._timed(case, dtype)
        rows = []
        for one in entrants:
            name = one.contender.name
            found = times.get(name, one.why_not)
            measured: dict[str, Any] = {"source": "not run", "reason": found}
            if isinstance(found, Spread) and one.run is not None:
                measured = {"source": self.source, "seconds": found, "errors": one.errors or {}}
                measured |= self._beside(one.contender, one.run)
                if self.device.type == "cuda" and case.suite != "model":
                    with torch.inference_mode():
                        measured["sustained"] = sustained(one.run, self.device)
                if name == OURS:
                    measured["state"] = state
            rows.append(
                Row(
                    run=run,
                    suite=case.suite,
                    case=case.name,
                    label=case.label,
                    contender=name,
                    device=self.label,
                    dtype=dtype,
                    model=case.model,
                    shape=case.shape,
                    settings=one.contender.labelled(),
                    images=case.batch if case.suite == "model" else 0,
                    flops=flops,
                    nbytes=nbytes,
                    **measured,
                )
            )
        return rows

    def _timed(self, case: Case, dtype: str) -> tuple[list[_Entrant], dict[str, Any], dict[str, str]]:
        """Everyone who could take part, times by name, and the GPU's state under load."""
        if self.device.type == "cuda":
            # torch.compile counts the compilations of a function over all cases, and at some number gives up.
            torch._dynamo.reset()
        try:
            problem = self._problems.of(case, DTYPES[dtype])
            entrants = [self._entered(one, problem) for one in problem.contenders]
            runs = {one.contender.name: one.run for one in entrants if one.run is not None}
            with torch.inference_mode():
                times = problem.times(runs, self.device) if runs else {}
                return entrants, times, self._state(runs)
        except torch.OutOfMemoryError as error:
            self._synchronise(_NOBODY)
            torch.cuda.empty_cache()
            return [_Entrant(_NOBODY, why_not=f"too large for this GPU's memory: {reason(error)}")], {}, {}

    def _entered(self, contender: Contender, problem: Problem) -> _Entrant:
        """Ready to be timed, its result judged; or why it is not timed."""
        if missing := contender.missing():
            return _Entrant(contender, why_not=missing)
        try:
            run = contender.make(problem.given)
            with torch.inference_mode():
                errors = problem.judge(contender, run)
            self._synchronise(contender)
        except CannotRunError as error:
            return _Entrant(contender, why_not=str(error))
        except AssertionError as error:
            return _Entrant(contender, why_not=f"wrong result, not timed: {reason(error)}")
        except GpuLostError:
            raise
        # Whatever a library raises is the reason why it was not timed, and the others go on.
        except Exception as error:
            self._synchronise(contender)
            return _Entrant(contender, why_not=reason(error))
        return _Entrant(contender, run, errors)

    def _synchronise(self, contender: Contender) -> None:
        """GpuLostError if the GPU does not answer any more."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            lost = f"{contender.name} left the GPU unusable: {reason(error)}"
            raise GpuLostError(lost, contender.name, reason(error)) from error

    def _state(self, runs: dict[str, Run]) -> dict[str, str]:
        if self.device.type != "cuda" or OURS not in runs:
            return {}
        return state_under_load(runs[OURS], str(torch.cuda.get_device_properties(self.device).uuid))

    @torch.inference_mode()
    def _beside(self, contender: Contender, run: Run) -> dict[str, Any]:
        """Peak memory and launches; on the CPU, which launches nothing, the operators that compute."""
        if not contender.by_torch:
            return {"launches": launches_of(run)} if self.device.type == "cuda" else {}
        if self.device.type == "cpu":
            return {"peak_bytes": peak_of(run, launchers=False).nbytes, "code": {"operators": operators_of(run)}}
        return {"peak_bytes": self._peak(run), "launches": launches_of(run)}

    def _peak(self, run: Run) -> int:
        """Most bytes that PyTorch's allocator holds during a call beyond what it held before."""
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def operators_of(run: Callable[[], object]) -> int:
    """Operators of PyTorch that compute in one call; fused attention counts once."""
    with OneAttention() as attention, OtherWork() as work:
        run()
    return len(work.seen) + attention.calls


def launches_of(run: Callable[[], object]) -> int | None:
    """Kernels that the GPU ran in one call, copies and fills of memory not among them; None where they are not seen."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() or () if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in kernels) or None
