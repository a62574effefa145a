"""Tile choice of the GEMM-shaped operations, `linear` and `patch_embed`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .device import INTERPRETED, Device
from .tiles import FP32_RATE, L2_BYTES_PER_CLOCK, TENSOR_MEMORY, TENSOR_RATE, cdiv, interpreted_block, nearest


@dataclass(frozen=True)
class GemmTile:
    """One program computes block_m x block_n results in steps of block_k; group_m row tiles share weights in L2.

    chunk: columns that are finished at a time behind the product. tma: operands come through tensor descriptors, and
    so many programs an SM walk the tiles (0: through pointers, one program a tile).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    chunk: int = 256
    tma: int = 0


# Cycles that a step of the K loop costs whatever its size: barriers and latency.
_GEMM_STEP = 100

_HALF_TILES = (
    GemmTile(128, 256, 64, 8, 3),
    GemmTile(128, 256, 32, 8, 3),
    GemmTile(128, 128, 64, 8, 3),
    GemmTile(128, 128, 32, 8, 4),
    GemmTile(64, 128, 64, 4, 3),
    GemmTile(64, 64, 64, 4, 4),
    GemmTile(32, 64, 64, 4, 4),
    GemmTile(16, 64, 64, 4, 4),
)
_FLOAT_TILES = (
    GemmTile(64, 64, 32, 8, 3),
    GemmTile(32, 64, 32, 4, 3),
    GemmTile(16, 64, 32, 4, 3),
)


def gemm_shared_bytes(tile: GemmTile, itemsize: int, operands: int = 1) -> int:
    """Shared memory of the pipeline: num_stages slices of x and of one or two weight tiles."""
    return tile.num_stages * (tile.block_m + operands * tile.block_n) * tile.block_k * itemsize


def gemm_cycles(
    tile: GemmTile, m: int, n: int, k: int, itemsize: int, device: Device, *, operands: int = 1, tf32: bool = False
) -> float:
    """Modelled SM cycles of a GEMM [m, k] x [k, n * operands].

    The busiest SM computes ceil(tiles / SMs) tiles. Each costs its K loop (the slower of the matrix unit and the loads
    from L2) and a fixed fill-and-drain latency, which co-resident programs hide behind each other.
    """
    tensor = itemsize == 2 or tf32
    rate: float = nearest(TENSOR_RATE if tensor else FP32_RATE, device.capability)
    if tf32 and itemsize == 4:
        rate /= 2  # tf32 runs at half the rate of 16-bit operands
    if tile.block_m < 64 and device.capability >= 90:
        rate = rate / 2  # warpgroup matrix instructions need 64 rows; shorter tiles use the older ones
    steps = cdiv(k, tile.block_k)
    flops = 2 * tile.block_m * tile.block_n * operands * tile.block_k
    loads = (tile.block_m + operands * tile.block_n) * tile.block_k * itemsize
    loop = steps * (max(flops / rate, loads / L2_BYTES_PER_CLOCK) + _GEMM_STEP)
    epilogue = tile.block_m * tile.block_n * 16 / 128
    per_sm = cdiv(cdiv(m, tile.block_m) * cdiv(n, tile.block_n), device.sm_count)
    resident = max(1, device.shared_memory // gemm_shared_bytes(tile, itemsize, operands))
    resident = min(resident, 16 // tile.num_warps)
    return per_sm * loop + cdiv(per_sm, resident) * (1200 + epilogue)


def _interpreted_gemm(m: int, n: int, k: int) -> GemmTile:
    return GemmTile(interpreted_block(m), max(64, interpreted_block(n)), interpreted_block(k), 4, 1)


@functools.lru_cache(maxsize=4096)
def choose_gemm(
    m: int,
    n: int,
    k: int,
    itemsize: int,
    device: Device,
    *,
    gated: bool = False,
    long_epilogue: bool = False,
    tf32: bool = False,
    described: bool = False,
) -> GemmTile:
    """The candidate with the least modelled time for x [m, k] times weights [n, k] (twice [n, k] when gated).

    long_epilogue: a residual is added or row statistics are emitted. That, like the second accumulator of a gated
    activation, takes registers, so the tiles whose compiled code would spill then are left out.
    described: x and the weights can be loaded through tensor descriptors.
    """
    if device == INTERPRETED:
        return _interpreted_gemm(m, n, k)
    operands = 2 if gated else 1
    long_epilogue |= device.capability in TENSOR_MEMORY
    largest = 64 * 128 if gated else 128 * 128 if long_epilogue else 128 * 256
    candidates = [
        tile
        for tile in (_HALF_TILES if itemsize == 2 else _FLOAT_TILES)
        if gemm_shared_bytes(tile, itemsize, operands) <= device.shared_memory - 2048
        and tile.block_m * tile.block_n <= largest
    ]
    return min(candidates, key=lambda t: gemm_cycles(t, m, n, k, itemsize, device, operands=operands, tf32=tf32))


_PATCH_TILES_HALF = (GemmTile(64, 128, 32, 8, 3), GemmTile(64, 64, 32, 4, 3), GemmTile(16, 64, 32, 4, 3))
_PATCH_TILES_FLOAT = (GemmTile(32, 64, 16, 4, 2), GemmTile(16, 64, 32, 4, 2))


@functools.lru_cache(maxsize=4096)
def choose_patch_embed(m: int, n: int, k: int, itemsize: int, device: Device, *, tf32: bool = False) -> GemmTile:
    """As `choose_gemm`, among tiles that leave registers for the gathered addresses of the pixels."""
    if device == INTERPRETED:
        return _interpreted_gemm(m, n, k)
    candidates = _PATCH_TILES_HALF if itemsize == 2 else _PATCH_TILES_FLOAT
    if device.capability in TENSOR_MEMORY:
        candidates = candidates[1:]
    return min(candidates, key=lambda t: gemm_cycles(t, m, n, k, itemsize, device, tf32=tf32))

