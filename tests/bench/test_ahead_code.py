"""The machine code of launches that ask for their weights ahead: before they wait for the launch in front of them."""

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
from vit_kernels import linear, patch_embed

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

found = []
for name in ("sm_80", "sm_90"):
    with recording(gpu(name), torch_device="meta") as recorder:
        for rows in (197, 12608):
            linear(meta(rows, 768), meta(768, 768))
        linear(meta(197, 768), meta(4096, 768), activation="swiglu")
        linear(meta(197, 768), meta(768, 800)[:, :768])
        linear(meta(197, 768, dtype=torch.float32), meta(768, 768, dtype=torch.float32))
        patch_embed(meta(1, 3, 32, 32), meta(768, 3, 16, 16))
    for launch in recorder.launches:
        order = [re.search(r"CCTL\\.E\\.PF2|ACQBULK", text) for text in disassemble(launch.binary.cubin)]
        seen = [match[0] for match in order if match]
        found.append([name, launch.kernel, "CCTL.E.PF2" in seen[:1], seen.count("ACQBULK"), seen[-1:]])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled() -> list[Any]:
    return run(COMPILED)


def test_weights_are_asked_for_before_the_wait_and_only_there(compiled: list[Any]) -> None:
    kernels = ["linear_tma_kernel", "linear_roles_kernel", "linear_tma_kernel", "linear_tma_kernel", "linear_kernel"]
    expected = [["sm_80", kernel, False, 0, []] for kernel in ["linear_kernel"] * 5 + ["patch_embed_kernel"]]
    for number, kernel in enumerate([*kernels, "patch_embed_kernel"]):
        # The fourth product's weights are a slice of wider ones. Where warps have roles, those wait that load: beside
        # 256 columns all do.
        waits = 3 if "roles" in kernel else 1
        expected.append(["sm_90", kernel, number != 3, waits, ["ACQBULK"]])
    assert compiled == expected
