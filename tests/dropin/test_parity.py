"""Every family of models that accelerate() takes, small, against the untouched model."""

from __future__ import annotations

import pytest
import torch

from tests.rung import DEVICE
from vit_bench.dropin_families import FAMILIES, TIMM_MODULES, Family, timm_family, timm_names
from vit_bench.dropin_parity import compare_float32, compare_half, require_the_same

FIRST = [next(f for f in FAMILIES if f.library == library) for library in ("timm", "torchvision", "transformers")]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_float32(family: Family) -> None:
    """Logits and all hidden states within 1e-4 of the largest; every block on the kernels."""
    assert compare_float32(family, DEVICE) < 1e-4


@pytest.mark.sanitize
@pytest.mark.parametrize("family", FIRST, ids=str)
def test_float16_of_each_library(family: Family) -> None:
    compare_half(family, torch.float16, DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in FIRST], ids=str)
def test_float16(family: Family) -> None:
    """Within twice the library's own fp16 error against float64 (and two units in the last place)."""
    compare_half(family, torch.float16, DEVICE)


def test_a_pass_that_differs_from_the_first_is_named() -> None:
    first = {"logits": torch.ones(3), "pooled": torch.zeros(2)}
    require_the_same(first, lambda: dict(first))
    passes = iter([first, first, {**first, "pooled": torch.tensor([0.0, 1e-30])}])
    with pytest.raises(AssertionError, match="pooled of pass 4 is not that of the first pass"):
        require_the_same(first, lambda: next(passes))


def test_every_name_of_timm_has_a_family() -> None:
    known = {family.name for family in FAMILIES if family.library == "timm"} | {"refused"}
    for module in TIMM_MODULES:
        sorted_out = {family: timm_names(module, family) for family in known}
        import timm

        names = timm.list_models(module=module)
        assert sorted(sum(sorted_out.values(), ())) == sorted(names)
        assert all(timm_family(module, name) in known for name in names)
