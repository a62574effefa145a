"""The launch plan of whole models, recorded through the real launch path for chosen GPUs."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from tests.bench.child import run

pytestmark = pytest.mark.compiled

BLOCK = ["linear_kernel", "attention_kernel", "linear_kernel", "linear_kernel", "linear_kernel"]
NARROW_BLOCK = [*BLOCK[:3], "mlp_kernel"]  # fc1, activation and fc2 in one kernel
# The last block, of which the head reads the class token: fc2 of few rows is shared out, its parts added up.
LAST = [*BLOCK, "linear_sum_kernel"]
# Queries of the class token apart from keys and values of all, with the row statistics that they need.
APART = ["row_stats_kernel", "linear_kernel", *LAST]
GRID_LIMITS = (2**31 - 1, 65_535, 65_535)

RECORD = """
import json, torch
from vit_bench.launch_plan import forward_plan
from vit_bench.recording import gpu
from vit_engine import ViTConfig

def scalars(launch):
    # Of a tensor descriptor the blocks: a repeated launch has an address for its tensor.
    pointers = [k for k in launch.arguments if k.endswith("_ptr")]
    if not launch.arguments.get("DESCRIBED", True):
        pointers += ["x", "w"]
    return {k: str(v).split(" in ")[-1] for k, v in launch.arguments.items() if k not in pointers}

def plan(name, batch, device="sm_90", dtype="float16", **changes):
    config = ViTConfig.preset(name, **changes)
    found = forward_plan(config, batch, getattr(torch, dtype), gpu(device))
    return {
        "kernels": [launch.kernel for launch in found.launches],
        "grids": [launch.grid for launch in found.launches],
        "split": [launch.arguments.get("split") for launch in found.launches],
        "halved": [launch.arguments.get("halved") for launch in found.launches],
        "depth": config.depth,
        "other": found.other_work,
        "codes": len({id(launch.binary) for launch in found.launches}),
        "compiled": len(found.compiled),
        "recompiled": found.recompiled,
        "repeated": [(a.kernel, a.grid, scalars(a)) for a in found.repeated]
        == [(b.kernel, b.grid, scalars(b)) for b in found.launches]
        and all(a.binary is b.binary for a, b in zip(found.launches, found.repeated)),
    }

"""


def plans(*calls: str) -> list[dict[str, Any]]:
    """The plans of these `plan(...)` calls, recorded in one child process."""
    return run(f"{RECORD}print(json.dumps([{', '.join(calls)}]))")


def check(seen: dict[str, Any], block: list[str], tail: list[str], last: list[str] | None = None) -> None:
    # Which of their kernels `patch_embed`, `linear` and `attention` take is a matter of size.
    kinds = re.compile("_(tma|roles|staying|columns|whole|parts|blocks)_kernel")
    kernels = [kinds.sub("_kernel", kernel) for kernel in seen["kernels"]]
    blocks = [*block * (seen["depth"] - 1), *(block if last is None else last)]
    assert kernels == ["patch_embed_kernel", *blocks, *tail]
    assert seen["other"] == [], "something besides the kernels does work on the device"
    for grid in seen["grids"]:
        assert all(1 <= size <= limit for size, limit in zip(grid, GRID_LIMITS, strict=True)), grid
    assert seen["compiled"] == seen["codes"], "a kernel was compiled more than once for one shape"
    assert seen["recompiled"] == [], "something was compiled after the first pass of a shape"
    assert seen["repeated"], "a repeated pass launches other kernels, grids or sizes than the pass as written"


TAIL = ["layer_norm_kernel", "linear_kernel"]


PLANS = {
    "ViT-B, batch 64": 'plan("vit_base_patch16_224", 64)',
    "ViT-B, batch 48": 'plan("vit_base_patch16_224", 48, depth=2)',
    "ViT-B, batch 8": 'plan("vit_base_patch16_224", 8)',
    "ViT-B, batch 1": 'plan("vit_base_patch16_224", 1)',
    "ViT-B, batch 1, sm_80": 'plan("vit_base_patch16_224", 1, "sm_80")',
    "batch 4096": 'plan("vit_base_patch16_224", 4096, depth=1)',
    "16384 tokens": 'plan("vit_base_patch16_224", 4, image_size=2048, depth=2)',
    "registers": 'plan("vit_small_patch14_reg4_dinov2", 1, depth=1)',
    "1280 wide": 'plan("vit_huge_patch14_224", 64, depth=1)',
    "attention pooling": 'plan("vit_base_patch16_siglip_224", 64, depth=1)',
    "average pooling": 'plan("vit_base_patch16_224", 64, depth=1, global_pool="avg", fc_norm=False)',
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, Any]]:
    """Recorded in one child process: starting one takes longer than a plan does."""
    return dict(zip(PLANS, plans(*PLANS.values()), strict=True))


def test_vit_b_makes_five_launches_a_block_and_no_other_work(recorded: dict[str, dict[str, Any]]) -> None:
    check(recorded["ViT-B, batch 64"], BLOCK, TAIL, APART)
    assert len(recorded["ViT-B, batch 64"]["kernels"]) == 1 + 5 * 11 + 8 + 2


def test_a_small_batch_makes_a_sixth_launch_to_add_up_the_parts_of_fc2(recorded: dict[str, dict[str, Any]]) -> None:
    """Not on sm_90, where a longer ring is as fast, but for the class token alone."""
    check(recorded["ViT-B, batch 1, sm_80"], LAST, TAIL)
    assert recorded["ViT-B, batch 1, sm_80"]["kernels"].count("linear_parts_kernel") == 12
    check(recorded["ViT-B, batch 1"], BLOCK, TAIL, LAST)


def test_the_last_block_multiplies_one_row_for_each_image(recorded: dict[str, dict[str, Any]]) -> None:
    """Of its products keys and values alone are as large as those of the blocks in front: 99 x 6 tiles of 256 columns,
    walked by 132 programs. The others have the 64 rows of the class tokens."""
    seen = recorded["ViT-B, batch 64"]
    last = list(zip(seen["kernels"], [grid[0] for grid in seen["grids"]], strict=True))[-10:-2]
    products = [(kernel, programs) for kernel, programs in last if "linear" in kernel]
    assert products == [
        ("linear_tma_kernel", 12), ("linear_roles_kernel", 132), ("linear_tma_kernel", 12), ("linear_tma_kernel", 48),
        ("linear_parts_kernel", 48), ("linear_sum_kernel", 48),
    ]  # fmt: skip
    assert ("attention_whole_kernel", 64 * 12) in last, "one query of each head"


@pytest.mark.parametrize(("name", "block"), [("batch 4096", BLOCK), ("16384 tokens", LAST)])
def test_grids_of_the_largest_inputs_stay_within_the_hardware(
    name: str, block: list[str], recorded: dict[str, dict[str, Any]]
) -> None:
    check(recorded[name], BLOCK, TAIL, ["row_stats_kernel", "linear_kernel", *block])
    largest = max(grid[0] for grid in recorded[name]["grids"])
    # Of many tokens all launches have programs that walk.
    assert largest > GRID_LIMITS[1] // 16 if name == "batch 4096" else largest == 132, "large enough to tell"


def test_products_of_a_block_go_through_tensor_descriptors(recorded: dict[str, dict[str, Any]]) -> None:
    """All but the head's, in the batch that fills the GPU and in the one that leaves most of it idle."""
    columns, walking, roles = "linear_columns_kernel", "linear_tma_kernel", "linear_roles_kernel"
    for name, kernels in (
        ("ViT-B, batch 1", [columns, walking, columns, walking]), ("ViT-B, batch 8", [walking, *[columns] * 3]),
        ("ViT-B, batch 64", [roles] * 4),
    ):  # fmt: skip
        launched = [kernel for kernel in recorded[name]["kernels"][1 : 1 + 5 * 11] if "linear" in kernel]
        assert launched == kernels * 11, name


def test_at_batch_8_every_sm_has_one_tile_of_a_product(recorded: dict[str, dict[str, Any]]) -> None:
    """6 x 22 tiles of 128 columns and 72 rows of projection and fc2, 12 x 11 of 256 and 144 of fc1."""
    seen = recorded["ViT-B, batch 8"]
    block = list(zip(seen["kernels"], [grid[0] for grid in seen["grids"]], strict=True))[1:6]
    assert [programs for kernel, programs in block if "columns" in kernel] == [132, 132, 132]


def test_attention_of_many_short_sequences_keeps_their_keys_in_shared_memory(recorded: dict[str, Any]) -> None:
    """197 tokens are four tiles of queries: two a program, and one at batch 1, where that keeps more SMs busy; of the
    last block's queries one an image is left. Of long sequences warps have roles."""
    for name, heads, programs in (("ViT-B, batch 64", 64 * 12, 2), ("ViT-B, batch 1", 12, 4)):
        seen = recorded[name]
        whole = [grid for kernel, grid in zip(seen["kernels"], seen["grids"], strict=True) if "whole" in kernel]
        assert whole == [[heads * programs, 1, 1]] * 11 + [[heads, 1, 1]]
    seen = recorded["16384 tokens"]
    assert seen["kernels"].count("attention_roles_kernel") == seen["depth"]


def test_the_last_tiles_of_a_product_are_split_where_that_keeps_all_sms_busy(recorded: dict[str, Any]) -> None:
    """74 x 9 tiles of 256 columns on 132 SMs leave 6 over, and 74 x 6 of 128 columns 48; 74 x 12 and x 3 leave more
    than make a piece for each SM. At batch 64 there are 99 x 9, 12 and 3 tiles of 256 columns, and 99 x 6 of 128."""
    for name, left_over in (("ViT-B, batch 48", (6, 48, 0, 0)), ("ViT-B, batch 64", (0, 66, 0, 33))):
        seen = recorded[name]
        block = list(zip(seen["kernels"], seen["split"], [grid[0] for grid in seen["grids"]], strict=True))[1:6]
        roles = "linear_roles_kernel"
        assert [launch for launch in block if launch[0] == roles] == [(roles, n, 132) for n in left_over], name


def test_the_last_tiles_are_halved_where_that_keeps_all_sms_busy_and_registers_hold_both() -> None:
    """Where columns do not suit the kernel whose warps have roles. 129 x 31 tiles of 128 x 128 leave 39 over for 132
    SMs, which are halved with up to 16 partial statistics a row; a row of tiles less leaves 8, and 45 x 8 leave 96."""
    seen = run(
        """
        import json, torch
        from vit_bench.recording import gpu, recording
        from vit_kernels import linear

        def meta(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="meta")

        with recording(gpu("sm_90"), torch_device="meta", compiles=False) as recorder:
            for m, n, k in ((16448, 3856, 1024), (16448, 3856, 1280), (16320, 3856, 1024), (5760, 1008, 1024)):
                stats = meta(2, k // 64, m, dtype=torch.float32)
                linear(meta(m, k), meta(n, k), norm="rms", stats=stats)
        found = [(launch, launch.arguments) for launch in recorder.launches]
        print(json.dumps([[launch.kernel, a["HALVES"], a["halved"], launch.grid[0]] for launch, a in found]))
        """
    )
    tma = "linear_tma_kernel"
    assert seen == [[tma, True, 39, 264], [tma, False, 0, 264], [tma, True, 8, 264], [tma, True, 0, 264]]


def test_registers_and_layer_scale_add_no_work(recorded: dict[str, dict[str, Any]]) -> None:
    check(recorded["registers"], BLOCK, ["layer_norm_kernel"], BLOCK)


def test_attention_pooling_is_five_launches_more(recorded: dict[str, dict[str, Any]]) -> None:
    """Keys and values, attention of one query an image, projection, and an MLP of 64 rows, whose fc2 is shared out."""
    pool = ["linear_kernel", "attention_kernel", *["linear_kernel"] * 3, "linear_sum_kernel"]
    check(recorded["attention pooling"], BLOCK, ["layer_norm_kernel", *pool])
    assert recorded["attention pooling"]["grids"][-5] == [64 * 12, 1, 1]


def test_the_mean_over_the_patches_is_the_only_work_of_pytorchs(recorded: dict[str, dict[str, Any]]) -> None:
    pooled = recorded["average pooling"]
    check(pooled | {"other": []}, BLOCK, TAIL)
    assert pooled["other"] == ["aten.mean.dim"]


def test_another_batch_size_compiles_nothing_new() -> None:
    seen = run(
        """
        import json, torch
        from vit_bench.launch_plan import blank_images, blank_model, counted_compilations
        from vit_bench.recording import gpu, recording
        from vit_engine import ViTConfig
        config = ViTConfig.preset("vit_base_patch16_224", depth=1)
        model = blank_model(config, torch.float16)
        with torch.no_grad(), recording(gpu("sm_90")):
            model(blank_images(config, 64, torch.float16))
            with counted_compilations() as compiled:
                for batch in (61, 62, 64):
                    model(blank_images(config, batch, torch.float16))
        print(json.dumps(compiled))
        """
    )
    assert seen == []


def test_launches_go_to_the_device_and_stream_of_the_tensors() -> None:
    seen = run(
        """
        import json, torch, vit_kernels
        from torch._subclasses.fake_tensor import FakeTensorMode
        from vit_bench.recording import gpu, recording, several_gpus
        found = []
        with recording(gpu("sm_90"), torch_device="cuda") as recorder, several_gpus(recorder), FakeTensorMode():
            recorder.streams = {0: 11, 1: 22, 2: 33}
            def calls(device):
                new = lambda *shape: torch.empty(shape, dtype=torch.float16, device=device)
                x, square, vector = new(64, 64), new(64, 64), new(64)
                yield "row_stats", lambda: vit_kernels.row_stats(x)
                yield "layer_norm", lambda: vit_kernels.layer_norm(x)
                yield "linear", lambda: vit_kernels.linear(x, square)
                yield "mlp", lambda: vit_kernels.mlp(x, square, None, square, norm="none")
                yield "attention", lambda: vit_kernels.attention(*new(3, 1, 16, 2, 32).unbind(0))
                yield "patch_embed", lambda: vit_kernels.patch_embed(new(1, 3, 8, 8), new(64, 3, 4, 4))
            for current in (0, 1):
                with torch.cuda.device(current):
                    for own in (0, 1, 2):
                        for name, call in calls(f"cuda:{own}"):
                            recorder.launches.clear()
                            call()
                            restored = torch.cuda.current_device() == current
                            found += [(name, own, seen.device, seen.stream, restored) for seen in recorder.launches]
        print(json.dumps(found))
        """
    )
    assert {name for name, *_ in seen} == {"row_stats", "layer_norm", "linear", "mlp", "attention", "patch_embed"}
    for name, own, device, stream, restored in seen:
        assert (device, stream, restored) == (own, (11, 22, 33)[own], True), (name, own, device, stream, restored)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
def test_plans_of_the_presets(device: str) -> None:
    """Ti, S, B, L and H in bfloat16, at the batch sizes people run; three blocks, since all but the last are alike."""
    sizes = ("tiny_patch16", "small_patch16", "base_patch16", "large_patch16", "huge_patch14")
    names = [f"vit_{size}" for size in sizes]
    wanted = [(name, batch) for name in names for batch in (1, 8, 64, 256)]
    found = plans(*(f'plan("{name}_224", {batch}, "{device}", "bfloat16", depth=3)' for name, batch in wanted))
    for (name, batch), one in zip(wanted, found, strict=True):
        narrow = not {"mlp_kernel", "mlp_roles_kernel"}.isdisjoint(one["kernels"])
        assert not narrow or name in names[:2], name
        # A product that is shared out is one of the block's, with a launch more right behind it.
        for kernel, behind in itertools.pairwise(one["kernels"]):
            assert (behind == "linear_sum_kernel") == ("linear_parts" in kernel), (name, batch)
        one["kernels"] = [kernel for kernel in one["kernels"] if kernel != "linear_sum_kernel"]
        # One kernel for the whole MLP pays for many rows only.
        last = ["row_stats_kernel", "linear_kernel", *BLOCK] if "row_stats_kernel" in one["kernels"] else BLOCK
        check(one, NARROW_BLOCK if narrow else BLOCK, TAIL[: 1 if "huge" in name else 2], last)
        assert len(one["kernels"]) <= 1 + 5 * one["depth"] + 2 + 2, (name, batch)


def test_wide_models_in_fp32_take_statistics_of_few_rows_as_one_partial() -> None:
    """18 partials of SO400M's rows: a launch more behind the pool's projection, and the plan knows of it."""
    seen = run(
        """
        import json, torch
        from vit_bench.launch_plan import forward_plan
        from vit_bench.plan import model_calls
        from vit_bench.recording import gpu, recording
        from vit_engine import ViTConfig
        config = ViTConfig.preset("vit_so400m_patch14_siglip_224", depth=1)
        found = forward_plan(config, 1, torch.float32, gpu("sm_90"))
        with recording(gpu("sm_90"), torch_device="meta") as recorder:
            for call in model_calls(config, 1, torch.float32):
                if call.times:
                    call.run()
        spilled = [launch.binary.resources.spilled_bytes for launch in found.launches]
        plans = [[launch.kernel for launch in launches] for launches in (found.launches, recorder.launches)]
        print(json.dumps([plans, max(spilled), found.other_work]))
        """
    )
    (made, planned), spilled, other = seen
    assert made == planned and made.count("row_stats_kernel") == 1
    assert spilled == 0 and other == []
