"""Every case without a GPU: recorded without a compiler, compiled for some, and what a block moves, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.bench.child import run
from vit_bench.plan import DTYPES
from vit_bench.timed import traffic
from vit_bench.timed.compiled import Compiling
from vit_bench.timed.shapes import MODELS, select
from vit_engine.config import ViTConfig
from vit_engine.encoder_block import one_partial, queries_apart
from vit_kernels.device import H100

RECORD = """
    import json
    from vit_bench.recording import gpu
    from vit_bench.timed.dry import launches
    from vit_bench.timed.shapes import table

    found = {{}}
    for case in table():
        found[case.name] = [
            (launch.kernel, launch.grid, launch.num_warps, {{
                name: list(value.shape) if hasattr(value, "shape") else value
                for name, value in zip(launch.names, launch.values)
                if name in ("M", "N", "K", "q_ptr", "q_desc", "keys") and value is not None
            }})
            for launch in launches(case, {dtype!r}, gpu({gpu!r}))
        ]
    print(json.dumps(found))
"""


def recorded(gpu: str, dtype: str) -> dict[str, list[Any]]:
    return run(RECORD.format(gpu=gpu, dtype=dtype))


def check_all(found: dict[str, list[Any]], dtype: str) -> None:
    """What every case launches is of the case's own shapes."""
    for case in select():
        launches = found[case.name]
        assert launches, case
        for kernel, grid, warps, _ in launches:
            assert kernel.endswith("_kernel") and grid[0] >= 1 and grid[1:] == [1, 1], case
            assert warps in (1, 2, 4, 8, 16), case
        shape = case.shape
        if case.suite == "model":
            head = bool(case.config and case.config.num_classes)
            # A block like those in front of the last, and the last, which computes the class token alone.
            one_kernel_mlps = sum(kernel in ("mlp_kernel", "mlp_roles_kernel") for kernel, *_ in launches)
            sums = sum(kernel == "linear_sum_kernel" for kernel, *_ in launches)
            assert case.config is not None
            width = case.config.embed_dim
            apart = queries_apart(shape["batch"] * shape["tokens"], width, width)
            anew = one_partial(DTYPES[dtype], width)
            assert sum(kernel == "row_stats_kernel" for kernel, *_ in launches) == apart + anew, case
            assert one_kernel_mlps in (0, 1) and sums in (0, 1, 2), case
            assert sums == sum("linear_parts" in kernel for kernel, *_ in launches), case
            assert len(launches) == 1 + 2 * 5 - one_kernel_mlps + 2 * apart + anew + sums + 1 + head, case
            assert launches[0][3]["M"] == shape["batch"] * shape["tokens"], case
            assert launches[0][0] in ("patch_embed_kernel", "patch_embed_blocks_kernel")
            assert launches[2][0] in ("attention_kernel", "attention_whole_kernel", "attention_roles_kernel")
        elif case.label == "attention":
            ((kernel, _, _, arguments),) = launches
            batch, tokens, heads, width = (shape[name] for name in ("batch", "tokens", "heads", "head_dim"))
            assert arguments["keys"] == tokens, case
            if kernel == "attention_whole_kernel":
                assert arguments["q_desc"] == [batch, tokens, heads * width] and tokens <= 256, case
            elif kernel == "attention_roles_kernel":
                assert arguments["q_desc"] == [batch, tokens, heads * width] and tokens > 256, case
            else:
                assert kernel == "attention_kernel" and arguments["q_ptr"] == [batch, tokens, heads, width], case
        elif case.label in ("qkv", "projection", "head"):
            ((kernel, _, _, arguments),) = launches
            assert kernel in [f"linear{kind}_kernel" for kind in ("", "_tma", "_roles", "_staying", "_columns")]
            assert arguments == {"M": shape["m"], "N": shape["n"], "K": shape["k"]}, case


@pytest.mark.compiled
def test_every_case_is_launched_on_a_gpu_with_descriptors():
    check_all(recorded("h100", "bf16"), "bf16")


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "dtype"), [("rtx4090", "fp16"), ("sm_80", "fp32")])
def test_every_case_is_launched_on_other_gpus(gpu, dtype):
    check_all(recorded(gpu, dtype), dtype)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return run(
        """
        import json
        from dataclasses import asdict
        from vit_bench.recording import gpu
        from vit_bench.timed.compiled import Compiling
        from vit_bench.timed.shapes import MODELS, select
        from vit_bench.timed.traffic import block_traffic

        h100, model = gpu("h100"), "vit_tiny_patch16_224/b64"
        names = [f"kernels/{model}/qkv", f"kernels/{model}/mlp", f"model/{model}"]
        rows = {case.name: asdict(Compiling(h100).rows(case, "bf16", 3)[0]) for case in select(only=names)}
        block = block_traffic(MODELS["vit_base_patch16_224"], 64, "bf16", h100)
        few = block_traffic(MODELS["vit_base_patch16_224"], 1, "bf16", gpu("a100"))["ours"]
        print(json.dumps({"rows": rows, "block": block, "few": few}))
        """
    )


@pytest.mark.compiled
def test_rows_of_compiled_code_have_no_time(compiled):
    rows = compiled["rows"]
    assert len(rows) == 3
    for row in rows.values():
        assert (row["source"], row["seconds"], row["run"], row["device"]) == ("compiled", None, 3, "H100 SXM")
        assert "nothing was timed" in row["reason"]
        kernels = row["code"]["kernels"]
        assert row["launches"] == sum(one["times"] for one in kernels)
        assert row["bound_s"] == pytest.approx(sum(one["times"] * one["bound_s"] for one in kernels))
        counted = [one["bound_s"] if one["modelled_s"] is None else one["modelled_s"] for one in kernels]
        modelled = sum(one["times"] * seconds for one, seconds in zip(kernels, counted, strict=True))
        known = any(one["modelled_s"] is not None for one in kernels)
        assert row["modelled_s"] == (pytest.approx(modelled) if known else None)
        for one in kernels:
            assert 16 <= one["registers"] <= 255 and one["spilled_bytes"] == 0 and one["shared"] <= 232_448
            assert one["bound_s"] == pytest.approx(max(one["flops"] / 989.4e12, one["bytes"] / 3.35e12))
    forward = rows["model/vit_tiny_patch16_224/b64"]
    # Two tensors of all tokens and the packed projection at least; two blocks' worth would be more.
    tokens = 64 * 197 * 192 * 2
    assert 4 * tokens < forward["peak_bytes"] < 8 * tokens
    assert forward["images"] == 64 and forward["launches"] == 52 and forward["modelled_s"] > forward["bound_s"]
    assert forward["flops"] == sum(one["times"] * one["flops"] for one in forward["code"]["kernels"])
    for label in ("qkv", "mlp"):
        call = rows[f"kernels/vit_tiny_patch16_224/b64/{label}"]
        (alone,) = call["code"]["kernels"]
        (inside,) = (one for one in forward["code"]["kernels"] if one["launch"] == label)
        assert alone | {"times": 11} == inside, "a call is one call, however often a forward makes it"
        assert call["flops"] == alone["flops"] and call["images"] == 0 and call["launches"] == 1


@pytest.mark.compiled
def test_a_block_moves_what_its_launches_are_given(compiled):
    ours, eager = compiled["block"]["ours"], compiled["block"]["eager"]
    # qkv 1 + 3, attention 3 + 1, projection 1 + 1 + 1, fc1 1 + 4, fc2 4 + 1 + 1 = 22; and row statistics, two fp32
    # numbers for 64 columns, 1/16 of a row in 16 bits: written twice and read twice.
    assert ours["launches"] == len(ours["kernels"]) == 5 and ours["activations"] == pytest.approx(22 + 4 / 16)
    # Of few rows, an A100 shares out fc2's K: four parts in fp32, written and read.
    few = compiled["few"]
    assert few["launches"] == 6 and few["activations"] == pytest.approx(22 + 4 / 16 + 4 * 2 * 2)
    weights = 12 * 768 * 768 * 2
    assert weights < ours["weight_bytes"] < 1.01 * weights
    # Norm 2, qkv 4, attention 4, projection 2, sum 3, norm 2, fc1 5, GELU 8, fc2 5, sum 3
    assert eager["operators"] == 10 and eager["activations"] == pytest.approx(38, abs=0.05)
    quoted = compiled["block"]["quoted"]["torch.compile"]
    assert (quoted["launches"], quoted["activations"]) == (8, 36) and "not counted in this run" in quoted["quoted for"]
    # In one kernel the hidden features never leave the GPU's registers: x is read once and written once.
    small = compiled["rows"]["model/vit_tiny_patch16_224/b64"]["code"]["block"]["ours"]
    assert small["launches"] == 4 and small["kernels"][-1] == "mlp_roles_kernel" and 13 < small["activations"] < 14


def test_what_eager_moves_needs_no_compiler():
    scaled = ViTConfig(image_size=32, patch_size=16, embed_dim=64, depth=3, num_heads=2, layer_scale=0.1)
    plain = traffic.eager_traffic(MODELS["vit_base_patch16_224"], 2, torch.bfloat16)
    found = traffic.eager_traffic(scaled, 2, torch.float32)
    assert found["operators"] == plain["operators"] + 2 and found["activations"] == pytest.approx(42, abs=0.1)
    assert found["weight_bytes"] == 4 * (12 * 64 * 64 + 13 * 64 + 2 * 64)


@pytest.mark.interpreted_only
def test_where_triton_interprets_nothing_is_compiled():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 and compiles nothing"):
        Compiling(H100)
