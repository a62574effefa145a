"""timm's attention pooling behind the blocks: SigLIP's head on the kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.attention_pool import AttentionPoolLatent
from torch import nn

import vit_engine

from .support import close, close_gradients, images, kernels, launches_of, pair, ready, reasons, timm_model

pytestmark = pytest.mark.interpreted_only
RUNS = "linear, attention, linear, mlp"
LAUNCHES = ["linear", "attention", "linear", "mlp"]


def siglip(**more: Any) -> Any:
    return timm_model(**{"global_pool": "map", "class_token": False, **more})


@pytest.mark.parametrize("more", [{}, {"class_token": True, "reg_tokens": 2}, {"num_classes": 0}], ids=str)
@torch.no_grad()
def test_logits(more: dict[str, Any]) -> None:
    """The probe attends to the patches; what a class token and registers are cut off from is no view of whole rows."""
    theirs, ours = pair(siglip, **more)
    close(ours(images()), theirs(images()))
    assert kernels(ours)["attn_pool"] == RUNS
    assert launches_of(lambda: ours(images()))[-4:] == LAUNCHES
    tokens = theirs.forward_features(images())
    close(ours.forward_head(tokens, pre_logits=True), theirs.forward_head(tokens, pre_logits=True))


def change_latent(pool: Any) -> None:
    with torch.no_grad():
        pool.latent.mul_(-2)


def change_query(pool: Any) -> None:
    with torch.no_grad():
        pool.q.bias.add_(1)


@pytest.mark.parametrize("change", [change_latent, change_query])
@torch.no_grad()
def test_the_query_follows_its_parameters(change: Callable[[Any], None]) -> None:
    theirs, ours = pair(siglip)
    before = ours(images())
    change(theirs.attn_pool)
    change(ours.attn_pool)
    assert not torch.allclose(theirs(images()), before, rtol=1e-3)
    close(ours(images()), theirs(images()))


def build(**more: Any) -> Any:
    given = {"in_features": 32, "num_heads": 2, "norm_layer": nn.LayerNorm, **more}
    return ready(AttentionPoolLatent(**given))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "two latents": ({"latent_len": 2}, "more than one latent query"),
    "position embeddings": ({"pos_embed": "abs", "feat_size": 16}, "position embeddings"),
    "normalised heads": ({"qk_norm": True}, "normalises queries and keys"),
    "no MLP": ({"out_features": 0}, "without an MLP"),
    "mean of latents": ({"pool_type": "avg"}, "more than one latent query"),
    "no norm": ({"norm_layer": None}, "norm is Identity"),
    "dropout": ({"drop": 0.5}, "training mode with dropout"),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_pools_run_the_original(name: str) -> None:
    more, words = OTHERS[name]
    model = siglip()
    model.attn_pool = build(**more)
    ours = vit_engine.accelerate(copy.deepcopy(model))
    if name == "dropout":
        close(ours(images()), model(images()))
        pools: list[Any] = [model.attn_pool, ours.attn_pool]
        for pool in pools:
            pool.train()
        torch.manual_seed(0)
        expected = model(images())
        torch.manual_seed(0)
        close(ours(images()), expected)
    else:
        close(ours(images()), model(images()))
    assert words in reasons(ours)["attn_pool"]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@torch.no_grad()
def test_the_scale_is_asked_where_timm_asks_it(fused: bool) -> None:
    theirs, ours = pair(siglip)
    close(ours(images()), theirs(images()))
    for model in (theirs, ours):
        model.attn_pool.scale, model.attn_pool.fused_attn = 2.0, fused
    close(ours(images()), theirs(images()))
    assert kernels(ours)["attn_pool"] == RUNS


@torch.no_grad()
def test_masks_and_hooks_run_the_original() -> None:
    theirs, ours = pair(siglip)
    tokens = theirs.forward_features(images())
    mask = torch.arange(16)[None] < 5
    close(ours.attn_pool(tokens, attn_mask=mask), theirs.attn_pool(tokens, attn_mask=mask))
    assert "a mask" in reasons(ours)["attn_pool"]
    close(ours(images()), theirs(images()))
    assert "attn_pool" in kernels(ours)
    for model in (theirs, ours):
        model.attn_pool.norm.register_forward_hook(lambda _module, _given, y: 2 * y)
    close(ours(images()), theirs(images()))
    assert "norm has a hook" in reasons(ours)["attn_pool"]


def test_gradients() -> None:
    theirs, ours = pair(siglip)
    for model in (theirs, ours):
        model(images()).square().sum().backward()
    close_gradients(ours, theirs)
    assert launches_of(lambda: ours(images()))[-4:] == LAUNCHES


def test_restored() -> None:
    ours = vit_engine.accelerate(siglip())
    vit_engine.restore(ours)
    assert "forward" not in vars(ours.attn_pool)
