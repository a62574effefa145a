"""Tile choice: pure functions (problem, dtype size, device) -> tile.

A GEMM-shaped operation takes the candidate with the least modelled time (`gemm_cycles`); nothing is measured at run
time and nothing here asks the machine. The candidates are few, and those that a preset model gets compile without
register spills for every supported GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .device import INTERPRETED, Device


@dataclass(frozen=True)
class RowsTile:
    """Rows and columns of one program of a row-wise kernel."""

    block_m: int
    block_n: int
    num_warps: int


@dataclass(frozen=True)
class GemmTile:
    """One program computes block_m x block_n results in steps of block_k; group_m row tiles share weights in L2."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


@dataclass(frozen=True)
class AttentionTile:
    """One program computes block_m queries of one head against block_n keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class MlpTile:
    """One program keeps block_m rows in registers and walks the hidden features block_h at a time."""

    block_m: int
    block_h: int
    num_warps: int
    num_stages: int


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def split_width(width: int, least_main: int = 16) -> tuple[int, int]:
    """A width as two powers of two (main, tail) of at least 16 each, or one (tail 0), that cover it with little waste.

    tl.dot takes powers of two; 80 as 64 + 16 costs 80 columns of work where 128 would cost 128. A width whose main part
    would be under least_main stays in one piece.
    """
    whole = max(next_power_of_2(width), 16)
    main = whole // 2
    tail = max(next_power_of_2(width - main), 16)
    if main < least_main or main + tail >= whole:
        return whole, 0
    return main, tail


def choose_rows(m: int, n: int, itemsize: int, device: Device) -> RowsTile:
    """Whole rows up to 4096 columns: about 2048 elements a program, or one row where that leaves SMs without any."""
    block_n = min(next_power_of_2(n), 4096)
    block_m = max(1, min(2048 // block_n, 32))
    if cdiv(m, block_m) < device.sm_count:
        block_m = 1
    return RowsTile(block_m, block_n, 8 if block_n >= 4096 else 4)


# Dense multiply-adds count two. Tensor-core FLOP per clock and SM with fp32 accumulation, by compute capability.
_TENSOR_RATE = {80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
_FP32_RATE = {80: 128, 86: 256, 89: 256, 90: 256, 100: 256, 120: 256}
_L2_BYTES_PER_CLOCK = 48
# Cycles that a step of the K loop, or a block of keys with its softmax, costs whatever its size: barriers and latency.
_GEMM_STEP = 100
_ATTENTION_STEP = 250


def nearest(table: dict[int, int], capability: int) -> int:
    """The entry of the newest listed GPU that is not newer than this one."""
    return table[max(c for c in table if c <= max(capability, min(table)))]


# Data-centre Blackwell keeps accumulators in tensor memory and reads all of one back for the epilogue:
# the largest tiles spill there.
_TENSOR_MEMORY = range(100, 120)

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
    rate: float = nearest(_TENSOR_RATE if tensor else _FP32_RATE, device.capability)
    if tf32 and itemsize == 4:
        rate /= 2  # tf32 runs at half the rate of 16-bit operands
    if tile.block_m < 64 and device.capability >= 90:
        rate = rate / 2  # warpgroup matrix instructions need 64 rows; shorter tiles use the older ones
    steps = cdiv(k, tile.block_k)
    flops = 2 * tile.block_m * tile.block_n * operands * tile.block_k
    loads = (tile.block_m + operands * tile.block_n) * tile.block_k * itemsize
    loop = steps * (max(flops / rate, loads / _L2_BYTES_PER_CLOCK) + _GEMM_STEP)
    epilogue = tile.block_m * tile.block_n * 16 / 128
    per_sm = cdiv(cdiv(m, tile.block_m) * cdiv(n, tile.block_n), device.sm_count)
    resident = max(1, device.shared_memory // gemm_shared_bytes(tile, itemsize, operands))
    resident = min(resident, 16 // tile.num_warps)
    return per_sm * loop + cdiv(per_sm, resident) * (1200 + epilogue)


def _interpreted_block(size: int) -> int:
    """The interpreter pays for every program and every element: few programs, little padding."""
    return min(128, max(16, next_power_of_2(size)))


def _interpreted_gemm(m: int, n: int, k: int) -> GemmTile:
    return GemmTile(_interpreted_block(m), max(64, _interpreted_block(n)), _interpreted_block(k), 4, 1)


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
) -> GemmTile:
    """The candidate with the least modelled time for x [m, k] times weights [n, k] (twice [n, k] when gated).

    long_epilogue: a residual is added or row statistics are emitted. That, like the second accumulator of a gated
    activation, takes registers, so the tiles whose compiled code would spill then are left out.
    """
    if device == INTERPRETED:
        return _interpreted_gemm(m, n, k)
    operands = 2 if gated else 1
    long_epilogue |= device.capability in _TENSOR_MEMORY
    largest = 64 * 128 if gated else 128 * 128 if long_epilogue else 128 * 256
    candidates = [
        tile
        for tile in (_HALF_TILES if itemsize == 2 else _FLOAT_TILES)
        if gemm_shared_bytes(tile, itemsize, operands) <= device.shared_memory - 2048
        and tile.block_m * tile.block_n <= largest
    ]
    return min(candidates, key=lambda t: gemm_cycles(t, m, n, k, itemsize, device, operands=operands, tf32=tf32))


# (tile, widest head that compiles without spills, the same with a mask to add)
_HALF_ATTENTION = (
    (AttentionTile(128, 64, 8, 3), 128, 64),
    (AttentionTile(128, 32, 4, 3), 64, 0),
    (AttentionTile(64, 64, 4, 3), 96, 64),
    (AttentionTile(64, 64, 8, 3), 128, 0),
    (AttentionTile(64, 32, 4, 3), 96, 0),
    (AttentionTile(64, 32, 8, 2), 128, 128),
    (AttentionTile(16, 64, 4, 3), 128, 128),
    (AttentionTile(16, 32, 4, 2), 128, 128),
)
# Two warpgroup products of 64 rows in four warps: only there is one compiled without spills.
_HOPPER_ATTENTION = ((AttentionTile(128, 64, 4, 3), 80, 0), *_HALF_ATTENTION)
_FLOAT_ATTENTION = (
    (AttentionTile(32, 32, 8, 2), 96, 64),
    (AttentionTile(16, 32, 8, 2), 128, 128),
)


def attention_shared_bytes(tile: AttentionTile, width: int, itemsize: int) -> int:
    """Shared memory of the pipeline: q and num_stages slices of keys and values."""
    padded = sum(split_width(width))
    return (tile.block_m + 2 * tile.num_stages * tile.block_n) * padded * itemsize


def attention_cycles(
    tile: AttentionTile, heads: int, queries: int, keys: int, width: int, itemsize: int, device: Device
) -> float:
    """Modelled SM cycles: padded scores times the slowest of matrix unit, exponentials and issue slots per score."""
    rate = nearest(_TENSOR_RATE if itemsize == 2 else _FP32_RATE, device.capability)
    if tile.block_m < 64 and device.capability >= 90:
        rate /= 2
    padded = sum(split_width(width))
    scores = tile.block_m * tile.block_n
    per_block = max(scores * 4 * padded / rate, scores / 16, scores * 7 / 128) + _ATTENTION_STEP
    blocks = cdiv(keys, tile.block_n)
    per_sm = cdiv(cdiv(queries, tile.block_m) * heads, device.sm_count)
    # Rows of one program amortise the loads of its keys.
    loads = blocks * tile.block_n * padded * itemsize * 2 / _L2_BYTES_PER_CLOCK
    return per_sm * max(blocks * per_block, loads) + 800 * cdiv(per_sm, 2)


@functools.lru_cache(maxsize=4096)
def choose_attention(
    heads: int, queries: int, keys: int, width: int, itemsize: int, device: Device, *, masked: bool = False
) -> AttentionTile:
    """The candidate with the least modelled time for `heads` independent heads (batch included)."""
    if device == INTERPRETED:
        return AttentionTile(_interpreted_block(queries), _interpreted_block(keys), 4, 1)
    padded = sum(split_width(width))
    hopper = 90 <= device.capability < 100
    table = _FLOAT_ATTENTION if itemsize == 4 else _HOPPER_ATTENTION if hopper else _HALF_ATTENTION
    candidates = [
        tile
        for tile, widest, widest_masked in table
        if padded <= (widest_masked if masked else widest)
        and attention_shared_bytes(tile, width, itemsize) <= device.shared_memory - 1024
    ]
    if itemsize == 4:
        return candidates[0]  # the next one spills on some GPUs where this one fits
    return min(candidates, key=lambda t: attention_cycles(t, heads, queries, keys, width, itemsize, device))


MLP_MAX_WIDTH = 384

_HALF_MLP = (MlpTile(64, 32, 8, 2), MlpTile(32, 32, 4, 2), MlpTile(16, 32, 4, 1))
_FLOAT_MLP = (MlpTile(16, 16, 4, 1),)


def mlp_shared_bytes(tile: MlpTile, width: int, itemsize: int, operands: int) -> int:
    """Shared memory: the rows of x, num_stages slices of the weights, and the hidden features on their way to W2."""
    padded = sum(split_width(width, 64))
    weights = tile.num_stages * (operands + 1) * tile.block_h * padded
    return (tile.block_m * padded + weights + tile.block_m * tile.block_h) * itemsize


@functools.lru_cache(maxsize=4096)
def choose_mlp(
    m: int, width: int, hidden: int, itemsize: int, device: Device, *, gated: bool = False, always: bool = False
) -> MlpTile | None:
    """The one-kernel MLP's tile, or None where two GEMMs serve better.

    Every program reads all weights, so the tallest tile that fits is the best one; with fewer row tiles than SMs the
    GEMMs, which also split the columns, keep more of the GPU busy (`always` skips that rule). In fp32 the registers
    hold so few rows that two GEMMs always serve better.
    """
    if width > MLP_MAX_WIDTH or (itemsize == 4 and not always):
        return None
    if device == INTERPRETED:
        return MlpTile(_interpreted_block(m), _interpreted_block(hidden), 4, 1)
    for tile in _HALF_MLP if itemsize == 2 else _FLOAT_MLP:
        fits = mlp_shared_bytes(tile, width, itemsize, 2 if gated else 1) <= device.shared_memory - 1024
        if fits and (always or cdiv(m, tile.block_m) >= device.sm_count):
            return tile
    return None


_PATCH_TILES_HALF = (GemmTile(64, 128, 32, 8, 3), GemmTile(64, 64, 32, 4, 3), GemmTile(16, 64, 32, 4, 3))
_PATCH_TILES_FLOAT = (GemmTile(32, 64, 16, 4, 2), GemmTile(16, 64, 32, 4, 2))


@functools.lru_cache(maxsize=4096)
def choose_patch_embed(m: int, n: int, k: int, itemsize: int, device: Device, *, tf32: bool = False) -> GemmTile:
    """As `choose_gemm`, among tiles that leave registers for the gathered addresses of the pixels."""
    if device == INTERPRETED:
        return _interpreted_gemm(m, n, k)
    candidates = _PATCH_TILES_HALF if itemsize == 2 else _PATCH_TILES_FLOAT
    if device.capability in _TENSOR_MEMORY:
        candidates = candidates[1:]
    return min(candidates, key=lambda t: gemm_cycles(t, m, n, k, itemsize, device, tf32=tf32))
