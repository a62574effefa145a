"""Every kernel in every dtype on the GPU: its named cases, and every tile that a preset model gets on this GPU."""

from __future__ import annotations

import pytest

from vit_bench.full.checks import DTYPES
from vit_bench.full.parts import parts_of
from vit_bench.records import KERNELS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["cases", "tiles"])
def test_kernel(kind: str, kernel: str, dtype: str) -> None:
    work = parts_of(f"{kind}/{kernel}/{dtype}")
    assert work
    for part in work:
        figures = part.run()  # raises with the figures where a result is wrong
        assert 0 <= figures["row"] <= figures["row_allowed"], part.name
