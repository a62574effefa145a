"""The machine code of the kernels whose warps have roles: each role keeps to the registers it asked for."""

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
    "(registers asked for, highest used, instructions, products, most between two) behind each change of budget"
    found = []
    for text in disassemble(cubin):
        change = re.search(r"USETMAXREG\\.\\S+ (?:UP\\d, )?(0x[0-9a-f]+)", text)
        if change:
            found.append([int(change[1], 16), 0, 0, 0, 0])
            since = 0
        elif found:
            used = [int(n) for n in re.findall(r"\\bR(\\d+)\\b", text)]
            found[-1][1] = max(found[-1][1], *used, 0)
            found[-1][2] += 1
            since += 1
            if "HGMMA" in text:
                if found[-1][3]:
                    found[-1][4] = max(found[-1][4], since)
                found[-1][3] += 1
                since = 0
    return found

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

m, f = 12608, torch.float32
with recording(gpu("sm_90"), torch_device="meta") as recorder:
    linear(meta(m, 768), meta(3072, 768), meta(3072, dtype=f), norm="layer", stats=meta(2, 12, m, dtype=f),
           column_sum=meta(3072, dtype=f), activation="gelu")
    linear(meta(m, 3072), meta(768, 3072), meta(768), residual=meta(m, 768), layer_scale=meta(768), emit_stats=True)
    linear(meta(m, 384), meta(384, 384), meta(384), residual=meta(m, 384), layer_scale=meta(384), emit_stats=True)
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
    for kernel, warps, registers, spilled, budgets in compiled[:2]:
        assert kernel == "linear_roles_kernel" and spilled == 0
        # Behind the last change stand loops of waits that ptxas moved out of all roles.
        assert all(highest < asked for asked, highest, *_ in budgets[:-1]), budgets
        assert budgets[-1][2] < 100
        multiplying = [asked for asked, _, _, products, _ in budgets if products]
        # 256: what Triton gives its first warps before the roles and behind them.
        others = {n for n, _, count, products, _ in budgets if count > 100 and not products} - {256}
        assert multiplying == [multiplying[0]] * 2 and len(others) == 1 and warps == 12
        assert 4 * (2 * multiplying[0] + others.pop()) <= warps * registers, "more than the launch got"


def test_where_weights_stay_none_does_either(compiled: list[Any]) -> None:
    """Two multiplying warpgroups, two finishing ones, and two warps that load, which Triton counts as a warpgroup."""
    kernel, warps, registers, spilled, budgets = compiled[2]
    assert kernel == "linear_staying_kernel" and spilled == 0 and warps == 20
    assert all(highest < asked for asked, highest, *_ in budgets[:-1]), budgets
    multiplying = [asked for asked, _, _, products, _ in budgets if products]
    assert sorted(multiplying) == [96, 104]
    assert 4 * (sum(multiplying) + 2 * 112 + 56) <= warps * registers, "more than the launch got"


def test_between_two_products_there_are_few_instructions(compiled: list[Any]) -> None:
    """A thread hands over 128 sums of a tile of 256 columns: from the last product of a tile to the first of the next
    there are three to four instructions for each, with those that find the next tile and load for it, and none of what
    finishes them: a GELU alone would be ten."""
    for _, _, _, _, budgets in compiled[:2]:
        for between in (b for *_, products, b in budgets if products):
            assert between <= 4 * 128
