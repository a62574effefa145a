"""Rows of one case without a GPU: what its compiled code takes, bounds from datasheets, and modelled times.

Launches go through the recording driver for a chosen GPU. Nothing is executed and nothing is timed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vit_bench.inspection import LaunchReport, recorded_launches, report
from vit_bench.plan import DTYPES
from vit_bench.recording import require_compiler
from vit_bench.records import version
from vit_bench.results import OURS, Row
from vit_bench.timed.shapes import Case
from vit_bench.timed.traffic import block_traffic, forward_peak
from vit_bench.timed.work import work
from vit_kernels.device import Device


def code_of(launch: LaunchReport) -> dict[str, Any]:
    """What the compiled code of one launch takes, in plain values."""
    return {
        "launch": launch.label,
        "kernel": launch.kernel,
        "times": launch.times,
        "tile": launch.tile,
        "warps": launch.num_warps,
        "stages": launch.num_stages,
        "programs": launch.grid[0],
        "registers": launch.registers,
        "spilled_bytes": launch.stack,
        "shared": launch.shared,
        "shared_limit": launch.shared_limit,
        "ctas_per_sm": launch.ctas_per_sm,
        "waves": launch.waves,
        "tensor_cores": launch.code.tensor,
        "tma": launch.code.tma,
        "specialized": launch.code.specialized,
        "load_bytes": launch.code.load_bytes,
        "epilogue_slots": launch.epilogue.slots_per_output if launch.epilogue else None,
        "flops": launch.roofline.flops,
        "bytes": launch.roofline.bytes,
        "bound": launch.roofline.bound,
        "bound_s": launch.roofline.seconds,
        "modelled_s": launch.modelled_s,
    }


@dataclass
class Compiling:
    """Rows of cases compiled for one GPU. Raises RuntimeError where Triton interprets instead of compiling."""

    gpu: Device

    def __post_init__(self) -> None:
        require_compiler()
        self.label = self.gpu.name

    def rows(self, case: Case, dtype: str, run: int) -> list[Row]:
        """One row, of ours: others' code is not compiled here."""
        once = case.suite != "model"
        launches = [
            report(launch, label, 1 if once else call.times, self.gpu, DTYPES[dtype])
            for call, label, launch in recorded_launches(case.calls(DTYPES[dtype]), self.gpu)
        ]
        flops, nbytes = work(case, DTYPES[dtype])
        modelled = [launch.modelled_s for launch in launches]
        known = any(seconds is not None for seconds in modelled)
        row = Row(
            run=run,
            suite=case.suite,
            case=case.name,
            label=case.label,
            contender=OURS,
            device=self.gpu.name,
            dtype=dtype,
            source="compiled",
            reason="compiled only: bounds from the code and from datasheets, modelled times; nothing was timed",
            model=case.model,
            shape=case.shape,
            settings={"vit-engine": version("vit-engine") or "", "triton": version("triton") or ""},
            images=case.batch if case.suite == "model" else 0,
            flops=flops,
            nbytes=nbytes,
            launches=sum(launch.times for launch in launches),
            bound_s=sum(launch.times * launch.roofline.seconds for launch in launches),
            # A launch without a model counts with its bound, as in `inspection.Forward`.
            modelled_s=sum(
                launch.times * (launch.roofline.seconds if launch.modelled_s is None else launch.modelled_s)
                for launch in launches
            )
            if known
            else None,
            code={"kernels": [code_of(launch) for launch in launches]},
        )
        if once:
            return [row]
        assert case.config is not None
        moved = block_traffic(case.config, case.batch, dtype, self.gpu)
        peak = forward_peak(case.config, case.batch, DTYPES[dtype], self.gpu)
        return [replace(row, code=row.code | {"block": moved}, peak_bytes=peak)]
