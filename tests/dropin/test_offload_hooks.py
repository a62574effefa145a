"""Hooks of Hugging Face accelerate around accelerated parts: they put forward() away and call it from there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import vit_engine
from vit_engine.dropin.api import attached_to

from .support import close, hf_vit, images, kernels, launches_of, timm_model, torchvision_model

pytestmark = pytest.mark.interpreted_only

BUILDS: dict[str, Callable[..., Any]] = {
    "timm": lambda: timm_model(depth=2),
    "torchvision": lambda: torchvision_model(num_layers=2),
    "transformers": lambda: hf_vit(num_hidden_layers=2),
}


def hooked(model: Any) -> Any:
    for part in list(model.modules()):
        add_hook_to_module(part, ModelHook())
    return model


@pytest.mark.parametrize("name", list(BUILDS))
@torch.no_grad()
def test_parts_run_on_the_kernels_are_explained_and_restored(name: str) -> None:
    theirs = BUILDS[name]()
    ours, x = vit_engine.accelerate(copy.deepcopy(theirs)), images(1)
    expected = theirs(x)
    block = next(part for part, what in kernels(ours).items() if part.endswith("0"))
    hooked(ours)
    close(ours(x), expected)
    # What is inside a block has a forward() of its own now, so blocks run the original, and explain() can say so.
    assert block not in kernels(ours) and vit_engine.explain(ours).rows
    remove_hook_from_module(ours, recurse=True)
    close(ours(x), expected)
    hooked(ours)
    vit_engine.restore(ours)
    assert not list(attached_to(ours)) and launches_of(lambda: ours(x)) == []
    remove_hook_from_module(ours, recurse=True)
    close(ours(x), expected)
    assert not list(attached_to(ours)) and launches_of(lambda: ours(x)) == []


@torch.no_grad()
def test_blocks_hooked_as_a_whole_stay_on_the_kernels() -> None:
    theirs, x = timm_model(depth=2), images(1)
    ours: Any = vit_engine.accelerate(copy.deepcopy(theirs))
    before = vit_engine.explain(ours).rows
    for block in ours.blocks:
        add_hook_to_module(block, ModelHook())
    close(ours(x), theirs(x))
    assert launches_of(lambda: ours(x)).count("attention") == 2
    assert vit_engine.explain(ours).rows == before
