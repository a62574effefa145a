"""Accelerated models repeat the launches of a pass, and never when anything about them has changed in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vit_engine
from tests.engine.stand_in import repeated
from vit_engine.dropin.api import attached_to

from .support import close, hf_vit, images, pair, reasons, timm_model, torchvision_model

pytestmark = pytest.mark.interpreted_only
__all__ = ["repeated"]

BUILDS: dict[str, Callable[..., Any]] = {
    "timm": lambda: timm_model(depth=1, proj_drop_rate=0.25),
    "torchvision": lambda: torchvision_model(num_layers=1, dropout=0.25),
}


def block_of(model: Any) -> Any:
    return model.blocks[0] if hasattr(model, "blocks") else model.encoder.layers[0]


def refused(model: nn.Module) -> dict[str, str]:
    return {name: why for attached in attached_to(model) for name, why in attached.replays.refused.items()}


@pytest.mark.parametrize("name", list(BUILDS))
@torch.no_grad()
def test_a_tensor_in_the_place_of_a_parameter_is_followed(name: str, repeated: list[str]) -> None:
    """As a hypernetwork puts it there, anew for every pass."""
    theirs, ours = pair(BUILDS[name])
    norms = [block_of(theirs).get_submodule("norm2" if name == "timm" else "ln_2")]
    norms.append(block_of(ours).get_submodule("norm2" if name == "timm" else "ln_2"))
    first = norms[0].weight.detach().clone()
    for norm in norms:
        del norm.weight
        norm.weight = first
    for _ in range(3):
        close(ours(images(1)), theirs(images(1)))
    assert repeated and not refused(ours)
    for norm in norms:
        norm.weight = -2 * first
    close(ours(images(1)), theirs(images(1)))
    first.fill_(3)
    for norm in norms:
        norm.weight = first
    close(ours(images(1)), theirs(images(1)))


@pytest.mark.parametrize("name", list(BUILDS))
def test_a_shape_seen_before_is_repeated(name: str, repeated: list[str]) -> None:
    theirs, ours = pair(BUILDS[name])
    results = [ours(images(1, seed=seed)) for seed in range(4)]
    assert repeated and not refused(ours)
    for seed, result in enumerate(results):
        close(result, theirs(images(1, seed=seed)))


def mirror(module: Any, arguments: Any, output: Tensor) -> Tensor:
    return output + output.flip(-1)


def hook_on_a_block(model: Any) -> None:
    block_of(model).register_forward_hook(mirror)


def pre_hook_on_a_block(model: Any) -> None:
    block_of(model).register_forward_pre_hook(lambda module, arguments: (-arguments[0],))


def hook_inside_a_block(model: Any) -> None:
    block_of(model).mlp.register_forward_hook(mirror)


def forward_of_a_part(model: Any) -> None:
    block_of(model).mlp.forward = lambda x: x * 0.5


def forward_of_a_block(model: Any) -> None:
    block_of(model).forward = lambda x: x + x.flip(-1)


def edit(model: Any) -> None:
    next(block_of(model).parameters()).mul_(1.5)


def another_class(model: Any) -> None:
    block_of(model).mlp.__class__ = type("Other", (type(block_of(model).mlp),), {"forward": lambda self, x: x * 0.5})


CHANGES = [
    hook_on_a_block, pre_hook_on_a_block, hook_inside_a_block, forward_of_a_part, forward_of_a_block, edit,
    another_class,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", list(BUILDS))
def test_a_change_is_never_left_out(name: str, change: Callable[[Any], None], repeated: list[str]) -> None:
    theirs, ours = pair(BUILDS[name])
    for _ in range(3):
        before = ours(images(1))
    count = repeated.count("attention_kernel")
    assert count
    for model in (theirs, ours):
        change(model)
    expected = theirs(images(1))
    assert not torch.allclose(expected, before, rtol=1e-3)
    for _ in range(3):
        close(ours(images(1)), expected)
    # Around a block as it was, hooks run every time, and its own launches may be repeated.
    assert change in (edit, hook_on_a_block, pre_hook_on_a_block) or repeated.count("attention_kernel") == count


def test_blocks_repeat_their_launches_where_the_model_does_not(repeated: list[str]) -> None:
    """Somebody's hook wants to be called: in transformers' own loop statistics are handed over from block to block, at
    other addresses each time."""
    theirs, ours = pair(hf_vit)
    for model in (theirs, ours):
        model.pooler.register_forward_hook(mirror)
    for seed in range(2):
        close(ours(images(1, seed=seed)).last_hidden_state, theirs(images(1, seed=seed)).last_hidden_state)
    assert not repeated, "the first pass of a shape runs as written, the second is noted"
    for seed in range(2, 5):
        close(ours(images(1, seed=seed)).last_hidden_state, theirs(images(1, seed=seed)).last_hidden_state)
    launched = [kernel for kernel in repeated if kernel == "attention_kernel"]
    assert len(launched) == 3 * len(ours.layers)
    with torch.inference_mode():
        close(ours(images(1)).last_hidden_state, theirs(images(1)).last_hidden_state)
    for model in (theirs, ours):
        model.layers[1].mlp.fc1.weight.data.mul_(1.5)
    vit_engine.refresh(ours)
    for _ in range(3):
        close(ours(images(1)).last_hidden_state, theirs(images(1)).last_hidden_state)


def test_a_pass_for_the_class_token_is_not_one_for_all(repeated: list[str]) -> None:
    """Of a classifier and its backbone, of logits and features: the same tokens go in, others come out."""
    theirs, ours = pair(lambda: hf_vit(transformers.ViTForImageClassification, num_labels=5))
    for _ in range(4):
        close(ours(images(1)).logits, theirs(images(1)).logits)
        close(ours.vit(images(1)).last_hidden_state, theirs.vit(images(1)).last_hidden_state)
    assert repeated and not refused(ours)
    theirs, ours = pair(timm_model)
    for _ in range(4):
        close(ours(images(1)), theirs(images(1)))
        close(ours.forward_features(images(1)), theirs.forward_features(images(1)))
    assert not refused(ours)


@pytest.mark.parametrize("name", list(BUILDS))
def test_dropout_is_never_left_out(name: str, repeated: list[str]) -> None:
    _, ours = pair(BUILDS[name])
    for _ in range(3):
        before = ours(images(1))
    count = len(repeated)
    block_of(ours).train()
    assert not torch.allclose(ours(images(1)), ours(images(1)), rtol=1e-3)
    assert len(repeated) == count
    close(ours.eval()(images(1)), before)


def test_a_hook_that_only_looks_runs_every_time(repeated: list[str]) -> None:
    _, ours = pair(BUILDS["timm"])
    for _ in range(3):
        ours(images(1))
    seen: list[Tensor] = []
    handle = ours.blocks[0].register_forward_hook(lambda module, arguments, output: seen.append(output))
    for _ in range(4):
        ours(images(1))
    assert len(seen) == 4
    handle.remove()
    count = len(repeated)
    for _ in range(3):
        ours(images(1))
    assert len(seen) == 4 and len(repeated) > count


def test_refresh_and_copies_forget_replays(repeated: list[str]) -> None:
    theirs, ours = pair(BUILDS["timm"])
    for _ in range(3):
        ours(images(1))
    other = copy.deepcopy(ours)
    for model in (theirs, ours):
        model.blocks[0].mlp.fc1.weight.data.mul_(2)
    close(vit_engine.refresh(ours)(images(1)), theirs(images(1)))
    count = len(repeated)
    other(images(1))
    assert len(repeated) == count


@pytest.mark.parametrize("name", list(BUILDS))
def test_explain_speaks_of_the_last_pass_although_it_was_repeated(name: str, repeated: list[str]) -> None:
    _, ours = pair(BUILDS[name])
    plain = reasons(ours)
    for _ in range(3):
        ours(images(1))
    with torch.autocast("cpu", torch.bfloat16):
        ours(images(1))
        assert reasons(ours) != plain
    before = len(repeated)
    ours(images(1))
    assert len(repeated) > before
    assert reasons(ours) == plain
