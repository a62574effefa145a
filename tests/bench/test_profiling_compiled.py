"""What profiles say of compiled code, from one process whose Triton compiles."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench import child
from vit_bench.results import OURS

pytestmark = [pytest.mark.compiled, pytest.mark.interpreted_only]


def passes(model: str) -> str:
    """Prints the kernels of the plan, those that the engine launches, and the ends of the plan's steps."""
    return f"""
steps = planned({model!r}, gpu("h100"), 2, "bf16")
plan = forward_plan(ViTConfig.preset({model!r}), 2, torch.bfloat16, gpu("h100"))
ends = [step.start + step.seconds for step in steps]
found["pass"] = [[s.kernel for s in steps], [l.kernel for l in plan.launches], [steps[-1].start, *ends]]
"""


IMPORTS = """
import json, torch, vit_kernels
from dataclasses import asdict
from triton import knobs
from vit_bench import recording
from vit_bench.launch_plan import forward_plan
from vit_bench.profiling import model_gpu
from vit_bench.profiling.attention import compiled_rows
from vit_bench.profiling.model import Known, planned
from vit_bench.profiling.sweep import Point
from vit_bench.recording import gpu
from vit_engine import ViTConfig
found = {}
"""

POINTS = """
some = [Point(64, 197, 12, 64, "bf16"), Point(64, 197, 24, 64, "bf16"), Point(1, 64, 3, 64, "fp32")]
found["rows"] = [asdict(row) for row in compiled_rows(some, gpu("h100"), 3, "any")]
"""

# The real launch path up to the driver, whose launcher calls the hooks as Triton's own does.
HOOKS = """
plain = recording.RecordingDriver.launcher_cls

def hooked(self, src, metadata):
    launch = plain(self, src, metadata)
    def run(x, y, z, stream, binary, packed, data, enter, leave, *arguments):
        enter(data)
        launch(x, y, z, stream, binary, packed, data, enter, leave, *arguments)
        leave(data)
    return run

recording.RecordingDriver.launcher_cls = hooked
said = []
torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = said.append, lambda: said.append(")")
x = torch.empty(8, 64, dtype=torch.float16, device="meta")
with recording.recording(gpu("h100"), torch_device="meta"):
    with model_gpu.named_launches([Known("norm", "layer_norm_kernel", None, 0)]):
        vit_kernels.layer_norm(x)
    vit_kernels.layer_norm(x)
found["hooks"] = [said, len(knobs.runtime.launch_enter_hook.calls)]
"""


@pytest.fixture(scope="module")
def found() -> Any:
    return child.run(IMPORTS + POINTS + passes("vit_tiny_patch16_224") + HOOKS + "print(json.dumps(found))")


def test_points_have_bounds_and_models_and_no_time(found):
    one, twice, single = rows = found["rows"]
    assert [row["source"] for row in rows] == ["compiled"] * 3 and not any(row["seconds"] for row in rows)
    assert (one["run"], one["device"], one["contender"]) == (3, "H100 SXM", OURS) and "nothing was executed" in one[
        "reason"
    ]
    assert one["flops"] == 4 * 64 * 12 * 197 * 197 * 64 and one["nbytes"] == 4 * 64 * 197 * 12 * 64 * 2
    assert (
        twice["bound_s"] == pytest.approx(2 * one["bound_s"])
        and one["bound_s"] < one["modelled_s"] < twice["modelled_s"]
    )
    (code,) = one["code"]["kernels"]
    rows, columns = code["tile"].values()
    # A program has one tile of queries, or two of a head's four where its keys fit shared memory.
    assert code["programs"] == 12 * 64 * (2 if code["kernel"] == "attention_whole_kernel" else -(-197 // rows))
    assert columns >= 32
    assert code["waves"] == code["programs"] / (132 * code["ctas_per_sm"]) and 1 < code["tile_waste"] < 2
    assert code["spilled_bytes"] == 0 and 0 < code["registers"] <= 255
    assert single["modelled_s"] is None and single["bound_s"] == single["code"]["kernels"][0]["bound_s"] > 0


def compare(planned: list[str], launched: list[str], seconds: list[float]) -> None:
    assert planned == launched and len(planned) > 40
    last, *ends = seconds
    assert ends == sorted(ends) and ends[-2] == pytest.approx(last), "each begins where the one in front ends"


def test_the_plan_is_what_the_engine_launches(found):
    compare(*found["pass"])


@pytest.mark.slow
def test_the_plan_leaves_out_what_pytorch_does():
    """The pooling of SigLIP runs on PyTorch's operators."""
    compare(*child.run(IMPORTS + passes("vit_base_patch16_siglip_224") + "print(json.dumps(found['pass']))"))


def test_triton_tells_the_hooks_of_every_launch(found):
    names, left = found["hooks"]
    assert names == ["block 0", "norm: layer_norm_kernel", ")", ")"] and left == 0
