"""The compile matrix finds what must not ship: spills, too much shared memory, compile errors, no tensor cores."""

from __future__ import annotations

import pytest

from tests.bench.child import run

pytestmark = pytest.mark.compiled


def test_kernels_of_the_smallest_preset_compile_cleanly() -> None:
    variants = run(
        """
        import json
        from dataclasses import asdict
        from vit_bench.compiled_variants import compile_for
        found = compile_for("sm_90", "float16", ["vit_tiny_patch16_224"], ["linear", "layer_norm"], [64])
        print(json.dumps([asdict(variant) for variant in found]))
        """
    )
    described = {"linear_tma_kernel", "linear_staying_kernel"}
    assert {v["function"] for v in variants} == described | {"linear_kernel", "layer_norm_kernel"}
    for variant in variants:
        assert variant["error"] == "" and variant["stack"] == 0, variant
        assert 0 < variant["shared"] <= variant["shared_limit"] and 0 < variant["registers"] <= 255, variant
        # One row of 192 16-bit numbers on four warps leaves a thread four bytes of it.
        widest = 16 if variant["function"] == "linear_kernel" else 4
        assert variant["load_bytes"] >= widest or variant["tma"], variant
        assert variant["tma"] == (variant["function"] in described)
        assert variant["constants"]["BLOCK_M"] >= 1 and "M" not in variant["constants"]
        assert 1 <= variant["ctas_per_sm"] <= 32
    assert {v["tensor"] for v in variants if v["function"] == "linear_kernel"} <= {"HMMA", "HGMMA"}
    assert {v["tensor"] for v in variants if v["function"] == "linear_staying_kernel"} == {"HGMMA"}


def test_a_spilling_tile_fails() -> None:
    variants = run(
        """
        import json
        from dataclasses import asdict
        from vit_bench.compiled_variants import compile_for
        from vit_bench.tile_choices import forced
        from vit_kernels.gemm_tiles import GemmTile
        with forced("linear", GemmTile(128, 128, 32, 4, 3)):
            found = compile_for("sm_80", "float32", ["vit_tiny_patch16_224"], ["linear"], [1])
        print(json.dumps([asdict(variant) for variant in found]))
        """
    )
    assert any("registers are spilled" in v["error"] and v["stack"] > 0 for v in variants)


def test_shared_memory_over_the_limit_and_compile_errors_fail_and_do_not_stop_the_rest() -> None:
    variants = run(
        """
        import json
        from dataclasses import asdict
        from vit_bench.compile_matrix import evidence
        from vit_bench.compiled_variants import compile_for
        from vit_bench.tile_choices import forced
        from vit_kernels.gemm_tiles import GemmTile
        found = []
        for tile in (GemmTile(128, 128, 64, 8, 5), GemmTile(128, 100, 64, 8, 3)):
            with forced("linear", tile):
                found += compile_for("sm_86", "float16", ["vit_tiny_patch16_224"], ["linear", "row_stats"], [1])
        records = evidence(found, ["vit_tiny_patch16_224"], [1])
        tiles = {r.kernel: r.detail["tiles"] for r in records}
        print(json.dumps([[asdict(v) for v in found], {r.kernel: r.passed for r in records}, tiles]))
        """
    )
    found, passed, tiles = variants
    assert tiles["linear"] and all(tile.startswith("tile ") for tile in tiles["linear"])
    errors = [v["error"] for v in found if v["error"]]
    assert any("OutOfResources" in e and "shared memory" in e for e in errors), errors
    assert any("power of 2" in e for e in errors), errors
    assert [v["error"] for v in found if v["kernel"] == "row_stats"] == ["", ""]
    assert passed == {"linear": False, "row_stats": True}


def test_a_16_bit_product_without_tensor_cores_is_unfit() -> None:
    errors = run(
        """
        import json
        from vit_bench.compiled_variants import Variant, _judge
        def error(kernel, dtype, tensor):
            rest = dict(function="f", gpu="sm_80", used_by="", constants={}, num_warps=4, num_stages=1, registers=9)
            rest |= dict(stack=0, shared=0, shared_limit=1, ctas_per_sm=1, load_bytes=16, tma=False)
            rest |= dict(specialized=False, instructions=1)
            return _judge(Variant(kernel=kernel, dtype=dtype, tensor=tensor, **rest))
        print(json.dumps([
            error("linear", "float16", "FFMA"), error("linear", "float16", "HMMA"),
            error("linear", "float32", "FFMA"), error("layer_norm", "float16", "none"),
        ]))
        """
    )
    assert errors == ["no tensor-core instruction", "", "", ""]


def test_variants_are_listed_without_compiling_as_they_are_compiled() -> None:
    names, listed, compiled = run(
        """
        import json
        from vit_bench.compiled_variants import compile_for
        from vit_bench.launch_plan import counted_compilations
        from vit_bench.variant_listing import list_variants
        what = "sm_90", "float16", ["vit_tiny_patch16_224"], ["linear", "attention"], [1, 64]
        with counted_compilations() as names:
            listed = list_variants(*what)
        found = compile_for(*what)
        tile = lambda constants: [constants["BLOCK_M"], constants["BLOCK_N"], constants.get("BLOCK_K")]
        print(json.dumps([
            names,
            [(v.function, v.used_by, tile(dict(v.constants)), dict(v.constants)["num_warps"]) for v in listed],
            # Of warps that have roles, the compiler counts those that others ask for, too.
            [(v.function, v.used_by, tile(v.constants), 4 if v.specialized else v.num_warps) for v in found],
        ]))
        """
    )
    assert names == [] and listed == compiled and len(listed) >= 4


def test_families_without_a_preset_are_listed_with_any_models() -> None:
    """And more images need no other kernel, once they are enough for the larger tile."""
    users, again, shapes = run(
        """
        import json
        from vit_bench.plan import HEADS
        from vit_bench.variant_listing import list_variants
        few, many = (list_variants("sm_90", "float16", [], ["qk_rope"], b) for b in ([64], [64, 256]))
        shapes = {(heads.width, heads.norm, heads.rope) for heads in HEADS}
        print(json.dumps([[v.used_by for v in few], [v.used_by for v in many], len(shapes)]))
        """
    )
    assert users == again and len(users) >= shapes == 8
    assert "EVA-02, ViT-B batch 64: queries and keys" in users


def test_the_quick_matrix_takes_all_of_sm_90_and_every_pair_of_the_others() -> None:
    seen = run(
        """
        import json
        from vit_bench import compile_matrix
        from vit_bench.pairwise import pairs
        from vit_bench.variant_listing import list_variants
        options = dict(models=["vit_tiny_patch16_224", "vit_base_patch14_reg4_dinov2"], kernels=["linear", "mlp"])
        options |= dict(dtypes=["float16", "float32"], batches=[1, 64])
        chosen = compile_matrix.quick_selection(gpus=["sm_80", "sm_86", "sm_90", "sm_120"], **options)
        every = [v for n in ("sm_80", "sm_86", "sm_120") for d in options["dtypes"]
                 for v in list_variants(n, d, options["models"], options["kernels"], options["batches"])]
        covered = set().union(*(pairs(v.factors()) for v in chosen))
        print(json.dumps({
            "gpus": sorted({v.gpu for v in chosen}), "chosen": len(chosen), "every": len(every),
            "missing": [str(pair) for v in every for pair in pairs(v.factors()) - covered],
        }))
        """
    )
    assert seen["gpus"] == ["sm_120", "sm_80", "sm_86"] and seen["missing"] == []
    assert 0 < seen["chosen"] < seen["every"]


def test_the_table_names_every_variant_and_says_that_nothing_was_executed() -> None:
    text = run(
        """
        import json
        from vit_bench.compile_matrix import markdown
        from vit_bench.compiled_variants import Variant
        rest = dict(gpu="sm_86", dtype="float16", used_by="vit_x batch 1: qkv", num_warps=8, num_stages=3)
        rest |= dict(shared=1024, shared_limit=101376, ctas_per_sm=2, tensor="HMMA", load_bytes=16, tma=False)
        rest |= dict(specialized=False, instructions=9, registers=168)
        tile = {"BLOCK_M": 128, "BLOCK_N": 64, "NORM": "layer", "HAS_BIAS": True, "HAS_SCALE": False}
        good = Variant(kernel="linear", function="linear_kernel", constants=tile, stack=0, **rest)
        bad = Variant(kernel="linear", function="", constants={}, stack=8, error="a | b", **rest)
        print(json.dumps(markdown([good, bad])))
        """
    )
    head, _, columns, _, good, bad = text.strip().split("\n")
    assert head == "2 kernel variants, compiled only (nothing was executed); 1 unfit to ship."
    row = [cell.strip() for cell in good.strip("|").split("|")]
    assert row == [
        "sm_86", "float16", "linear_kernel", "128x64", "NORM=layer, HAS_BIAS", "8", "3", "168", "0", "1024", "101376",
        "2", "HMMA", "16 B", "vit_x batch 1: qkv", "ok",
    ]  # fmt: skip
    assert columns.count("|") == good.count("|") and bad.endswith("| a \\| b |")
