"""The tile choice: pure, total, within the limits of every GPU, and sensible in its ordering."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit_kernels import attention_tiles, gemm_tiles, mlp_tiles, qk_rope_tiles, tiles
from vit_kernels.device import A100, H100, INTERPRETED, KNOWN_DEVICES, RTX_4090, Device

DEVICES = pytest.mark.parametrize("device", KNOWN_DEVICES, ids=lambda d: d.name)
ROLES = gemm_tiles.GemmTile(128, 256, 64, 4, 3, tma=1, roles=True)


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


def test_the_ring_of_the_wide_tile_is_shorter_than_a_tile() -> None:
    narrow = dataclasses.replace(ROLES, block_n=128, num_stages=5)
    assert [gemm_tiles.ring_slots(ROLES, k) for k in (64, 128, 136, 192, 256, 768)] == [0, 1, 2, 2, 3, 3]
    assert [gemm_tiles.ring_slots(narrow, k) for k in (64, 768)] == [5, 5]
    wide, tiny = (gemm_tiles.choose_gemm(132 * 128, 4096, k, 2, H100, described=True) for k in (768, 128))
    assert wide == ROLES and tiny != ROLES


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


def test_batch_1_on_hopper_takes_long_steps_of_few_rows() -> None:
    """The projection of ViT-B: 768 columns in 6 steps and not in 12, each of which waits for its data."""
    tile = gemm_tiles.choose_gemm(197, 768, 768, 2, H100, described=True, residual=True)
    assert (tile.block_m, tile.block_n, tile.block_k) == (64, 64, 128) and tile.tma


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
