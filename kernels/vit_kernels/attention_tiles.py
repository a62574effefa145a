"""Tile choice of `attention`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .device import INTERPRETED, Device
from .tiles import FP32_RATE, L2_BYTES_PER_CLOCK, TENSOR_RATE, cdiv, interpreted_block, nearest, split_width


@dataclass(frozen=True)
class AttentionTile:
    """One program computes block_m queries of one head against block_n keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Cycles that a block of keys with its softmax costs whatever its size: barriers and latency.
_ATTENTION_STEP = 250

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
    rate = nearest(TENSOR_RATE if itemsize == 2 else FP32_RATE, device.capability)
    if tile.block_m < 64 and device.capability >= 90:
        rate /= 2
    padded = sum(split_width(width))
    scores = tile.block_m * tile.block_n
    per_block = max(scores * 4 * padded / rate, scores / 16, scores * 7 / 128) + _ATTENTION_STEP
    blocks = cdiv(keys, tile.block_n)
    per_sm = cdiv(cdiv(queries, tile.block_m) * heads, device.sm_count)
    # Rows of one program amortise the loads of its keys.
    loads = blocks * tile.block_n * padded * itemsize * 2 / L2_BYTES_PER_CLOCK
    return per_sm * max(blocks * per_block, loads) + 800 * cdiv(per_sm, 2)


@functools.lru_cache(maxsize=4096)
def choose_attention(
    heads: int, queries: int, keys: int, width: int, itemsize: int, device: Device, *, masked: bool = False
) -> AttentionTile:
    """The candidate with the least modelled time for `heads` independent heads (batch included)."""
    if device == INTERPRETED:
        return AttentionTile(interpreted_block(queries), interpreted_block(keys), 4, 1)
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
