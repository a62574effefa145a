"""The machine code of the kernel whose warps have roles: each role keeps to the registers it asked for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench.child import run

pytestmark = pytest.mark.compiled

COMPILED = """
import json, re
import torch
from vit_bench.recording import gpu, recording
from vit_bench.sass import disassemble
from vit_kernels import linear

def budgets(cubin):
    "(registers asked for, highest register used, instructions, products) of the code behind each change of budget"
    found = []
    for text in disassemble(cubin):
        change = re.search(r"USETMAXREG\\.\\S+ (?:UP\\d, )?(0x[0-9a-f]+)", text)
        if change:
            found.append([int(change[1], 16), 0, 0, 0])
        elif found:
            used = [int(n) for n in re.findall(r"\\bR(\\d+)\\b", text)]
            found[-1][1] = max(found[-1][1], *used, 0)
            found[-1][2] += 1
            found[-1][3] += "HGMMA" in text
    return found

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

m, f = 12608, torch.float32
with recording(gpu("sm_90"), torch_device="meta") as recorder:
    linear(meta(m, 768), meta(3072, 768), meta(3072, dtype=f), norm="layer", stats=meta(2, 12, m, dtype=f),
           column_sum=meta(3072, dtype=f), activation="gelu")
    linear(meta(m, 3072), meta(768, 3072), meta(768), residual=meta(m, 768), layer_scale=meta(768), emit_stats=True)
print(json.dumps([
    [launch.kernel, launch.num_warps, launch.binary.resources.registers, launch.binary.resources.spilled_bytes,
     budgets(launch.binary.cubin)]
    for launch in recorder.launches
]))
"""


@pytest.fixture(scope="module")
def compiled() -> list[Any]:
    return run(COMPILED)


def test_no_role_uses_more_registers_than_it_has(compiled: list[Any]) -> None:
    """A register beyond a warp's budget belongs to another warp. ptxas keeps to the budgets by itself; this looks."""
    for kernel, warps, registers, spilled, budgets in compiled:
        assert kernel == "linear_roles_kernel" and spilled == 0
        assert all(highest < asked for asked, highest, _, _ in budgets), budgets
        multiplying = [asked for asked, _, _, products in budgets if products]
        loading = min(asked for asked, *_ in budgets)
        assert multiplying == ([224] if warps == 12 else [152] * 3)
        groups = 2 if warps == 12 else 3  # the first two go together
        assert 4 * (groups * multiplying[0] + loading) <= warps * registers, "more than the launch got"


def test_the_epilogue_takes_few_instructions_an_element(compiled: list[Any]) -> None:
    """A warp has 64 x 256 / 4 elements of a tile, 128 a thread, or 64 x 192 / 4, and 64 x 64 / 4 of a narrow one. All
    of its code, the loops over steps and tiles too, is 15 or 17 instructions for each at most. Where two warpgroups go
    together they share it."""
    for _, warps, _, _, budgets in compiled:
        copies, elements, limit = (1, 128, 15) if warps == 12 else (3, 96, 17)
        instructions = sum(count for _, _, count, products in budgets if products) / copies
        assert instructions / (elements + 32) <= limit
