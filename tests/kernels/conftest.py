"""Every kernel test that is interpreted is interpreted strictly; see strict.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..rung import RUNG
from .strict import strict_interpreter


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    if RUNG != "interpreted":
        yield
        return
    with strict_interpreter():
        yield
