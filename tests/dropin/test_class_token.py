"""Models whose head reads the class token alone: the last block computes no other, and nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import timm.models.deit
import torch
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn

import vit_engine
from vit_engine.dropin import parts

from .support import close, images, kernels, pair, ready, timm_model, torchvision_model

pytestmark = pytest.mark.interpreted_only

ALONE = "class token alone behind the attention of the last block"
BUILDERS: dict[str, Callable[..., Any]] = {"timm": timm_model, "torchvision": torchvision_model}


def distilled(**more: Any) -> Any:
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7, **more}
    return ready(timm.models.deit.VisionTransformerDistilled(**given))


def tokens_behind(run: Callable[[], Tensor]) -> tuple[Tensor, list[int]]:
    """What run() returns, and how many tokens an image come out of each block of a chain."""
    seen: list[int] = []

    def note(self: parts.FusedBlock, *given: Any) -> Any:
        found = step(self, *given)
        seen.append(found[0].shape[1])
        return found

    step = parts.FusedBlock.step
    with mock.patch.object(parts.FusedBlock, "step", note):
        return run(), seen


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_one_token_comes_out_of_the_last_block(name: str) -> None:
    theirs, ours = pair(BUILDERS[name])
    logits, seen = tokens_behind(lambda: ours(images()))
    close(logits, theirs(images()))
    assert seen == [17, 1]


def pooled_by_attention_after_all() -> Any:
    model = timm_model()
    model.attn_pool = ready(AttentionPoolLatent(32, num_heads=2))
    return model


OTHERS: dict[str, Callable[[], Any]] = {
    "mean of the patches": lambda: timm_model(global_pool="avg"),
    "attention pooling": lambda: timm_model(global_pool="map", class_token=False),
    "attention pooling put in later": pooled_by_attention_after_all,
    "a token of distillation": distilled,
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_heads_that_read_more_get_more(name: str) -> None:
    theirs, ours = pair(OTHERS[name])
    logits, seen = tokens_behind(lambda: ours(images()))
    close(logits, theirs(images()))
    assert len(seen) == 2 and min(seen) >= 16 and ALONE not in kernels(ours).values()


@torch.no_grad()
def test_other_entry_points_have_all_tokens() -> None:
    theirs, ours = pair(timm_model)
    features, seen = tokens_behind(lambda: ours.forward_features(images()))
    close(features, theirs.forward_features(images()))
    assert seen == [17, 17]
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    close(ours(images(), attn_mask=mask), theirs(images(), attn_mask=mask))
    assert tokens_behind(lambda: ours(x=images()))[1] == [17, 1]


def hooked_block(model: Any, seen: list[Any]) -> None:
    model.blocks[-1].register_forward_hook(lambda _module, _given, y: seen.append(y.shape[1]))


def hooked_norm(model: Any, seen: list[Any]) -> None:
    model.norm.register_forward_hook(lambda _module, _given, y: seen.append(y.shape[1]))


def own_pool(model: Any, seen: list[Any]) -> None:
    def pool(x: Tensor, pool_type: str | None = None) -> Tensor:
        seen.append(x.shape[1])
        return x.mean(1)

    model.pool = pool


def own_head(model: Any, seen: list[Any]) -> None:
    def forward_head(x: Tensor, pre_logits: bool = False) -> Tensor:
        seen.append(x.shape[1])
        return model.head(x.mean(1))

    model.forward_head = forward_head


def own_features(model: Any, seen: list[Any]) -> None:
    original = type(model).forward_features.__get__(model)

    def forward_features(x: Tensor, **given: Any) -> Tensor:
        y = original(x, **given)
        seen.append(y.shape[1])
        return y.flip(1)

    model.forward_features = forward_features


@pytest.mark.parametrize("change", [hooked_block, hooked_norm, own_pool, own_head, own_features])
@torch.no_grad()
def test_whoever_looks_at_the_tokens_sees_all_of_them(change: Callable[[Any, list[Any]], None]) -> None:
    theirs, ours = pair(timm_model)
    ours(images())
    theirs_saw: list[int] = []
    ours_saw: list[int] = []
    change(theirs, theirs_saw)
    if change is own_features:
        vit_engine.restore(ours)
        change(ours, ours_saw)
        vit_engine.accelerate(ours)
    else:
        change(ours, ours_saw)
    for _ in range(3):
        close(ours(images()), theirs(images()))
    assert ours_saw == theirs_saw == [17] * 3


@torch.no_grad()
def test_hooks_of_the_head_and_a_new_head_are_seen() -> None:
    theirs, ours = pair(timm_model)
    for model in (theirs, ours):
        model.head.register_forward_hook(lambda _module, _given, y: 2 * y)
    close(ours(images()), theirs(images()))
    for model in (theirs, ours):
        torch.manual_seed(0)
        model.reset_classifier(5, "avg")
    logits, seen = tokens_behind(lambda: ours(images()))
    close(logits, theirs(images()))
    assert seen == [17, 17]


@torch.no_grad()
def test_explain_says_so() -> None:
    _, ours = pair(timm_model)
    assert kernels(ours)["the model"] == ALONE
    ours.blocks.register_forward_hook(lambda *_: None)
    assert "the model" not in kernels(ours)
    inside = nn.Sequential(timm_model())
    assert kernels(vit_engine.accelerate(inside))["0"] == ALONE


def test_training_is_the_librarys_own() -> None:
    theirs, ours = pair(timm_model)
    for model in (theirs, ours):
        model.train()
        model(images()).sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.grad, b.grad)
