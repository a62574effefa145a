"""The tile choice: pure, total, within the limits of every GPU, and sensible in its ordering."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit_kernels import attention_tiles, gemm_tiles, mlp_tiles, qk_rope_tiles, tiles
from vit_kernels.device import A100, H100, INTERPRETED, KNOWN_DEVICES, RTX_4090, Device

DEVICES = pytest.mark.parametrize("device", KNOWN_DEVICES, ids=lambda d: d.name)


@given(st.integers(1, 2000), st.sampled_from([16, 64]))
def test_split_width_covers_with_powers_of_two(width: int, least: int) -> None:
    main, tail = tiles.split_width(width, least)
    for part in (main, tail):
        assert part == 0 or (part >= 16 and part & (part - 1) == 0)
    assert main + tail >= width and main > 0
    assert main + tail <= max(tiles.next_power_of_2(width), 16)
    assert tail == 0 or main >= least


@pytest.mark.parametrize(
    ("width", "parts"),
    [(16, (16, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (128, (128, 0))],
)
def test_split_width_of_head_widths(width: int, parts: tuple[int, int]) -> None:
    assert tiles.split_width(width) == parts


@DEVICES
@given(
    m=st.integers(1, 10**6), n=st.integers(1, 8192), k=st.integers(1, 8192), itemsize=st.sampled_from([2, 4]),
    gated=st.booleans(), described=st.booleans(),
)  # fmt: skip
def test_gemm_tiles_fit(device: Device, m: int, n: int, k: int, itemsize: int, gated: bool, described: bool) -> None:
    tile = gemm_tiles.choose_gemm(m, n, k, itemsize, device, gated=gated, described=described)
    assert gemm_tiles.gemm_shared_bytes(tile, itemsize, 2 if gated else 1) <= device.shared_memory
    assert tile.block_n % 64 == 0, "row statistics come in groups of 64 columns"


@DEVICES
@given(
    heads=st.integers(1, 10**5), queries=st.integers(1, 20000), keys=st.integers(1, 20000), width=st.integers(1, 128),
    itemsize=st.sampled_from([2, 4]), masked=st.booleans(),
)  # fmt: skip
def test_attention_tiles_fit(
    device: Device, heads: int, queries: int, keys: int, width: int, itemsize: int, masked: bool
) -> None:
    tile = attention_tiles.choose_attention(heads, queries, keys, width, itemsize, device, masked=masked)
    assert attention_tiles.attention_shared_bytes(tile, width, itemsize) <= device.shared_memory


@DEVICES
@pytest.mark.parametrize("width", [1, 16, 64, 192, 384])
def test_one_kernel_mlp_fits_or_is_left_out(device: Device, width: int) -> None:
    tile = mlp_tiles.choose_mlp(10**5, width, 4 * width, 2, device, always=True)
    assert tile is not None
    assert mlp_tiles.mlp_shared_bytes(tile, width, 2, 1) <= device.shared_memory
    assert mlp_tiles.choose_mlp(10**5, width, 4 * width, 2, device) == (tile if width <= 192 else None)
    assert mlp_tiles.choose_mlp(10**5, 385, 1536, 2, device, always=True) is None
    assert mlp_tiles.choose_mlp(10**5, width, 4 * width, 4, device) is None, "fp32 runs two GEMMs"
    assert mlp_tiles.choose_mlp(10**5, width, 4 * width, 4, device, always=True) is not None


def test_the_one_kernel_mlp_takes_tall_tiles_where_shared_memory_is_large() -> None:
    tiles_of = {device.name: mlp_tiles.choose_mlp(12608, 192, 768, 2, device) for device in KNOWN_DEVICES}
    assert tiles_of[H100.name] == mlp_tiles.MlpTile(128, 64, 8, 3) and tiles_of[A100.name].block_m == 128  # type: ignore[union-attr]
    assert tiles_of[RTX_4090.name] == mlp_tiles.MlpTile(64, 32, 8, 2)
    gated = [mlp_tiles.choose_mlp(12608, 192, 768, 2, device, gated=True) for device in (H100, A100)]
    assert gated == [mlp_tiles.MlpTile(128, 32, 8, 3), mlp_tiles.MlpTile(64, 32, 8, 2)], "a gate has weights of its own"


def test_the_one_kernel_mlp_is_modelled_where_it_was_simulated() -> None:
    tile = mlp_tiles.MlpTile(128, 64, 8, 3)
    cycles = [mlp_tiles.mlp_cycles(tile, 128 * 132 * n, 64, 256, H100) for n in (1, 2, 3, 4)]
    two = 3500 + 4 * 2 * 1550
    assert cycles == [3500 + 4 * 1660, two, two + 3500 + 4 * 1660, 2 * two]
    assert mlp_tiles.mlp_cycles(tile, 128 * 132 + 1, 192, 768, H100) == 2 * (3500 + 12 * 3180), "one an SM at a time"
    shorter, successor = mlp_tiles.MlpTile(64, 32, 8, 2), dataclasses.replace(H100, capability=100)
    for other in ((shorter, 192, H100), (tile, 384, H100), (tile, 192, successor), (tile, 192, A100)):
        assert mlp_tiles.mlp_cycles(other[0], 8448, other[1], 768, other[2]) is None


@DEVICES
def test_few_rows_run_two_gemms(device: Device) -> None:
    assert mlp_tiles.choose_mlp(197, 192, 768, 2, device) is None
    assert mlp_tiles.choose_mlp(197, 192, 768, 2, device, always=True) is not None


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


def test_the_ring_of_the_wide_tile_is_shorter_than_a_tile() -> None:
    narrow = dataclasses.replace(ROLES, block_n=128, num_stages=5)
    assert [gemm_tiles.ring_slots(ROLES, k) for k in (64, 128, 136, 192, 256, 768)] == [0, 1, 2, 2, 3, 3]
    assert [gemm_tiles.ring_slots(narrow, k) for k in (64, 768)] == [5, 5]
    wide, tiny = (gemm_tiles.choose_gemm(132 * 128, 4096, k, 2, H100, described=True) for k in (768, 128))
    assert wide == ROLES and tiny != ROLES


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


@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    # The projection of ViT-B at batch 32, of which 256 columns would leave a third of the SMs without a second tile;
    # what takes longer to finish than to multiply, of which the last tile should be small.
    [(6304, 768, {(768, 768): 128, (3072, 768): 256}),
     (12608, 384, {(384, 1536): 128}),
     (12608, 768, {(2304, 768): 256, (3072, 768): 256})],
)  # fmt: skip
def test_fewer_columns_where_more_sms_get_a_tile(rows: int, width: int, columns: dict[tuple[int, int], int]) -> None:
    for (n, k), block_n in columns.items():
        activation = "gelu" if n == 4 * width else "none"
        tile = gemm_tiles.choose_gemm(
            rows, n, k, 2, H100, described=True, activation=activation, residual=n == width
        )  # fmt: skip
        assert tile.roles and tile.block_n == block_n, (n, k)


def test_weights_of_a_short_k_stay() -> None:
    """Where programs have several tiles, on sm_90: qkv, projection and fc1 of ViT-S and Ti at batch 64."""
    for width in (192, 384):
        for n in (width, 3 * width, 4 * width):
            given = {"described": True, "residual": n == width}
            assert gemm_tiles.choose_gemm(12608, n, width, 2, H100, **given).staying, n
            assert not gemm_tiles.choose_gemm(12608, n, 2 * 384, 2, H100, **given).staying
            assert not gemm_tiles.choose_gemm(197, n, width, 2, H100, **given).staying
            assert not gemm_tiles.choose_gemm(12608, n, width, 4, H100, **given).staying
            assert not gemm_tiles.choose_gemm(12608, n, width, 2, H100, residual=n == width).staying
            for device in KNOWN_DEVICES:
                staying = gemm_tiles.choose_gemm(12608, n, width, 2, device, **given).staying
                assert staying == (device.capability == 90)


def test_large_products_get_warps_with_roles_on_hopper() -> None:
    """All four of ViT-B's at batch 64; none at batch 1, none in fp32, gated, by pointers, or with 8 columns over."""
    for n, k in ((2304, 768), (768, 768), (3072, 768), (768, 3072)):
        assert gemm_tiles.choose_gemm(12608, n, k, 2, H100, described=True, residual=n == 768).roles
        assert not gemm_tiles.choose_gemm(197, n, k, 2, H100, described=True).roles
        for other in ({"described": False}, {"described": True, "gated": True}):
            assert not gemm_tiles.choose_gemm(12608, n, k, 2, H100, **other).roles
        assert not gemm_tiles.choose_gemm(12608, n, k, 4, H100, described=True).roles
        assert not gemm_tiles.choose_gemm(12608, n + 16, k, 2, H100, described=True).roles
        for device in KNOWN_DEVICES:
            tile = gemm_tiles.choose_gemm(12608, n, k, 2, device, described=True, residual=n == 768)
            assert tile.roles == (device.capability == 90)


def test_the_ring_and_the_sums_fit_shared_memory() -> None:
    """One slot more of x than of weights, and the sums of a tile."""
    for (n, k), columns, slots in (((3072, 768), 256, 3), ((384, 1536), 128, 5)):
        tile = gemm_tiles.choose_gemm(12608, n, k, 2, H100, described=True, residual=n == 384)
        assert tile == dataclasses.replace(ROLES, block_n=columns, num_stages=slots)
        ring, sums = ((slots + 1) * 128 + slots * columns) * 64 * 2, 128 * columns * 2
        assert ring + sums < gemm_tiles.gemm_shared_bytes(tile, 2) < ring + sums + 4096
        assert gemm_tiles.gemm_shared_bytes(tile, 2) <= H100.shared_memory


def test_small_tiles_load_early() -> None:
    """64 sums a thread leave registers for what the epilogue needs; those of a gate count too."""
    for rows, columns, gated, early in ((64, 128, False, True), (128, 128, False, False), (64, 128, True, False)):
        tile = gemm_tiles.GemmTile(rows, columns, 64, 4, 3, tma=1)
        assert gemm_tiles.loads_early(tile, gated=gated) == early
        assert gemm_tiles.loads_early(dataclasses.replace(tile, num_warps=8), gated=gated)


@pytest.mark.parametrize(
    ("device", "batch", "tile"),
    [(A100, 1, (32, 64, 64)), (A100, 8, (64, 64, 32)), (A100, 64, (64, 128, 64)), (H100, 8, (64, 128, 64))],
)
def test_a_wide_tile_of_the_stem_is_for_two_programs_an_sm(
    device: Device, batch: int, tile: tuple[int, int, int]
) -> None:
    """ViT-B: at batch 8 wide tiles give some SMs of an A100 two and the others one; on an H100 they were faster."""
    chosen = gemm_tiles.choose_patch_embed(197 * batch, 768, 768, 2, device)
    assert (chosen.block_m, chosen.block_n, chosen.block_k) == tile


def test_a_step_takes_its_share_of_the_time_that_a_slot_takes_to_fill() -> None:
    """On sm_90, where that has been measured: 32 KB from L2 in 6 slots, in 3, and 80 KB in 4."""
    short = gemm_tiles.GemmTile(64, 64, 128, 4, 6, tma=1)
    wide = gemm_tiles.GemmTile(64, 256, 128, 4, 4, tma=1)
    for tile, kilobytes in ((short, 32), (dataclasses.replace(short, num_stages=3), 32), (wide, 80)):
        few, more = (gemm_tiles.gemm_cycles(tile, tile.block_m, tile.block_n, k, 2, H100) for k in (768, 2 * 768))
        busiest = gemm_tiles.step_cycles(tile, 2, H100, busy_sms=1) + 50
        turn = (1700 + kilobytes * 1024 / 48) / tile.num_stages
        assert more - few == pytest.approx(6 * max(turn, busiest)) and (turn > busiest) == (tile.num_stages == 3)


def test_small_problems_get_small_tiles() -> None:
    small = gemm_tiles.choose_gemm(197, 768, 768, 2, H100)
    large = gemm_tiles.choose_gemm(197 * 256, 3072, 768, 2, H100)
    assert small.block_m * small.block_n < large.block_m * large.block_n
    assert (large.block_m, large.block_n) == (128, 128)


def test_tensor_descriptors_are_for_hopper_and_16_bits_alone() -> None:
    for device in KNOWN_DEVICES:
        for itemsize in (2, 4):
            for described in (True, False):
                tile = gemm_tiles.choose_gemm(197 * 64, 3072, 768, itemsize, device, described=described)
                assert bool(tile.tma) == (device.capability == 90 and itemsize == 2 and described)


@DEVICES
@pytest.mark.parametrize("gated", [False, True])
def test_results_that_are_stored_one_by_one_get_small_tiles(device: Device, gated: bool) -> None:
    for n, most in ((4000, 128 * 128), (4001, 64 * 64), (4008, 64 * 64)):
        tile = gemm_tiles.choose_gemm(197 * 256, n, 768, 2, device, gated=gated, described=True)
        assert tile.block_m * tile.block_n <= most
    fp32 = [gemm_tiles.choose_gemm(197 * 256, n, 768, 4, device) for n in (4000, 4001)]
    assert fp32[0] == fp32[1]


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


def test_batch_1_on_hopper_takes_long_steps_of_few_rows() -> None:
    """The projection of ViT-B: 768 columns in 6 steps and not in 12, each of which waits for its data."""
    tile = gemm_tiles.choose_gemm(197, 768, 768, 2, H100, described=True, residual=True)
    assert (tile.block_m, tile.block_n, tile.block_k) == (64, 64, 128) and tile.tma


def test_shared_memory_is_counted_per_warp_that_reads_it() -> None:
    """In fp32 on sm_80: x [64, 32] once per column of warps, weights [64, 32] once per row of them."""
    tile = gemm_tiles.GemmTile(64, 64, 32, 8, 3)
    cycles = gemm_tiles.step_cycles(tile, 4, dataclasses.replace(A100, capability=90))
    assert cycles == 2 * 64 * 64 * 32 / 256, "the multiply-adds"
    tf32 = gemm_tiles.step_cycles(tile, 4, A100, tf32=True)
    assert tf32 == max(2 * 64 * 64 * 32 / 1024, (128 + 64 * 2 + 64 * 4) * 32 * 4 / 128, 128 * 32 * 4 / 40)


def test_an_unknown_newer_gpu_takes_the_nearest_lower_entry() -> None:
    newer = dataclasses.replace(RTX_4090, name="sm_89 successor", capability=99)
    table = {80: "a", 90: "b", 100: "c"}
    assert tiles.nearest(table, 99) == "b"  # type: ignore[arg-type]
    assert tiles.nearest(table, 130) == "c"  # type: ignore[arg-type]
    assert gemm_tiles.choose_gemm(1000, 768, 768, 2, newer).num_warps in (4, 8)


def test_the_interpreter_gets_large_tiles() -> None:
    assert gemm_tiles.choose_gemm(197, 768, 768, 4, INTERPRETED).block_m == 128
    assert gemm_tiles.choose_gemm(197, 768, 768, 4, A100).block_m < 128


@pytest.mark.parametrize(("m", "n"), [(1, 1), (50, 192), (12608, 768), (3, 5000), (10**6, 16)])
@DEVICES
def test_row_tiles(device: Device, m: int, n: int) -> None:
    tile = tiles.choose_rows(m, n, 2, device)
    assert tile.block_n == min(tiles.next_power_of_2(n), 4096)
    assert tile.block_m * tile.block_n <= 4096
    assert tile.block_m == 1 or tiles.cdiv(m, tile.block_m) >= device.sm_count


@DEVICES
@given(
    batch=st.integers(1, 1000), tokens=st.integers(1, 20000), heads=st.integers(1, 64), width=st.integers(1, 128),
    itemsize=st.sampled_from([2, 4]),
)  # fmt: skip
def test_qk_rope_tiles_fit(device: Device, batch: int, tokens: int, heads: int, width: int, itemsize: int) -> None:
    """A thread of 128 holds at most 16 bytes of either tile of a head."""
    tile = qk_rope_tiles.choose_qk_rope(batch, tokens, heads, width, itemsize, device)
    half = qk_rope_tiles.half_width(width)
    assert width <= 2 * half < 2 * width + 2 and half & (half - 1) == 0
    assert tile.block_t * half * itemsize <= 16 * 32 * tile.num_warps
    assert tile.block_t >= 8 and tile.block_t & (tile.block_t - 1) == 0
    assert 1 <= tile.heads <= heads


def test_heads_of_qk_rope_share_tables_where_sms_have_enough_to_do() -> None:
    def tile(batch: int) -> tuple[int, int]:
        chosen = qk_rope_tiles.choose_qk_rope(batch, 197, 12, 64, 2, H100)
        return chosen.block_t, chosen.heads

    assert [tile(batch) for batch in (1, 8, 64, 256)] == [(8, 1), (32, 1), (32, 4), (32, 8)]
    assert qk_rope_tiles.choose_qk_rope(8, 197, 12, 64, 2, INTERPRETED).heads == 12
