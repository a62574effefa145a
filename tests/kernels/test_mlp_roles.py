"""`mlp` with the kernel whose warps have roles. In Gluon: sanitized, or executed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vit_kernels import mlp, mlp_roles_launch, mlp_tiles, reference, row_stats
from vit_kernels.device import A100, H100
from vit_kernels.mlp_tiles import TO_MEASURE, MlpTile, choose_mlp, may_have_roles, mlp_cycles, roles_shared_bytes

from ..rung import RUNG
from ..weights import Draw
from .common import judge, judge_stats, sanitize_bfloat16, sanitize_half
from .test_mlp import draw_mlp, run_mlp

TILES = {
    "192, two warpgroups": (192, MlpTile(128, 64, 4, 3, roles=True, kept=3)),
    "192, one": (192, MlpTile(64, 64, 4, 3, roles=True, kept=3)),
    "192, nothing kept": (192, MlpTile(128, 64, 4, 2, roles=True, kept=0)),
    "128": (128, MlpTile(128, 64, 4, 4, roles=True, kept=2)),
    "64": (64, MlpTile(128, 64, 4, 4, roles=True, kept=1)),
}
compiled_code = pytest.mark.skipif(
    RUNG == "interpreted" or (RUNG == "executed" and torch.cuda.get_device_capability() != (9, 0)),
    reason="a kernel in Gluon for sm_90: no interpreter runs it, and no other GPU",
)


@pytest.fixture(autouse=RUNG == "sanitized")
def room(monkeypatch):
    """The GPU that the sanitizer pretends to be has less shared memory than one of sm_90."""
    device_of = mlp_roles_launch.device_of
    monkeypatch.setattr(
        mlp_roles_launch, "device_of", lambda x: dataclasses.replace(device_of(x), shared_memory=H100.shared_memory)
    )


@pytest.mark.parametrize("name", TILES)
@compiled_code
@sanitize_half
def test_everything_at_once(name, dtype, monkeypatch):
    """Rows and steps do not fill the last tile, and slots are used again."""
    width, tile = TILES[name]
    monkeypatch.setattr(mlp_tiles, "choose_mlp", lambda *a, **k: tile)
    arguments = draw_mlp(Draw(dtype, seed=81), tile.block_m + 5, width, 64 * tile.num_stages + 72)
    y, stats = run_mlp(arguments, emit_stats=True)
    judge(y, reference.mlp, arguments)
    judge_stats(stats, y)


@pytest.mark.parametrize(
    ("norm", "activation", "sums"),
    [
        ("none", "none", True),
        ("none", "quick_gelu", True),
        ("rms", "silu", True),
        ("layer", "gelu_tanh", True),
        ("layer", "gelu", False),
    ],
)
@compiled_code
@sanitize_bfloat16
def test_nothing_added(norm, activation, sums, dtype, monkeypatch):
    if dtype == torch.float32:
        pytest.skip("operands of 16 bits")
    monkeypatch.setattr(mlp_tiles, "choose_mlp", lambda *a, **k: TILES["192, two warpgroups"][1])
    options = {"biases": False, "layer_scale": False, "residual": False}
    arguments = draw_mlp(Draw(dtype, seed=82), 70, 192, 136, norm=norm, activation=activation, **options)
    judge(run_mlp(arguments, sums=sums), reference.mlp, arguments)


@compiled_code
@sanitize_half
def test_weights_that_are_not_centred_and_one_step(dtype, monkeypatch):
    """`fold_norm` leaves next to nothing of weight sums: here a row's mean counts. The residual is not x."""
    monkeypatch.setattr(mlp_tiles, "choose_mlp", lambda *a, **k: TILES["192, two warpgroups"][1])
    draw = Draw(dtype, seed=83)
    arguments = draw_mlp(draw, 66, 192, 40, layer_scale=False) | {"residual": draw.rows(66, 192)}
    ones = torch.ones_like(arguments["norm_weight"])
    arguments |= {"x": arguments["x"] + 1, "norm_weight": ones, "norm_bias": torch.zeros_like(ones)}
    x, weight = arguments["x"], arguments["fc1_weight"]
    y = mlp(
        x, weight, arguments["fc1_bias"], arguments["fc2_weight"], arguments["fc2_bias"], stats=row_stats(x),
        column_sum=weight.float().sum(1), residual=arguments["residual"],
    )  # fmt: skip
    assert isinstance(y, torch.Tensor)
    judge(y, reference.mlp, arguments)


def test_chosen_for_narrow_models():
    tile = choose_mlp(12608, 192, 768, 2, H100, described=True)
    assert tile is not None and tile.roles and (tile.block_m, tile.kept) == (128, 3)
    few = choose_mlp(64 * 132, 192, 768, 2, H100, described=True)
    assert few == dataclasses.replace(tile, block_m=64), "a warpgroup has 64 rows, and every SM one"
    assert {tile, few} <= set(TO_MEASURE)


@pytest.mark.parametrize("width", [64, 128, 192])
def test_tiles_to_measure_fit_an_sm(width):
    fitting = [t for t in TO_MEASURE if may_have_roles(t, width, 4 * width, 2, H100, described=True)]
    assert {(t.block_m, t.kept) for t in fitting} >= {(64, 0), (128, width // 64)}
    assert all(roles_shared_bytes(t, width, 4 * width) <= H100.shared_memory for t in fitting)


def test_not_chosen_elsewhere():
    others = (
        choose_mlp(12608, 192, 768, 2, H100),
        choose_mlp(12608, 192, 768, 2, A100, described=True),
        choose_mlp(12608, 192, 768, 2, H100, described=True, gated=True),
        choose_mlp(12608, 96, 384, 2, H100, described=True),
        choose_mlp(12608, 128, 512, 2, H100, described=True),
        choose_mlp(12608, 192, 768 * 8, 2, H100, described=True),
        choose_mlp(12608, 192, 768, 4, H100, described=True, always=True),
    )
    assert not any(tile is None or tile.roles for tile in others)
    assert choose_mlp(1576, 192, 768, 2, H100, described=True) is None


def test_modelled_by_rounds_of_programs():
    one, two = (MlpTile(rows, 64, 4, 3, roles=True, kept=3) for rows in (64, 128))

    def modelled(tile, rows):
        cycles = mlp_cycles(tile, rows, 192, 768, H100)
        assert cycles is not None
        return cycles

    for tile in (one, two):
        assert modelled(tile, tile.block_m * 132) == modelled(tile, 1)
        assert modelled(tile, tile.block_m * 132 + 1) == 2 * modelled(tile, 1)
    assert modelled(one, 1) < modelled(two, 1) < 2 * modelled(one, 1), "two warpgroups overlap"
    assert modelled(two, 12608) < modelled(MlpTile(128, 64, 8, 3), 12608)
    assert mlp_cycles(two, 12608, 192, 768, A100) is None


@pytest.mark.parametrize(("width", "hidden"), [(192, 768), (64, 256), (96, 384)], ids=["another GPU", "kept", "width"])
def test_a_tile_that_does_not_fit_is_refused(width, hidden, monkeypatch):
    monkeypatch.setattr(mlp_tiles, "choose_mlp", lambda *a, **k: TILES["192, two warpgroups"][1])
    if width != 192:
        monkeypatch.setattr("vit_kernels.mlp_roles_launch.device_of", lambda *a: H100)
    x, weight = torch.zeros(4, width, dtype=torch.float16), torch.zeros(hidden, width, dtype=torch.float16)
    with pytest.raises(ValueError, match="whose warps have roles does not fit this problem"):
        mlp(x, weight, None, weight.T.contiguous(), norm="none")
