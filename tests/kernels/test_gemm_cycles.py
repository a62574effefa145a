"""What a product takes by the model that its tile is chosen by, for every way in which its tiles go over the SMs."""

from __future__ import annotations

import dataclasses

import pytest

from vit_kernels import gemm_tiles
from vit_kernels.device import A100, H100, RTX_4090


def test_modelled_time_counts_waves() -> None:
    """One tile more than the SMs hold at once costs about one more tile, not a share of one."""
    tile = gemm_tiles.GemmTile(128, 128, 64, 8, 3)
    full = gemm_tiles.gemm_cycles(tile, 128 * H100.sm_count, 128, 768, 2, H100)
    one_more = gemm_tiles.gemm_cycles(tile, 128 * (H100.sm_count + 1), 128, 768, 2, H100)
    assert one_more - full > 0.9 * (full - 5000) / 2
    assert gemm_tiles.gemm_cycles(tile, 128 * H100.sm_count - 100, 128, 768, 2, H100) == full


HOPPER_WIDE = gemm_tiles.GemmTile(128, 128, 64, 4, 3, chunk=64, tma=2)


@pytest.mark.parametrize(
    ("tiles_m", "halved"),
    [(132, 0), (133, 1), (132 + 66, 66), (132 + 67, 0), (5 * 132 + 40, 40), (66, 66), (67, 0), (131, 0)],
)
def test_the_last_tiles_are_halved_where_half_the_sms_have_none(tiles_m: int, halved: int) -> None:
    m = 128 * tiles_m - 3
    assert gemm_tiles.halved_tiles(HOPPER_WIDE, m, 100, 132) == halved
    for other in (dataclasses.replace(HOPPER_WIDE, tma=0), dataclasses.replace(HOPPER_WIDE, block_m=64)):
        assert gemm_tiles.halved_tiles(other, m, 100, 132) == 0


def test_modelled_time_of_halved_tiles() -> None:
    """One tile an SM and a half take as much longer than one as a half's work; more than half take a tile's more."""
    one, half, two = (
        gemm_tiles.gemm_cycles(HOPPER_WIDE, 128 * rows, 128, 768, 2, H100) for rows in (132, 132 + 66, 132 + 67)
    )
    shorter = dataclasses.replace(HOPPER_WIDE, block_m=64)
    steps = [gemm_tiles.step_cycles(tile, 2, H100) for tile in (HOPPER_WIDE, shorter)]
    turn = (1700 + (128 + 128) * 64 * 2 / 48) / 3  # of a program alone on its SM
    assert half - one == pytest.approx(12 * (sum(steps) - turn)) and turn > steps[0] + 50
    assert one < half < two


ROLES = gemm_tiles.GemmTile(128, 256, 64, 4, 3, tma=1, roles=True)


@pytest.mark.parametrize(
    ("tiles", "split"), [(132, 0), (132 + 33, 33), (132 + 34, 0), (2 * 132 + 1, 1), (33, 0), (131, 0), (7 * 132, 0)]
)
def test_the_last_tiles_are_split_where_each_sm_gets_one_piece(tiles: int, split: int) -> None:
    """Four pieces a tile; a launch that does not fill the SMs once is not split."""
    assert gemm_tiles.split_tiles(ROLES, 128 * tiles - 100, 256, 132) == split
    assert gemm_tiles.split_tiles(ROLES, 100, 256 * tiles - 64, 132) == split


def test_modelled_time_of_warps_with_roles() -> None:
    """Every round takes as long; a round of pieces takes as much less as L2 gives their operands out faster. What is
    finished is finished under the next tile, but for the last."""

    def cycles(tiles: int) -> float:
        return gemm_tiles.gemm_cycles(ROLES, 128 * tiles, 256, 768, 2, H100)

    one, two, three = (cycles(132 * rounds) for rounds in (1, 2, 3))
    round_of_tiles = 12 * ((128 + 256) * 64 * 2 / 42 + 90) + 930
    last = 8 * 1130
    assert two - one == pytest.approx(round_of_tiles) and three - two == pytest.approx(round_of_tiles)
    assert one == pytest.approx(5000 + round_of_tiles + last)
    piece = 12 * ((128 + 64) * 64 * 2 / 42 + 90) + 930 / 4
    assert piece < last, "the tile before is not finished by then"
    assert cycles(2 * 132 + 33) - two == pytest.approx(last - last * 3 / 4)
    assert cycles(2 * 132 + 34) == three
    assert cycles(100) == 5000 + 12 * (2 * 128 * 256 * 64 / 4096 + 90) + 930 + last, "100 SMs have enough of L2"


def test_to_finish_a_tile_may_take_longer_than_the_next() -> None:
    narrow = dataclasses.replace(ROLES, block_n=128, num_stages=5)
    for tile, waits in ((ROLES, 90), (narrow, 0)):
        pieces = 2 * tile.block_n // 64
        for residual, activated in ((True, False), (False, True), (True, True)):
            one, two = (
                gemm_tiles.gemm_cycles(
                    tile, 128 * 132 * rounds, tile.block_n, 64, 2, H100, residual=residual, activated=activated
                )
                for rounds in (1, 2)
            )
            piece = 1130 + 520 * activated + 970 * residual
            assert two - one == pytest.approx(pieces * piece), "one step of K is short"
            multiplied = one - 5000 - pieces * piece
            step = (128 + tile.block_n) * 64 * 2 / 42 + waits
            assert multiplied == pytest.approx(step + 930 * tile.block_n / 256)


def test_every_launch_costs_as_much_before_its_first_step() -> None:
    """Of one round as of three, and of one program an SM as of one whose warps have roles."""
    for tile in (HOPPER_WIDE, ROLES, gemm_tiles.GemmTile(64, 64, 64, 4, 4)):
        resident = gemm_tiles.resident_programs(tile, 2, H100)
        one, two, three = (
            gemm_tiles.gemm_cycles(tile, tile.block_m * 132 * resident * rounds, tile.block_n, 768, 2, H100)
            for rounds in (1, 2, 3)
        )
        finished_last = 8 * 1130 if tile is ROLES else 0
        assert two - one == pytest.approx(three - two) and one - (two - one) == pytest.approx(5000 + finished_last)


def test_a_step_takes_its_share_of_the_time_that_a_slot_takes_to_fill() -> None:
    """On sm_90, where that has been measured: 32 KB from L2 in 6 slots, in 3, and 80 KB in 4."""
    short = gemm_tiles.GemmTile(64, 64, 128, 4, 6, tma=1)
    wide = gemm_tiles.GemmTile(64, 256, 128, 4, 4, tma=1)
    for tile, kilobytes in ((short, 32), (dataclasses.replace(short, num_stages=3), 32), (wide, 80)):
        few, more = (gemm_tiles.gemm_cycles(tile, tile.block_m, tile.block_n, k, 2, H100) for k in (768, 2 * 768))
        busiest = gemm_tiles.step_cycles(tile, 2, H100, busy_sms=1) + 50
        turn = (1700 + kilobytes * 1024 / 48) / tile.num_stages
        assert more - few == pytest.approx(6 * max(turn, busiest)) and (turn > busiest) == (tile.num_stages == 3)


def test_as_many_programs_share_an_sm_as_its_memory_and_registers_hold() -> None:
    wide = gemm_tiles.GemmTile(128, 128, 32, 4, 4, chunk=64)
    assert [gemm_tiles.resident_programs(wide, 2, device) for device in (A100, H100)] == [2, 2]
    assert gemm_tiles.resident_programs(dataclasses.replace(wide, num_stages=8), 2, A100) == 1
    assert gemm_tiles.resident_programs(dataclasses.replace(wide, num_warps=16), 2, A100) == 1
    assert gemm_tiles.resident_programs(dataclasses.replace(wide, tma=3), 2, H100) == 3


def test_a_step_takes_as_long_as_the_busiest_unit() -> None:
    """128 x 128 x 64: 512 cycles of sm_90's matrix unit, less than its data take from L2; sm_89's unit is slower."""
    tile = gemm_tiles.GemmTile(128, 128, 64, 4, 3)
    taken_in = (128 + 128) * 64 * 2
    assert gemm_tiles.step_cycles(tile, 2, H100) == taken_in / 48 > 512
    assert gemm_tiles.step_cycles(tile, 2, RTX_4090) == 2 * 128 * 128 * 64 / 512
    gated = gemm_tiles.step_cycles(tile, 2, H100, operands=2)
    assert gated == (128 + 256) * 64 * 2 / 48 == 2 * 128 * 256 * 64 / 4096


def test_few_busy_sms_get_more_of_l2_each_but_no_more_than_shared_memory_takes() -> None:
    tile = gemm_tiles.GemmTile(64, 64, 128, 4, 6, tma=2)
    taken_in = (64 + 64) * 128 * 2
    steps = [gemm_tiles.step_cycles(tile, 2, H100, busy_sms=busy) for busy in (132, 110, 48, 1)]
    assert steps == [taken_in / 48, taken_in / (48 * 132 / 110), taken_in / 64, taken_in / 64]
    cycles = [gemm_tiles.gemm_cycles(tile, 64 * rows, 64, 768, 2, H100) for rows in (132, 48)]
    assert cycles[0] - cycles[1] == pytest.approx(6 * (steps[0] - steps[2]))


def test_an_sm_with_a_tile_more_than_the_others_gets_more_of_l2() -> None:
    """144 tiles, of which 12 SMs have two: their steps are not those of a GPU on which all SMs have two."""
    tile = gemm_tiles.GemmTile(64, 64, 128, 4, 3, tma=2)
    few, all_of_them = (gemm_tiles.gemm_cycles(tile, 64 * rows, 64, 768, 2, H100) for rows in (144, 264))
    taken_in = (64 + 64) * 128 * 2
    assert all_of_them - few == pytest.approx(6 * 2 * (taken_in / 48 - taken_in / 64))


def test_products_of_32_rows_take_longer_before_sm_90() -> None:
    tile = gemm_tiles.GemmTile(32, 64, 64, 4, 4)
    assert gemm_tiles.step_cycles(tile, 2, RTX_4090) == 1.12 * 2 * 32 * 64 * 64 / 512
    assert gemm_tiles.choose_gemm(1576, 4096, 1024, 2, RTX_4090).block_m > 32


def test_shared_memory_is_counted_per_warp_that_reads_it() -> None:
    """In fp32 on sm_80: x [64, 32] once per column of warps, weights [64, 32] once per row of them."""
    tile = gemm_tiles.GemmTile(64, 64, 32, 8, 3)
    cycles = gemm_tiles.step_cycles(tile, 4, dataclasses.replace(A100, capability=90))
    assert cycles == 2 * 64 * 64 * 32 / 256, "the multiply-adds"
    tf32 = gemm_tiles.step_cycles(tile, 4, A100, tf32=True)
    assert tf32 == max(2 * 64 * 64 * 32 / 1024, (128 + 64 * 2 + 64 * 4) * 32 * 4 / 128, 128 * 32 * 4 / 40)
