"""The machine code of the attention whose warps have roles: registers, and what its loop over keys takes."""

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
from vit_kernels import attention

def budgets(lines):
    "(registers asked for, highest register used, products) of the code behind each change of budget"
    found = []
    # Behind the last EXIT all roles keep what they do while a barrier is not ready.
    last = max(i for i, text in enumerate(lines) if text.startswith("EXIT"))
    for text in lines[:last]:
        change = re.search(r"USETMAXREG\\.\\S+ (?:UP\\d, )?(0x[0-9a-f]+)", text)
        if change:
            found.append([int(change[1], 16), 0, 0])
        elif found:
            found[-1][1] = max(found[-1][1], *[int(n) for n in re.findall(r"\\bR(\\d+)\\b", text)], 0)
            found[-1][2] += "HGMMA" in text
    return found

def hidden(lines):
    "exponentials between each wait for all but one product and the next wait for all"
    counts, open_ = [], None
    for text in lines:
        if "WARPGROUP.DEPBAR.LE gsb0, 0x1" in text:
            open_ = 0
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in text and open_ is not None:
            counts.append(open_)
            open_ = None
        elif open_ is not None:
            open_ += "MUFU.EX2" in text
    return counts

found = []
for dtype in (torch.bfloat16, torch.float16):
    for tokens in (577, 1025, 553):
        qkv = torch.empty(64, tokens, 3, 12, 64, dtype=dtype, device="meta")
        with recording(gpu("sm_90"), torch_device="meta") as recorder:
            attention(*qkv.unbind(2))
        (launch,) = recorder.launches
        lines = disassemble(launch.binary.cubin)
        resources = launch.binary.resources
        found.append([launch.kernel, launch.num_warps, resources.registers, resources.spilled_bytes, budgets(lines),
                      hidden(lines)])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled() -> list[Any]:
    return run(COMPILED)


def test_no_role_uses_more_registers_than_it_has(compiled: list[Any]) -> None:
    for kernel, warps, registers, spilled, budgets, _ in compiled:
        assert kernel == "attention_roles_kernel" and spilled == 0
        assert all(highest < asked for asked, highest, _ in budgets), budgets
        multiplying = [asked for asked, _, products in budgets if products]
        loading = min(asked for asked, *_ in budgets)
        assert multiplying == [160] * 3
        assert 4 * (sum(multiplying) + loading) <= warps * registers, "more than the launch got"


def test_exponentials_stand_between_two_waits(compiled: list[Any]) -> None:
    """All 64 of a thread and block, and those of a new maximum, while the product of the block before is under way."""
    for *_, hidden in compiled:
        assert hidden.count(66) == 3 and min(hidden) >= 4, hidden
