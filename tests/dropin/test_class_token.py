"""Models whose head reads the class token alone: the last block computes no other, and nobody can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import timm.models.deit
import torch
import transformers
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn

import vit_engine
from vit_engine.dropin import parts

from .support import (
    close,
    close_gradients,
    hf_dinov2,
    hf_vit,
    images,
    kernels,
    pair,
    ready,
    timm_model,
    torchvision_model,
)

pytestmark = pytest.mark.interpreted_only

ALONE = "class token alone behind the attention of the last block"


def hf_classifier(model: Any = transformers.ViTForImageClassification) -> Any:
    return hf_vit(model, num_labels=5)


def hf_deit() -> Any:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.DeiTConfig(image_size=32, patch_size=8, num_labels=5, **small)  # type: ignore[arg-type]
    return ready(transformers.DeiTForImageClassification(config))


# Tokens of an image, by who builds the model.
BUILDERS: dict[str, tuple[Callable[..., Any], int]] = {
    "timm": (timm_model, 17),
    "torchvision": (torchvision_model, 17),
    "transformers' ViT": (hf_classifier, 17),
    "transformers' DeiT": (hf_deit, 18),
}


def distilled(**more: Any) -> Any:
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7, **more}
    return ready(timm.models.deit.VisionTransformerDistilled(**given))


def tokens_behind(run: Callable[[], Any]) -> tuple[Any, list[int]]:
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
    build, tokens = BUILDERS[name]
    theirs, ours = pair(build)
    for _ in range(2):
        found, seen = tokens_behind(lambda: ours(images()))
        close(found, theirs(images()))
        assert seen == [tokens, 1]


def pooled_by_attention_after_all() -> Any:
    model = timm_model()
    model.attn_pool = ready(AttentionPoolLatent(32, num_heads=2))
    return model


OTHERS: dict[str, Callable[[], Any]] = {
    "mean of the patches": lambda: timm_model(global_pool="avg"),
    "attention pooling": lambda: timm_model(global_pool="map", class_token=False),
    "attention pooling put in later": pooled_by_attention_after_all,
    "a token of distillation": distilled,
    "transformers' backbone": hf_vit,
    "transformers' DINOv2, which reads the patches too": lambda: hf_dinov2(
        transformers.Dinov2ForImageClassification, num_labels=5
    ),
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


def hooked_layer(model: Any, seen: list[Any]) -> None:
    model.vit.layers[-1].register_forward_hook(lambda _module, _given, y: seen.append(y.shape[1]))


def hooked_last_norm(model: Any, seen: list[Any]) -> None:
    model.vit.layernorm.register_forward_pre_hook(lambda _module, given: seen.append(given[0].shape[1]))


def hooked_backbone(model: Any, seen: list[Any]) -> None:
    model.vit.register_forward_hook(lambda _module, _given, y: seen.append(y.last_hidden_state.shape[1]))


def own_norm(model: Any, seen: list[Any]) -> None:
    original = type(model.vit.layernorm).forward.__get__(model.vit.layernorm)

    def forward(x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return original(x)

    model.vit.layernorm.forward = forward


@pytest.mark.parametrize("change", [hooked_layer, hooked_last_norm, hooked_backbone, own_norm])
@torch.no_grad()
def test_whoever_looks_at_the_tokens_of_transformers_sees_all_of_them(
    change: Callable[[Any, list[Any]], None],
) -> None:
    theirs, ours = pair(hf_classifier)
    ours(images())
    theirs_saw: list[int] = []
    ours_saw: list[int] = []
    change(theirs, theirs_saw)
    change(ours, ours_saw)
    for _ in range(3):
        close(ours(images()), theirs(images()))
    assert ours_saw == theirs_saw == [17] * 3


class Centred(nn.Module):
    """A norm that looks at several tokens at once."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x - x.mean(1, keepdim=True))


def last_norm_of_timm(model: Any) -> None:
    model.norm = Centred(model.norm)


def last_norm_of_transformers(model: Any) -> None:
    body(model).layernorm = Centred(body(model).layernorm)


def norm_over_all_tokens(model: Any) -> None:
    model.norm = nn.LayerNorm([17, 32])


@pytest.mark.parametrize(
    ("build", "change"),
    [(timm_model, last_norm_of_timm), (timm_model, norm_over_all_tokens), (hf_classifier, last_norm_of_transformers)],
)
@torch.no_grad()
def test_a_last_norm_that_looks_at_several_tokens_gets_all(
    build: Callable[..., Any], change: Callable[[Any], None]
) -> None:
    theirs, ours = pair(build)
    close(ours(images()), theirs(images()))
    for model in (theirs, ours):
        change(model)
    close(ours(images()), theirs(images()))
    assert ALONE not in kernels(ours).values()


@torch.no_grad()
def test_what_is_asked_of_transformers_beside_the_logits_is_of_all_tokens() -> None:
    theirs, ours = pair(hf_classifier)
    more: dict[str, Any]
    for more, tokens in (
        ({"output_hidden_states": True}, [17, 17]),
        ({"attention_mask": torch.ones(2, 17).tril(14)}, [17, 17]),
        ({"labels": torch.tensor([1, 2])}, [17, 1]),
        ({"return_dict": False}, [17, 1]),
    ):
        found, seen = tokens_behind(lambda more=more: ours(images(), **more))
        close(found, theirs(images(), **more))
        assert seen == tokens, more
    assert tokens_behind(lambda: ours.vit(images()))[1] == [17, 17], "the backbone by itself has all of them"
    pooler = hf_classifier()
    pooler.vit = ready(transformers.ViTModel(pooler.config, add_pooling_layer=True))
    assert tokens_behind(lambda: vit_engine.accelerate(pooler)(images()))[1] == [17, 17]


def shared_before(model: Any) -> Any:
    body(model).layers[0] = body(model).layers[-1]
    return vit_engine.accelerate(copy.deepcopy(model))


def shared_after(model: Any) -> Any:
    ours = vit_engine.accelerate(copy.deepcopy(model))
    for changed in (model, ours):
        body(changed).layers[0] = body(changed).layers[-1]
    return ours


def body(classifier: Any) -> Any:
    return getattr(classifier, classifier.base_model_prefix)


@pytest.mark.parametrize("share", [shared_before, shared_after])
@pytest.mark.parametrize("build", [hf_classifier, hf_deit])
@torch.no_grad()
def test_a_last_layer_that_stands_elsewhere_too_computes_all_tokens(
    build: Callable[[], Any], share: Callable[[Any], Any]
) -> None:
    theirs = build()
    ours = share(theirs)
    close(ours(images()), theirs(images()))
    assert ALONE not in kernels(ours).values()


def test_gradients_of_transformers_are_those_of_all_tokens() -> None:
    theirs, ours = pair(hf_classifier)
    for model in (theirs, ours):
        model(images()).logits.square().sum().backward()
    close_gradients(ours, theirs)


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
    inside = nn.Sequential(timm_model(), hf_classifier())
    found = kernels(vit_engine.accelerate(inside))
    assert found["0"] == found["1"] == ALONE
    backbone: Any = inside[1].vit
    backbone.register_forward_hook(lambda *_: None)
    assert "1" not in kernels(inside)


def test_training_is_the_librarys_own() -> None:
    theirs, ours = pair(timm_model)
    for model in (theirs, ours):
        model.train()
        model(images()).sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.grad, b.grad)
