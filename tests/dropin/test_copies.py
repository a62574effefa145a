"""Copies, pickles, restore(), and accelerating twice."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import vit_engine
from vit_engine.dropin.api import attached_to

from .support import ALL, close, images, launches_of, pair, timm_model

pytestmark = pytest.mark.interpreted_only


def own_attributes(model: nn.Module) -> list[set[str]]:
    return [set(vars(part)) for part in model.modules()]


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", list(COPIES))
@torch.no_grad()
def test_copies_are_accelerated_and_independent(how: str) -> None:
    theirs, ours = pair(timm_model, depth=1)
    close(ours(images(1)), theirs(images(1)))
    other = COPIES[how](ours)
    mine, its = list(attached_to(ours)), list(attached_to(other))
    assert len(mine) == len(its) > 2
    assert not {id(a) for a in mine} & {id(a) for a in its}
    parts = {id(part) for part in other.modules()}
    assert all(id(a.module) in parts for a in its)
    assert len({id(a.state) for a in its}) == 1 and its[0].state is not mine[0].state
    close(other(images(1)), theirs(images(1)))
    assert launches_of(lambda: other(images(1))) == launches_of(lambda: ours(images(1)))
    other.blocks[0].norm2.bias.add_(1)
    close(ours(images(1)), theirs(images(1)))
    theirs.blocks[0].norm2.bias.add_(1)
    close(other(images(1)), theirs(images(1)))


@torch.no_grad()
def test_a_copy_keeps_fold() -> None:
    ours = vit_engine.accelerate(timm_model(depth=1), fold=False)
    other = copy.deepcopy(ours)
    other(images(1))
    assert vit_engine.explain(other).nbytes == 0


@pytest.mark.parametrize("name", list(ALL))
def test_restore_leaves_nothing_behind(name: str) -> None:
    model = ALL[name]()
    before = own_attributes(model)
    vit_engine.accelerate(model)
    with torch.no_grad():
        model(images(1))
    assert own_attributes(model) != before
    assert vit_engine.restore(model) is model
    assert own_attributes(model) == before
    with torch.no_grad():
        assert launches_of(lambda: model(images(1))) == []


def test_accelerating_twice_is_accelerating_once() -> None:
    theirs, ours = pair(timm_model, depth=1)
    first = {(type(a), a.name) for a in attached_to(ours)}
    assert vit_engine.accelerate(ours, fold=False) is ours
    assert {(type(a), a.name) for a in attached_to(ours)} == first
    with torch.no_grad():
        close(ours(images(1)), theirs(images(1)))
    assert vit_engine.explain(ours).nbytes == 0
    vit_engine.restore(ours)
    assert not list(attached_to(ours))


def test_restore_of_what_was_never_accelerated() -> None:
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert vit_engine.restore(layer) is layer
    assert "forward" in vars(layer)


@pytest.mark.parametrize("name", list(ALL))
def test_methods_look_like_the_librarys(name: str) -> None:
    theirs, ours = pair(ALL[name])
    for a, b in zip(ours.modules(), theirs.modules(), strict=True):
        for method in ("forward", "forward_features"):
            if hasattr(b, method):
                mine, its = getattr(a, method), getattr(b, method)
                assert inspect.signature(mine) == inspect.signature(its)
                assert (mine.__name__, mine.__code__) == (its.__name__, its.__code__)


def test_a_part_of_a_larger_model() -> None:
    """The model may lie inside another, be taken out of it, and be accelerated from there."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm_model(depth=1, num_classes=0)
            self.boxes = nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.boxes(self.backbone(x))

    theirs, ours = pair(Detector)
    with torch.no_grad():
        close(ours(images(1)), theirs(images(1)))
        assert "backbone.blocks.0" in {row.module for row in vit_engine.explain(ours).rows}
        close(ours.backbone(images(1)), theirs.backbone(images(1)))
        assert "mlp" in launches_of(lambda: ours(images(1)))
    vit_engine.restore(ours.backbone)
    assert not list(attached_to(ours))


@torch.no_grad()
def test_restoring_a_shallow_copy_leaves_the_original_its_own() -> None:
    theirs, ours = pair(timm_model, depth=1)
    twin = vit_engine.restore(copy.copy(ours))
    assert not {"forward", "forward_features"} & set(vars(twin))
    assert {"forward", "forward_features"} <= set(vars(ours))
    close(twin(images(1)), theirs(images(1)))
    close(ours(images(1)), theirs(images(1)))
    assert not list(attached_to(vit_engine.restore(ours)))
