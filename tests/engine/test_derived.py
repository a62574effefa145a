"""Derived tensors are kept while their sources stay what they are, and made anew when they do not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vit_engine.derived import DerivedCache


class Counted:
    """Doubles the weight of a layer through a cache, and counts how often it had to."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.cache = DerivedCache()
        self.built = 0

    def _build(self) -> tuple[Tensor, ...]:
        self.built += 1
        return (self.layer.weight * 2,)

    def __call__(self) -> Tensor:
        return self.cache.get("doubled", [self.layer.weight, None], self._build)[0]


def add(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.add_(1)


def replace(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn(2, 2))


def replace_data(layer: nn.Linear) -> None:
    layer.weight.data = torch.randn(2, 2)


def convert(layer: nn.Linear) -> None:
    layer.half()


def load(layer: nn.Linear) -> None:
    layer.load_state_dict(nn.Linear(2, 2).state_dict())


def transpose(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data.t()


@pytest.mark.parametrize("change", [add, replace, replace_data, convert, load, transpose], ids=lambda f: f.__name__)
def test_changes_are_seen(change: Callable[[nn.Linear], None]) -> None:
    doubled = Counted(nn.Linear(2, 2))
    first = doubled()
    assert doubled() is first and doubled.built == 1 and not first.requires_grad
    change(doubled.layer)
    assert torch.equal(doubled(), doubled.layer.weight * 2) and doubled.built == 2
    doubled()
    assert doubled.built == 2


def test_inference_tensors_are_known_by_their_address() -> None:
    with torch.inference_mode():
        doubled = Counted(nn.Linear(2, 2))
        first = doubled()
        assert doubled() is first and doubled.built == 1
        doubled.layer.weight.add_(1)
        assert doubled() is first, "no counter tells of this change"
        doubled.cache.clear()
        assert torch.equal(doubled(), doubled.layer.weight * 2) and doubled.built == 2
        doubled.layer.weight = nn.Parameter(torch.randn(2, 2))
        assert torch.equal(doubled(), doubled.layer.weight * 2) and doubled.built == 3


def test_what_was_built_in_inference_mode_serves_outside() -> None:
    doubled = Counted(nn.Linear(2, 2))
    with torch.inference_mode():
        derived = doubled()
    assert not derived.is_inference() and doubled() is derived


def test_data_edits_need_clear() -> None:
    doubled = Counted(nn.Linear(2, 2))
    doubled()
    doubled.layer.weight.data.add_(1)
    assert doubled.built == 1 and not torch.equal(doubled(), doubled.layer.weight * 2)
    doubled.cache.clear()
    assert torch.equal(doubled(), doubled.layer.weight * 2)


def test_bytes_and_copies() -> None:
    doubled = Counted(nn.Linear(2, 2))
    assert doubled.cache.nbytes() == 0
    doubled()
    assert doubled.cache.nbytes() == 16
    for other in (copy.deepcopy(doubled.cache), pickle.loads(pickle.dumps(doubled.cache))):
        assert other.nbytes() == 0
