"""The tile choice of attention: its model of time, and what it must not choose."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit_kernels import attention_tiles
from vit_kernels.attention_costs import COSTS
from vit_kernels.attention_tiles import AttentionTile, attention_cycles, attention_shared_bytes, choose_attention
from vit_kernels.device import A100, B200, H100, KNOWN_DEVICES, RTX_4090, Device

DEVICES = pytest.mark.parametrize("device", KNOWN_DEVICES, ids=lambda d: d.name)


@pytest.mark.parametrize(
    ("keys", "block_n", "width"),
    [(197, 64, 16), (577, 64, 16), (256, 64, 0), (84, 64, 32), (97, 64, 64), (5, 128, 16), (0, 64, 0), (113, 128, 128)],
)
def test_the_rest_fits_a_block_of_its_own(keys: int, block_n: int, width: int) -> None:
    assert attention_tiles.rest_block(keys, block_n) == width


@DEVICES
@given(
    heads=st.integers(1, 10**5), tokens=st.integers(1, 20000), width=st.integers(1, 128), masked=st.booleans(),
)  # fmt: skip
def test_a_tile_fits_with_its_rest_and_its_mask(
    device: Device, heads: int, tokens: int, width: int, masked: bool
) -> None:
    tile = choose_attention(heads, tokens, tokens, width, 2, device, masked=masked)
    assert attention_shared_bytes(tile, width, 2, tokens, masked=masked) <= device.shared_memory


def test_cycles_of_programs_that_wait_for_each_other_and_of_one_alone() -> None:
    """4 tiles of 64 queries and 3 blocks of 64 keys, with 5 keys left over: those are in the cost of a start."""
    tile = AttentionTile(64, 64, 4, 2)
    cost = COSTS[90][tile][64]
    alone = cost.start_alone + 3 * cost.step_alone
    assert attention_cycles(tile, 33, 197, 197, 64, H100) == alone
    assert attention_cycles(tile, 330, 197, 197, 64, H100) == 10 * (cost.start + 3 * cost.step) > alone
    assert attention_cycles(tile, 331, 197, 197, 64, H100) == 11 * (cost.start + 3 * cost.step)
    assert attention_cycles(tile, 33, 197, 192, 64, H100) == alone
    assert attention_cycles(tile, 33, 197, 192 + 40, 64, H100) == alone + 0.75 * cost.step_alone
    assert attention_cycles(AttentionTile(32, 16, 4, 2), 33, 197, 197, 64, H100) == math.inf


@pytest.mark.parametrize(
    ("device", "heads", "tokens", "width", "tile"),
    [
        (H100, 768, 197, 64, (128, 64, 8, 3)),
        (H100, 768, 577, 64, (64, 64, 4, 3)),
        (H100, 128, 4096, 64, (64, 64, 4, 3)),
        (H100, 768, 197, 128, (128, 32, 8, 3)),
        (A100, 768, 197, 64, (128, 32, 4, 3)),
        (A100, 768, 197, 128, (128, 32, 8, 3)),
        (RTX_4090, 128, 4096, 128, (128, 64, 8, 2)),
    ],
    ids=str,
)
def test_what_the_model_was_made_for(device: Device, heads: int, tokens: int, width: int, tile: tuple) -> None:
    """Where the launches themselves were compared, simulated or on an H100, the choice is the fastest of them,
    but at 577 tokens on sm_90, where one of 128 queries takes 2 % less."""
    assert choose_attention(heads, tokens, tokens, width, 2, device) == AttentionTile(*tile)


@DEVICES
def test_few_heads_are_spread_over_small_tiles(device: Device) -> None:
    """One image of 12 heads keeps no SM waiting for want of a program."""
    one, many = (choose_attention(heads, 197, 197, 64, 2, device) for heads in (12, 12 * 256))
    assert one.block_m <= many.block_m


@pytest.mark.parametrize(
    ("width", "masked", "rows"),
    [(64, False, 32), (72, False, 16), (96, False, 32), (128, False, 32), (64, True, 32), (96, True, 16)],
)
def test_fp32_tiles_are_those_that_do_not_spill(width: int, masked: bool, rows: int) -> None:
    for device in KNOWN_DEVICES:
        tile = choose_attention(768, 257, 257, width, 4, device, masked=masked)
        assert tile.block_m == (32 if width == 72 and device.capability in (80, 90) else rows)


@pytest.mark.parametrize("tokens", [197, 577, 729, 4096])
def test_products_from_tensor_memory_have_values_of_an_earlier_block(tokens: int) -> None:
    """In two stages Triton 3.8 fences the copy of heads of two pieces before it has landed; an H100 gets such tiles."""
    tiles = {
        device.name: {choose_attention(heads, tokens, tokens, 72, 2, device) for heads in (1, 16, 128, 1024, 4096)}
        for device in (H100, B200)
    }
    assert all(tile.num_stages > 2 for tile in tiles["B200"] if tile.block_m >= 64)
    if tokens == 577:
        assert any(tile.num_stages == 2 for tile in tiles["H100 SXM"] if tile.block_m >= 64)
