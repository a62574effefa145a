"""The figures of one recorded launch: what it computes, in how many tiles, and the least and the modelled time.

A part of what `vit_bench.inspection` finds, without taking the machine code apart, so that many shapes go quickly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from vit_bench.inspection import arguments_of, modelled_time, resident_ctas, tensors_of, tile_of
from vit_bench.recording import Launch
from vit_bench.roofline import Roofline, launch_flops, operand_bytes, roofline
from vit_kernels.device import Device


@dataclass(frozen=True)
class Recorded:
    """Of one launch, compiled and not executed.

    tile: its BLOCK_ sizes; registers, stack: per thread (stack in bytes, spills included); shared: bytes per CTA;
    ctas: of the launch; waves: those over what all SMs hold at a time; waste: FLOP of whole tiles over those that the
    result needs, None where that is not known; modelled_s: None where there is no model (`vit_bench.modelled`).
    """

    kernel: str
    tile: dict[str, int]
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    shared: int
    ctas: int
    ctas_per_sm: int
    waves: float
    waste: float | None
    roofline: Roofline
    modelled_s: float | None

    @property
    def seconds(self) -> float:
        """The modelled time, at least the bound, which knows of memory what the model does not; else the bound."""
        return max(self.modelled_s or 0.0, self.roofline.seconds)

    def as_code(self) -> dict[str, Any]:
        """An element of `code["kernels"]` of a `vit_bench.results.Row`, under the names that benchmarks use."""
        return {
            "kernel": self.kernel,
            "tile": self.tile,
            "warps": self.num_warps,
            "stages": self.num_stages,
            "programs": self.ctas,
            "registers": self.registers,
            "spilled_bytes": self.stack,
            "shared": self.shared,
            "ctas_per_sm": self.ctas_per_sm,
            "waves": self.waves,
            "flops": self.roofline.flops,
            "bytes": self.roofline.bytes,
            "bound": self.roofline.bound,
            "bound_s": self.roofline.seconds,
            "modelled_s": self.modelled_s,
        } | ({} if self.waste is None else {"tile_waste": self.waste})


_ATTENTION = ("attention_kernel", "attention_whole_kernel", "attention_roles_kernel")


def recorded(launch: Launch, dtype: torch.dtype, device: Device) -> Recorded:
    """The figures of a launch that `vit_bench.recording` recorded for `device`."""
    arguments = arguments_of(launch)
    found, resident, ctas = launch.binary.resources, resident_ctas(launch, device), prod(launch.grid)
    size = operand_bytes(tensors_of(launch.values))
    return Recorded(
        kernel=launch.kernel,
        tile=tile_of(arguments),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        registers=found.registers,
        stack=found.spilled_bytes,
        shared=launch.shared,
        ctas=ctas,
        ctas_per_sm=resident,
        waves=ctas / (resident * device.sm_count),
        waste=tile_waste(arguments) if launch.kernel in _ATTENTION else None,
        roofline=roofline(launch_flops(launch.kernel, arguments), size, dtype, device),
        modelled_s=modelled_time(launch, arguments, dtype, device),
    )


def tile_waste(arguments: dict[str, Any]) -> float:
    """Scores that attention's tiles compute over those of queries with keys, for a launch that sees all keys.

    Tiles have BLOCK_M rows; keys go in blocks of BLOCK_N, and what whole blocks leave over in one of REST, where warps
    have roles behind one of HALF the width or not. Columns that pad the head width count as well; rows do not that no
    warpgroup computes.
    """
    a = arguments
    queries, keys, width = a["queries"], a["keys"], a["WIDTH"]
    # Where warps have roles, a warpgroup of 64 rows without a query lets the tile pass.
    block_m = 64 if "HALF" in a else a["BLOCK_M"]
    rows = -(-queries // block_m) * block_m
    columns = keys // a["BLOCK_N"] * a["BLOCK_N"] + a.get("HALF", False) * (a["BLOCK_N"] // 2) + a["REST"]
    return rows * columns * (a.get("MAIN", width) + a.get("TAIL", 0)) / (queries * keys * width)
