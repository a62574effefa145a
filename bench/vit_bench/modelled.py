"""Modelled times: the cycles by which the kernels' tiles are chosen, over the clock of a GPU under load.

    modelled_seconds("linear_tma_kernel", arguments, programs=264, num_warps=4, num_stages=3, device=H100)

A modelled time is no measurement, and never less than it takes by datasheet to move every operand once. That of a
product holds what a launch costs before its first step, as seen on an H100; the others leave it out. It knows no power
limit but the clock below. How far it is from what was measured elsewhere, `checks` says: print those ratios beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vit_bench.roofline import PEAKS, operand_bytes
from vit_kernels.attention_tiles import AttentionTile, attention_cycles
from vit_kernels.device import A100, H100, RTX_4090, Device
from vit_kernels.gemm_tiles import GemmTile, gemm_cycles, parts_cycles, sum_cycles
from vit_kernels.launch import tensor_behind
from vit_kernels.mlp_tiles import MlpTile, mlp_cycles

# Clock of an SM while its tensor cores are busy, in Hz. H100: seen in measured GEMMs of this size, where power holds it
# below its 1.98 GHz. A100: boost clock of the datasheet, less the 2 % that published GEMMs are short of it. RTX 4090:
# boost clock of the datasheet.
CLOCKS = {H100: 1.75e9, A100: 1.38e9, RTX_4090: 2.52e9}


@dataclass(frozen=True)
class Measured:
    """A plain Triton GEMM [m, k] x [k, n] in fp16 that others or we ran on that GPU, and its time in seconds."""

    label: str
    device: Device
    tile: GemmTile
    m: int
    n: int
    k: int
    seconds: float


_WIDE, _SQUARE, _SHORT = GemmTile(128, 256, 64, 8, 3), GemmTile(128, 128, 64, 4, 4), GemmTile(128, 128, 32, 4, 4)
_TUTORIAL = "Triton's tutorial kernel"

# H100 80GB HBM3: measured once, Triton 3.6.0, median of do_bench, clock not set. The others: Triton's tutorial 03 as
# published, 250 TFLOP/s on an A100 and 158 on an RTX 4090 at 4096 cubed, with the best of its tiles.
MEASURED = (
    Measured(f"{_TUTORIAL}, fc1 of ViT-B at batch 64", H100, _WIDE, 12608, 3072, 768, 0.1087e-3),
    Measured(f"{_TUTORIAL}, fc1 of ViT-B at batch 64, 128 x 128", H100, _SQUARE, 12608, 3072, 768, 0.1268e-3),
    Measured(f"{_TUTORIAL}, fc2 of ViT-B at batch 64", H100, _WIDE, 12608, 768, 3072, 0.1166e-3),
    Measured(f"{_TUTORIAL}, fc2 of ViT-B at batch 64, 128 x 128", H100, _SQUARE, 12608, 768, 3072, 0.1126e-3),
    Measured(f"{_TUTORIAL}, 65536 x 1024 x 1024", H100, _WIDE, 65536, 1024, 1024, 0.2492e-3),
    Measured(f"{_TUTORIAL}, 4096 cubed", A100, _SHORT, 4096, 4096, 4096, 2 * 4096**3 / 250e12),
    Measured(f"{_TUTORIAL}, 4096 cubed", RTX_4090, _SHORT, 4096, 4096, 4096, 2 * 4096**3 / 158e12),
)


def gemm_seconds(
    tile: GemmTile, m: int, n: int, k: int, device: Device, *, operands: int = 1, activated: bool = False,
    residual: bool = False,
) -> float:  # fmt: skip
    """Modelled seconds of a 16-bit GEMM [m, k] x [k, n * operands]. Raises ValueError for a GPU without a clock."""
    options = {"operands": operands, "activated": activated, "residual": residual}
    return gemm_cycles(tile, m, n, k, 2, device, **options) / clock(device)


def clock(device: Device) -> float:
    if device not in CLOCKS:
        raise ValueError(f"device must be one of {', '.join(d.name for d in CLOCKS)}; got {device.name!r}")
    return CLOCKS[device]


def checks(device: Device) -> list[tuple[Measured, float]]:
    """What was measured on this GPU, and the modelled time over the measured one."""
    found = [measured for measured in MEASURED if measured.device == device]
    return [(one, gemm_seconds(one.tile, one.m, one.n, one.k, device) / one.seconds) for one in found]


def how_far_off(device: Device) -> str:
    """A sentence to stand beside modelled times: what the model makes of known times on this GPU; "" where none are."""
    ratios = sorted(ratio for _, ratio in checks(device))
    if not ratios:
        return ""
    least, most = f"{ratios[0]:.2f}", f"{ratios[-1]:.2f}"
    times = least if least == most else f"{least} to {most}"
    return f"Plain Triton GEMMs whose times on {device.name} are known are modelled at {times} times those."


def blocks_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Blocks of a launch whose kernel takes them from its descriptors, by the names that others give them; of others
    nothing."""
    if "w1_desc" in arguments:
        return {"BLOCK_H": arguments["w1_desc"].block_shape[0]}
    if "wide_desc" not in arguments:
        return {}
    features, step = arguments["w_desc"].block_shape
    rows = sum(arguments[name].block_shape[0] for name in ("wide_desc", "tail_desc"))
    return {"BLOCK_M": rows, "BLOCK_N": features, "BLOCK_K": step}


def blocks_of_patches(arguments: Mapping[str, Any]) -> int:
    """Blocks of patches of a launch of `patch_embed_blocks_kernel`."""
    _, images, high, wide, _ = arguments["pixels_desc"].block_shape
    grid = arguments["batch"], arguments["grid_h"], arguments["grid_w"] // 2
    return math.prod(-(-size // block) for size, block in zip(grid, (images, high, wide), strict=True))


def modelled_seconds(
    kernel: str, arguments: Mapping[str, Any], programs: int, num_warps: int, num_stages: int, device: Device
) -> float | None:
    """Modelled seconds of one launch in 16 bits, from its grid and its arguments as they were passed.

    None for kernels that multiply no matrices, for tiles without figures, and for GPUs whose clock is not known here.
    """
    seconds = _by_the_tile_choice(kernel, arguments, programs, num_warps, num_stages, device)
    if seconds is None:
        return None
    operands = [tensor for value in arguments.values() if (tensor := tensor_behind(value)) is not None]
    return max(seconds, operand_bytes(operands) / PEAKS[device].bandwidth)


def _by_the_tile_choice(
    kernel: str, arguments: Mapping[str, Any], programs: int, num_warps: int, num_stages: int, device: Device
) -> float | None:
    a = {**arguments, **blocks_of(arguments)}
    if device not in CLOCKS:
        return None
    blocks = a.get("BLOCK_M", 0), a.get("BLOCK_N", 0), a.get("BLOCK_K", 0)  # 0 where a kernel has none
    if kernel in ("linear_kernel", "linear_tma_kernel"):
        walk = -(-programs // device.sm_count) if kernel == "linear_tma_kernel" else 0
        tile = GemmTile(*blocks, num_warps, num_stages, a["GROUP_M"], a["CHUNK"], walk)
        options = {"operands": 2 if a["ACTIVATION"] == "swiglu" else 1, "residual": bool(a.get("HAS_RESIDUAL"))}
        return gemm_seconds(tile, a["M"], a["N"], a["K"], device, **options)
    if kernel == "linear_roles_kernel":
        tile = GemmTile(*blocks, 4, a["STAGES"], a["GROUP_M"], tma=1, roles=True)
        options = {"activated": a["ACTIVATION"] != "none", "residual": bool(a.get("HAS_RESIDUAL"))}
        return gemm_seconds(tile, a["M"], a["N"], a["K"], device, **options)
    if kernel == "linear_staying_kernel":
        tile = GemmTile(*blocks, 4, a["STAGES"], tma=1, staying=True)
        return gemm_seconds(tile, a["M"], a["N"], a["K"], device, residual=bool(a.get("HAS_RESIDUAL")))
    if kernel == "linear_columns_kernel":
        each = 2 if a["BLOCK_N"] == 64 else 1  # programs that an SM holds
        tile = GemmTile(*blocks, num_warps, a["STAGES"], tma=each, columns=True)
        options = {"activated": a["ACTIVATION"] != "none", "residual": bool(a.get("HAS_RESIDUAL"))}
        return gemm_seconds(tile, a["M"], a["N"], a["K"], device, **options)
    if kernel == "linear_parts_kernel":
        tile = GemmTile(*blocks, num_warps, num_stages, tma=int(a["DESCRIBED"]), parts=a["parts"])
        return parts_cycles(tile, a["M"], a["N"], a["K"], device) / clock(device)
    if kernel == "linear_sum_kernel":
        return sum_cycles(a["PARTS"], a["M"], a["N"], device) / clock(device)
    if kernel == "patch_embed_kernel":
        # A product like the others, but for how its rows are gathered. Class and register tokens are no patches.
        patches = a["M"] // a["T"] * (a["T"] - a["PREFIX"])
        tile = GemmTile(*blocks, num_warps, num_stages)
        return gemm_seconds(tile, patches, a["N"], a["K"], device)
    if kernel == "patch_embed_blocks_kernel":
        tile = GemmTile(*blocks, 4, a["STAGES"], tma=1, blocks=True)
        # Rows as blocks have them, with what is no patch; positions and statistics, as a residual and statistics.
        rows = tile.block_m * blocks_of_patches(a)
        return gemm_seconds(tile, rows, a["N"], a["K"], device, residual=a["position_ptr"] is not None)
    if kernel == "attention_kernel":
        batch, queries, heads, width = a["q_ptr"].shape
        tile = AttentionTile(*blocks[:2], num_warps, num_stages)
        cycles = attention_cycles(tile, batch * heads, queries, a["keys"], width, device)
        return cycles / clock(device) if cycles < float("inf") else None
    if kernel == "attention_whole_kernel":
        batch, queries, _ = a["q_desc"].shape
        tile = AttentionTile(*blocks[:2], num_warps, 2, a["tiles_each"])
        return attention_cycles(tile, batch * a["heads"], queries, a["keys"], a["WIDTH"], device) / clock(device)
    if kernel == "attention_roles_kernel":
        queries = a["q_desc"].shape[1]
        tile = AttentionTile(*blocks[:2], 4, a["STAGES"], roles=True)
        return attention_cycles(tile, a["sequences"], queries, a["keys"], a["WIDTH"], device) / clock(device)
    if kernel == "mlp_roles_kernel" or (kernel == "mlp_kernel" and a["ACTIVATION"] != "swiglu"):
        tile = MlpTile(a["BLOCK_M"], a["BLOCK_H"], num_warps, num_stages)
        if kernel == "mlp_roles_kernel":
            tile = MlpTile(a["BLOCK_M"], a["BLOCK_H"], num_warps, a["STAGES"], roles=True, kept=a["KEPT"])
        cycles = mlp_cycles(tile, a["M"], a["WIDTH"], a["HIDDEN"], device)
        return None if cycles is None else cycles / clock(device)
    return None
