"""Tile choice of the one-kernel `mlp`."""

from __future__ import annotations

from dataclasses import dataclass

from .device import INTERPRETED, Device
from .tiles import cdiv, interpreted_block, split_width, tuned_first


@dataclass(frozen=True)
class MlpTile:
    """One program keeps block_m rows in registers and walks the hidden features block_h at a time."""

    block_m: int
    block_h: int
    num_warps: int
    num_stages: int


MLP_MAX_WIDTH = 384
TWO_PRODUCTS = "two_products"  # the name of None in tuned files

_HALF_MLP = (MlpTile(64, 32, 8, 2), MlpTile(32, 32, 4, 2), MlpTile(16, 32, 4, 1))
_FLOAT_MLP = (MlpTile(16, 16, 4, 1),)


def mlp_shared_bytes(tile: MlpTile, width: int, itemsize: int, operands: int) -> int:
    """Shared memory: the rows of x, num_stages slices of the weights, and the hidden features on their way to W2."""
    padded = sum(split_width(width, 64))
    weights = tile.num_stages * (operands + 1) * tile.block_h * padded
    return (tile.block_m * padded + weights + tile.block_m * tile.block_h) * itemsize


@tuned_first(MlpTile, none=TWO_PRODUCTS)
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
        return MlpTile(interpreted_block(m), interpreted_block(hidden), 4, 1)
    for tile in _HALF_MLP if itemsize == 2 else _FLOAT_MLP:
        fits = mlp_shared_bytes(tile, width, itemsize, 2 if gated else 1) <= device.shared_memory - 1024
        if fits and (always or cdiv(m, tile.block_m) >= device.sm_count):
            return tile
    return None
