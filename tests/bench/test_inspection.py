"""A model inspected from its compiled code: the parts agree with each other and with the launches."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.bench.child import run
from tests.bench.listing import code
from vit_bench import inspection, sass
from vit_bench.inspection import EpilogueCost, _epilogue, _repeated, inspect_model, trip_flops
from vit_bench.pipes import Kernel
from vit_bench.plan import launch_labels


def inspected(model: str, gpu: str, batch: int, dtype: str) -> dict[str, Any]:
    return run(
        f"""
        import json
        from vit_bench.inspection import inspect_model
        print(json.dumps(inspect_model({model!r}, {gpu!r}, {batch}, {dtype!r}).as_json()))
        """
    )


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return inspected("vit_tiny_patch16_224", "h100", 64, "fp16")


def test_launches_are_named_by_what_they_are_in_the_model():
    product, parts, added = "linear_tma_kernel", "linear_parts_kernel", "linear_sum_kernel"
    assert launch_labels("qkv", [product]) == ["qkv"]
    assert launch_labels("projection", [parts, added]) == ["projection", "projection sums"]
    assert launch_labels("mlp", ["mlp_kernel"]) == ["mlp"]
    assert launch_labels("mlp", [product, parts, added]) == ["fc1", "fc2", "fc2 sums"]
    assert launch_labels("mlp", [parts, added, parts, added]) == ["fc1", "fc1 sums", "fc2", "fc2 sums"]
    assert launch_labels("last mlp", [product, parts, added]) == ["last fc1", "last fc2", "last fc2 sums"]
    assert launch_labels("mlp", ["row_stats_kernel", product, product]) == ["mlp 1/3", "mlp 2/3", "mlp 3/3"]



@pytest.mark.compiled
def test_the_launches_of_a_forward_and_what_they_take(found):
    assert found["rung"] == "compiled only" and "no GPU was used" in found["note"]
    assert "not measurements" in found["note"]
    assert (found["model"], found["batch"], found["dtype"]) == ("vit_tiny_patch16_224", 64, "fp16")
    assert found["gpu"]["name"] == "H100 SXM" and found["peaks"]["bandwidth"] == 3.35e12
    launches = found["launches"]
    block = ["qkv", "attention", "projection", "mlp"]
    last = ["last qkv", "last attention", "last projection", "last fc1", "last fc2"]
    assert [launch["label"] for launch in launches] == ["stem", *block, *last, "final norm, class token", "head"]
    assert [launch["times"] for launch in launches] == [1, *[11] * 4, *[1] * 7]
    assert found["forward"]["launches"] == 1 + 11 * 4 + 5 + 2
    for launch in launches:
        assert 16 <= launch["registers"] <= 255 and launch["stack"] == 0, launch["label"]
        assert launch["shared"] <= launch["shared_limit"] == 232_448
        assert 1 <= launch["ctas_per_sm"] <= 32
        # 64K registers hold the resident CTAs, and would not hold many more.
        registers = launch["ctas_per_sm"] * launch["num_warps"] * 32 * launch["registers"]
        assert registers <= 65_536
        assert launch["waves"] == pytest.approx(launch["grid"][0] / (132 * launch["ctas_per_sm"]))
        assert launch["tile"]["m"] >= 1 and launch["code"]["load_bytes"] in (0, 2, 4, 8, 16)
        assert launch["code"]["load_bytes"] or launch["code"]["tma"], launch["label"]


@pytest.mark.compiled
def test_main_loops_and_epilogues(found):
    for launch in found["launches"]:
        sections = [*launch["main_loops"], *filter(None, [launch["whole"]])]
        assert sections, launch["label"]
        for section in sections:
            assert section["cycles"][section["bound"]] == max(section["cycles"].values()) > 0
            assert section["cycles"]["issue"] == section["instructions"] == sum(section["mix"].values())
    by_label = {launch["label"]: launch for launch in found["launches"]}
    (whole_blocks,) = by_label["attention"]["main_loops"]
    assert whole_blocks["cycles"]["exponential"] > 100 and whole_blocks["flops"] > 0
    norm = by_label["final norm, class token"]
    assert norm["whole"]["instructions"] > norm["main_loops"][0]["instructions"] and norm["epilogue"] is None
    for name in ("stem", "qkv", "projection"):
        launch = by_label[name]
        tile, cost = launch["tile"], launch["epilogue"]
        if any(kind in launch["kernel"] for kind in ("roles", "staying", "blocks")):
            # Others finish than those that multiply, 64 x 64 results at a time by four warps.
            assert cost["outputs_per_thread"] == 64 * 64 / (32 * 4)
            finished = cost["instructions"] / cost["outputs_per_thread"]
            assert 0 < cost["handed_over"] < finished < 30
            assert cost["slots_per_output"] == finished + cost["handed_over"]
            continue
        assert cost["handed_over"] is None
        assert cost["outputs_per_thread"] == tile["m"] * tile["n"] / (32 * launch["num_warps"])
        assert cost["slots_per_output"] == cost["instructions"] / cost["outputs_per_thread"]
        # A store of 16 bytes holds eight results, and nothing of this size needs a hundred instructions each.
        assert 1 < cost["slots_per_output"] < 100
    # Width 192 of the result, not the tile of hidden features, and two warpgroups, not the warps that load.
    mlp = by_label["mlp"]
    assert mlp["kernel"] == "mlp_roles_kernel" and mlp["tile"]["m"] == 128
    assert mlp["epilogue"]["outputs_per_thread"] == 128 * 192 / (32 * 8)
    # Here the results of a tile of queries leave inside the loop over tiles.
    assert by_label["attention"]["kernel"] == "attention_whole_kernel" and by_label["attention"]["epilogue"] is None
    # The products found in the code of a loop are those that its tile needs.
    repeated = {name: launch["repeated"] for name, launch in by_label.items()}
    assert repeated.pop("final norm, class token") is None
    # Nor is it asked where warps have roles: of those, some multiply.
    roles = {name for name, launch in by_label.items() if re.search("roles|staying|blocks", launch["kernel"])}
    assert roles and {repeated.pop(name) for name in roles} == {None}
    assert repeated and set(repeated.values()) == {1.0}


@pytest.mark.compiled
def test_the_forward_sums_its_launches(found):
    forward = found["forward"]
    for key in ("flops", "bytes", "compute_s", "memory_s"):
        total = sum(launch["roofline"][key] * launch["times"] for launch in found["launches"])
        assert forward[key] == pytest.approx(total)
    larger = [max(one["compute_s"], one["memory_s"]) for one in (launch["roofline"] for launch in found["launches"])]
    times = [launch["times"] for launch in found["launches"]]
    assert forward["bound_s"] == pytest.approx(sum(t * s for t, s in zip(times, larger, strict=True)))
    assert forward["images_per_s"] == pytest.approx(64 / forward["bound_s"])
    modelled = [launch["modelled_s"] for launch in found["launches"]]
    assert None in modelled and any(modelled), "some launches have a model, others count with their bound"
    counted = sum(t * (m or s) for t, m, s in zip(times, modelled, larger, strict=True))
    assert forward["modelled_s"] == pytest.approx(counted)
    bounds = {launch["label"]: launch["roofline"]["bound"] for launch in found["launches"]}
    assert bounds["head"] == "memory" and bounds["mlp"] == "compute"


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "tensor"), [("sm_80", "HMMA"), ("sm_100", "UTCMMA")])
def test_other_tensor_cores(gpu, tensor):
    found = inspected("vit_base_patch16_224", gpu, 64, "bf16")
    labels = [launch["label"] for launch in found["launches"]]
    assert labels[4:6] == ["fc1", "fc2"]
    assert found["launches"][1]["code"]["tensor"] == tensor
    assert all(loop["cycles"]["tensor"] > 0 for launch in found["launches"][:6] for loop in launch["main_loops"])
    others = ("norm", "statistics", "sums")
    repeated = {launch["label"]: launch["repeated"] for launch in found["launches"]}
    assert {times for label, times in repeated.items() if not any(word in label for word in others)} == {1.0}
    assert {times for label, times in repeated.items() if any(word in label for word in others)} == {None}


def test_trips_of_every_kind_of_kernel():
    assert trip_flops({"BLOCK_M": 2, "BLOCK_N": 3, "BLOCK_K": 5}) == 60
    assert trip_flops({"BLOCK_M": 2, "BLOCK_N": 3, "BLOCK_K": 5, "ACTIVATION": "swiglu"}) == 120
    assert trip_flops({"BLOCK_M": 2, "BLOCK_N": 3, "MAIN": 4, "TAIL": 1}) == 2 * (2 * 2 * 3 * 5)
    assert trip_flops({"BLOCK_M": 2, "BLOCK_N": 3, "WIDTH": 5, "HALF": True, "REST": 1}) == 2 * (2 * 2 * 3 * 5)
    assert trip_flops({"BLOCK_M": 2, "BLOCK_H": 3, "MAIN": 4, "TAIL": 1, "ACTIVATION": "gelu"}) == 2 * (2 * 2 * 3 * 5)
    assert trip_flops({"BLOCK_M": 2, "BLOCK_H": 3, "MAIN": 4, "TAIL": 1, "ACTIVATION": "swiglu"}) == 3 * (2 * 2 * 3 * 5)


SPECIALIZED = """
    @P2 BRA `(.L_x_1)
    .L_x_0:
    UTMALDG.2D [UR4], [UR6]
    @P1 BRA `(.L_x_0)
    EXIT
    .L_x_1:
    HGMMA.64x128x16.F32 R24, gdesc[UR4], R24
    @P1 BRA `(.L_x_1)
    FADD R4, R4, R1
    STG.E [R2], R4
    EXIT
"""


def test_results_of_a_specialised_kernel_are_held_by_the_warps_that_multiply():
    kernel = Kernel(code(SPECIALIZED), 90, 12)
    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 16}
    # A warp multiplies 2 x 64 x 128 x 16 / 4 = 65,536; the tile takes eight of them, and four more load.
    assert _epilogue(kernel, tile, 12, specialized=True) == EpilogueCost(3, 0, 64.0, 3 / 64)
    assert _epilogue(kernel, tile, 8, specialized=False) == EpilogueCost(3, 0, 64.0, 3 / 64)
    # A second loop, over the steps of narrower tiles, changes nothing.
    pieces = ".L_x_2:\n    HGMMA.64x64x16.F32 R24, gdesc[UR4], R24\n    @P1 BRA `(.L_x_2)\n    FADD"
    narrow = SPECIALIZED.replace("FADD", pieces)
    assert _epilogue(Kernel(code(narrow), 90, 12), tile, 12, specialized=True) == EpilogueCost(3, 0, 64.0, 3 / 64)
    # Two K steps in one trip of the loop would look like half the warps, three like none that there are.
    assert _epilogue(kernel, tile | {"BLOCK_K": 5}, 12, specialized=True) == EpilogueCost(3, 0, None, None)


def test_where_others_finish_handing_over_is_part_of_the_slots():
    stored, handed_over = "FADD R4, R4, R1\n    STG.E [R2], R4", "STS [R2], R4"
    kernel = Kernel(code(SPECIALIZED.replace(stored, handed_over).replace("UTMALDG.2D [UR4], [UR6]", stored)), 90, 12)
    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 16}
    # Two instructions for each thread's 64 sums, and three for 32 results of 64 x 64 by 128 threads.
    assert _epilogue(kernel, tile, 12, specialized=True) == EpilogueCost(3, 0, 32.0, 3 / 32 + 2 / 64, 2 / 64)
    assert _epilogue(kernel, tile | {"BLOCK_K": 5}, 12, specialized=True) == EpilogueCost(3, 0, 32.0, None, None)


def test_products_that_warps_make_twice_are_counted():
    kernel = Kernel(code(SPECIALIZED), 90, 8)
    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 16}
    assert _repeated(kernel, tile, 8) == 1.0
    assert _repeated(kernel, tile | {"BLOCK_M": 64}, 8) == 2.0
    assert _repeated(Kernel(code("FADD R1, R2, R3\nEXIT"), 90, 8), {"BLOCK_M": 1, "BLOCK_N": 8}, 8) is None


def test_a_kernel_is_disassembled_once(monkeypatch):
    """nvdisasm takes most of a second to start, which was most of the time of `vit-engine inspect`."""
    runs, listing = [], "    /*0000*/    FFMA R1, R2, R3, R4 ;"
    monkeypatch.setattr(sass, "_run_tool", lambda tool, *_: runs.append(tool) or listing)
    assert sass.instructions(b"a kernel")[0].base == sass.code_facts(b"a kernel").tensor == "FFMA"
    assert runs == ["nvdisasm"]


@pytest.mark.interpreted_only
def test_where_triton_interprets_nothing_can_be_compiled():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 and compiles nothing"):
        inspect_model("vit_tiny_patch16_224", "h100", 1, "fp16")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("vit_tiny", "h100", 1, "fp16"), "vit_tiny_patch16_224"),
        (("vit_tiny_patch16_224", "h300", 1, "fp16"), "or A100, RTX 3090, .*; got 'h300'"),
        (("vit_tiny_patch16_224", "h100", 0, "fp16"), "batch must be at least 1; got 0"),
        (("vit_tiny_patch16_224", "h100", 1, "fp64"), "one of fp32, fp16, bf16; got 'fp64'"),
    ],
    ids=["model", "gpu", "batch", "dtype"],
)
def test_wrong_arguments_are_refused_before_anything_is_compiled(monkeypatch, arguments, words):
    monkeypatch.setattr(inspection, "require_compiler", lambda: None)
    with pytest.raises(ValueError, match=words):
        inspect_model(*arguments)
