"""Every kernel test that is interpreted is interpreted strictly; see strict.py."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator

import pytest

from vit_kernels import gemm_tiles
from vit_kernels.gemm_tiles import GemmTile

from ..rung import RUNG
from .strict import strict_interpreter


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    if RUNG != "interpreted":
        yield
        return
    with strict_interpreter():
        yield


@pytest.fixture
def on_sms(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, GemmTile], None]:
    """Makes launches of `linear` take a tile, on a GPU of so many SMs."""
    linear_module = importlib.import_module("vit_kernels.linear")
    device_of = linear_module.device_of

    def pretend(count: int, tile: GemmTile) -> None:
        monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: tile)
        monkeypatch.setattr(linear_module, "device_of", lambda x: dataclasses.replace(device_of(x), sm_count=count))

    return pretend
