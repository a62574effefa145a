"""Everything that timm's models can do beside forward(), after acceleration as before it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import vit_engine
from vit_engine import derived

from .support import close, differs, eva, images, kernels, launches_of, pair, ready, reasons, timm_model

pytestmark = pytest.mark.interpreted_only

INTERMEDIATES = {
    "default": {},
    "prefix tokens": {"indices": [0], "return_prefix_tokens": True, "norm": True},
    "stop early": {"indices": [0], "stop_early": True, "intermediates_only": True, "output_fmt": "NLC"},
    "dictionary": {"output_dict": True, "return_prefix_tokens": True, "indices": 1},
}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """With registers and LayerScale; not to be changed."""
    return pair(timm_model, reg_tokens=2, init_values=0.5)


@torch.no_grad()
def test_features_and_head(models: tuple[Any, Any]) -> None:
    theirs, ours = models
    x = images()
    features = ours.forward_features(x)
    close(features, theirs.forward_features(x))
    close(ours.forward_head(features), theirs(x))
    close(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))


@pytest.mark.parametrize("name", list(INTERMEDIATES))
@torch.no_grad()
def test_intermediates(name: str, models: tuple[Any, Any]) -> None:
    theirs, ours = models
    x, given = images(1), INTERMEDIATES[name]
    close(ours.forward_intermediates(x, **given), theirs.forward_intermediates(x, **given))
    blocks = 1 if "stop" in name else 2
    assert launches_of(lambda: ours.forward_intermediates(x, **given)).count("attention") == blocks


@torch.no_grad()
def test_intermediate_layers(models: tuple[Any, Any]) -> None:
    theirs, ours = models
    given: dict[str, Any] = {"n": 2, "reshape": True, "return_prefix_tokens": True, "norm": True}
    close(ours.get_intermediate_layers(images(1), **given), theirs.get_intermediate_layers(images(1), **given))


@torch.no_grad()
def test_masks_and_causal_attention(models: tuple[Any, Any]) -> None:
    theirs, ours = models
    x, tokens = images(1), 2 + 1 + 16
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().to(x.device)
    bias = torch.randn(1, 1, tokens, tokens, generator=torch.Generator().manual_seed(1)).to(x.device)
    plain = theirs.forward_features(x)
    for given in ({"attn_mask": mask}, {"attn_mask": bias}, {"is_causal": True}):
        expected = theirs.forward_features(x, **given)
        # No tolerance: that it matters at all, far beyond rounding.
        assert differs(expected, plain)
        close(ours.forward_features(x, **given), expected)
        launches = launches_of(lambda given=given: ours.blocks[0](plain, **given))
        assert launches == ["row_stats", "linear", "attention", "linear", "mlp"]
    close(ours(x), theirs(x))


@torch.no_grad()
def test_reset_classifier() -> None:
    theirs, ours = pair(timm_model, depth=1)
    ours(images(1))
    for model in (theirs, ours):
        torch.manual_seed(0)
        model.reset_classifier(3, global_pool="avg")
    assert ours(images(1)).shape == (1, 3)
    close(ours(images(1)), theirs(images(1)))
    for model in (theirs, ours):
        model.reset_classifier(0, global_pool="")
    close(ours(images(1)), theirs(images(1)))


@torch.no_grad()
def test_set_input_size() -> None:
    theirs, ours = pair(timm_model, depth=1)
    ours(images(1))
    for given in ({"img_size": (24, 40)}, {"img_size": (32, 48), "patch_size": (16, 16)}, {"img_size": (64, 96)}):
        for model in (theirs, ours):
            model.set_input_size(**given)
        x = images(1, given["img_size"])
        close(ours(x), theirs(x))
        assert "patch_embed" in launches_of(lambda x=x: ours(x))
    with pytest.raises(ValueError, match=r"\(64, 96\) pixels"):
        ours(images(1, 32))


@torch.no_grad()
def test_dynamic_image_size() -> None:
    theirs, ours = pair(timm_model, depth=1, dynamic_img_size=True, no_embed_class=True)
    for size in ((32, 32), (16, 48), (40, 24), (16, 48)):
        close(ours(images(1, size)), theirs(images(1, size)))
    # Another patch size means another grid for the same pixels, with position embeddings that stay as they are.
    close(ours(images(1, 64)), theirs(images(1, 64)))
    for model in (theirs, ours):
        model.set_input_size((64, 64), (16, 16))
    close(ours(images(1, 64)), theirs(images(1, 64)))
    with pytest.raises(ValueError, match="patches of"):
        ours(images(1, (24, 32)))


def hf_beit() -> Any:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BeitConfig(image_size=32, patch_size=8, use_relative_position_bias=True, **small)  # type: ignore[arg-type]
    return ready(transformers.BeitModel(config))


MANY_SIZES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "timm's position embeddings": (lambda: timm_model(dynamic_img_size=True), {}),
    "BEiT's bias in every block": (hf_beit, {"interpolate_pos_encoding": True}),
}


@pytest.mark.parametrize("name", MANY_SIZES)
@torch.no_grad()
def test_tables_of_many_sizes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(derived, "SIZES", 2)
    build, more = MANY_SIZES[name]
    theirs, ours = pair(build)
    taken = []
    # 24 patches each: all tables are of one size.
    for size in ((16, 96), (96, 16), (24, 64), (64, 24), (48, 32), (24, 64)):
        close(ours(images(1, size), **more), theirs(images(1, size), **more))
        taken.append(vit_engine.explain(ours).nbytes)
    assert taken[0] < taken[1] == taken[2] == taken[-1]


@torch.no_grad()
def test_padded_images_run_the_librarys_stem() -> None:
    theirs, ours = pair(timm_model, depth=1, dynamic_img_size=True, dynamic_img_pad=True)
    x = images(1, (30, 27))
    close(ours(x), theirs(x))
    assert "dynamic_img_pad" in reasons(ours)["forward_features"]
    assert "linear" in launches_of(lambda: ours(x))


def test_names_without_weight_decay_and_groups(models: tuple[Any, Any]) -> None:
    theirs, ours = models
    assert ours.no_weight_decay() == theirs.no_weight_decay() and "pos_embed" in ours.no_weight_decay()
    assert ours.group_matcher(coarse=True) == theirs.group_matcher(coarse=True)
    assert ours.get_classifier() is ours.head
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert repr(ours) == repr(theirs)


@torch.no_grad()
def test_pruned_blocks() -> None:
    theirs, ours = pair(timm_model)
    for model in (theirs, ours):
        model.prune_intermediate_layers(indices=[0], prune_norm=True, prune_head=True)
    close(ours(images(1)), theirs(images(1)))
    assert len(ours.blocks) == 1


def test_gradient_checkpointing() -> None:
    theirs, ours = pair(timm_model)
    for model in (theirs, ours):
        model.set_grad_checkpointing()
        model.train()
        model(images(1)).square().sum().backward()
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(ours_p.grad, theirs_p.grad)
    assert "gradient checkpointing" in reasons(ours)["forward_features"]
    with torch.no_grad():
        close(ours.eval()(images(1)), theirs.eval()(images(1)))


@torch.no_grad()
def test_eva_methods() -> None:
    theirs, ours = pair(eva, depth=1, dynamic_img_size=True)
    x = images(1, (24, 40))
    close(ours.forward_features(x), theirs.forward_features(x))
    close(ours.forward_intermediates(x, indices=[0]), theirs.forward_intermediates(x, indices=[0]))
    assert "qk_rope" in kernels(ours)["blocks.0"]
    for model in (theirs, ours):
        model.set_input_size((24, 40))
        model.reset_classifier(2)
        model.head = copy.deepcopy(theirs.head)
    close(ours(x), theirs(x))


def test_tokens_may_be_given_by_name_and_anywhere(models: tuple[Any, Any]) -> None:
    theirs, ours = models
    z = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).to(images(1).device)
    bias = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).to(z.device)
    with torch.no_grad():
        close(ours.blocks[0](attn_mask=bias, x=z), theirs.blocks[0](attn_mask=bias, x=z))
        assert launches_of(lambda: ours.blocks[0](attn_mask=bias, x=z))
        with pytest.raises(TypeError):
            ours.blocks[0]()
    assert vit_engine.explain(ours).rows
