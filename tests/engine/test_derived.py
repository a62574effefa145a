"""Derived tensors are kept while their sources stay what they are, and made anew when they do not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vit_engine.derived import SIZES, DerivedCache
from vit_engine.fingerprint import Fingerprint


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


# Fused steps write without touching version counters.
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD, fused": lambda weights: torch.optim.SGD(weights, lr=0.5, fused=True),
    "Adam, fused": lambda weights: torch.optim.Adam(weights, lr=0.5, fused=True),
    "AdamW, fused": lambda weights: torch.optim.AdamW(weights, lr=0.5, fused=True),
    "Adagrad, fused": lambda weights: torch.optim.Adagrad(weights, lr=0.5, fused=True),
    "SGD, one by one": lambda weights: torch.optim.SGD(weights, lr=0.5, foreach=False),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen before and after"])
def test_steps_are_seen(optimizer: str, frozen: bool) -> None:
    layer = nn.Linear(2, 2).requires_grad_(not frozen)
    doubled = Counted(layer)
    before, known = doubled().clone(), Fingerprint(layer)
    layer.requires_grad_(True).weight.grad = torch.ones(2, 2)
    OPTIMIZERS[optimizer]([layer.weight]).step()
    layer.requires_grad_(not frozen)
    assert not known.holds()
    assert torch.equal(doubled(), layer.weight * 2) and not torch.equal(doubled(), before)


def test_steps_on_weights_of_inference_mode_raise_nothing() -> None:
    with torch.inference_mode():
        weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight, nn.Parameter(torch.ones(2))], lr=0.5)
    optimizer.param_groups[0]["params"][1].grad = torch.ones(2)
    optimizer.step()


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


@pytest.mark.parametrize("compiled", [False, True], ids=["kept", "while a graph is traced"])
def test_autocast_rests_while_something_is_built(compiled: bool) -> None:
    layer, cache = nn.Linear(4, 4), DerivedCache()

    def derive() -> Tensor:
        return cache.get("product", [layer.weight], lambda: (layer.weight @ layer.weight,))[0]

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = torch.compile(derive, backend="eager", fullgraph=True)() if compiled else derive()
    assert found.dtype == torch.float32 and torch.equal(found, layer.weight @ layer.weight)
    assert compiled or derive() is found


def test_nothing_is_kept_while_functions_are_transformed() -> None:
    cache, weight = DerivedCache(), torch.ones(2)

    def derive(source: Tensor) -> Tensor:
        return cache.get("doubled", [source], lambda: (source * 2,))[0]

    derive(weight)
    tangent = torch.func.jvp(derive, (weight,), (weight,))[1]
    assert torch.equal(tangent, weight * 2)
    assert torch.equal(torch.func.vmap(derive)(weight[:, None]), torch.full((2, 1), 2.0))
    assert torch.equal(derive(weight), weight * 2) and cache.nbytes() == 8


def test_on_the_meta_device() -> None:
    doubled = Counted(nn.Linear(2, 2, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert doubled().is_meta


def test_of_sizes_the_last_ones_are_kept() -> None:
    cache, weight = DerivedCache(), torch.ones(1)

    def derive(key: str, size: int) -> Tensor:
        return cache.get(key, [weight], lambda: (weight.repeat(size),), size)[0]

    first, other = derive("it", 1), derive("another", 1)
    for size in range(2, 2 * SIZES):
        assert derive("it", size).shape == (size,)
        assert derive("it", 1) is first
    assert derive("another", 1) is other, "every key has room of its own"
    assert cache.nbytes() == 4 * (1 + 1 + sum(range(SIZES + 1, 2 * SIZES)))
    weight.add_(1)
    assert torch.equal(derive("it", 1), weight)
    cache.clear()
    assert cache.nbytes() == 0


def test_bytes_and_copies() -> None:
    doubled = Counted(nn.Linear(2, 2))
    assert doubled.cache.nbytes() == 0
    doubled()
    assert doubled.cache.nbytes() == 16
    for other in (copy.deepcopy(doubled.cache), pickle.loads(pickle.dumps(doubled.cache))):
        assert other.nbytes() == 0
