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
        from vit_bench.compile_matrix import compile_for
        found = compile_for("sm_90", "float16", ["vit_tiny_patch16_224"], ["linear", "layer_norm"], [64])
        print(json.dumps([asdict(variant) for variant in found]))
        """
    )
    assert {v["function"] for v in variants} == {"linear_kernel", "layer_norm_kernel"}
    for variant in variants:
        assert variant["error"] == "" and variant["stack"] == 0, variant
        assert 0 < variant["shared"] <= variant["shared_limit"] and 0 < variant["registers"] <= 255, variant
        # One row of 192 16-bit numbers on four warps leaves a thread four bytes of it.
        widest = 16 if variant["function"] == "linear_kernel" else 4
        assert variant["load_bytes"] >= widest or variant["tma"], variant
        assert variant["constants"]["BLOCK_M"] >= 1
    assert {v["tensor"] for v in variants if v["function"] == "linear_kernel"} <= {"HMMA", "HGMMA"}


def test_a_spilling_tile_fails() -> None:
    variants = run(
        """
        import json
        from dataclasses import asdict
        from vit_bench.compile_matrix import compile_for
        from vit_bench.tile_choices import forced
        from vit_kernels.tiles import GemmTile
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
        from vit_bench.compile_matrix import compile_for, evidence
        from vit_bench.tile_choices import forced
        from vit_kernels.tiles import GemmTile
        found = []
        for tile in (GemmTile(128, 128, 64, 8, 5), GemmTile(128, 100, 64, 8, 3)):
            with forced("linear", tile):
                found += compile_for("sm_86", "float16", ["vit_tiny_patch16_224"], ["linear", "row_stats"], [1])
        records = evidence(found, ["vit_tiny_patch16_224"], [1])
        print(json.dumps([[asdict(v) for v in found], {r.kernel: r.passed for r in records}]))
        """
    )
    found, passed = variants
    errors = [v["error"] for v in found if v["error"]]
    assert any("OutOfResources" in e and "shared memory" in e for e in errors), errors
    assert any("power of 2" in e for e in errors), errors
    assert [v["error"] for v in found if v["kernel"] == "row_stats"] == ["", ""]
    assert passed == {"linear": False, "row_stats": True}


def test_a_16_bit_product_without_tensor_cores_is_unfit() -> None:
    errors = run(
        """
        import json
        from vit_bench.compile_matrix import Variant, _judge
        def error(kernel, dtype, tensor):
            rest = dict(function="f", gpu="sm_80", used_by="", constants={}, num_warps=4, num_stages=1, registers=9)
            rest |= dict(stack=0, shared=0, shared_limit=1, load_bytes=16, tma=False, specialized=False, instructions=1)
            return _judge(Variant(kernel=kernel, dtype=dtype, tensor=tensor, **rest))
        print(json.dumps([
            error("linear", "float16", "FFMA"), error("linear", "float16", "HMMA"),
            error("linear", "float32", "FFMA"), error("layer_norm", "float16", "none"),
        ]))
        """
    )
    assert errors == ["no tensor-core instruction", "", "", ""]
