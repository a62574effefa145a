"""Where a library's own code raises, the accelerated model raises: it runs that code and gives no result of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vit_engine
from tests.rung import DEVICE
from vit_engine.dropin.parts import is_block

from . import support
from .support import close, images, launches_of, reasons

pytestmark = pytest.mark.interpreted_only


def _both_raise(ours: Any, theirs: Any, run: Callable[[Any], Any]) -> None:
    """The same exception of both, twice: at the pass that would be noted as well."""
    with pytest.raises(Exception) as expected:
        run(theirs)
    for _ in range(2):
        with pytest.raises(type(expected.value)) as raised:
            run(ours)
        assert str(raised.value) == str(expected.value)


# Parameters that stay in float32 when the model is put into float16.
MIXED: dict[str, tuple[Callable[[], Any], str]] = {
    "timm LayerScale": (lambda: support.timm_model(init_values=0.5, depth=1), "blocks.0.ls1.gamma"),
    "timm class token": (lambda: support.timm_model(depth=1), "cls_token"),
    "timm positions": (lambda: support.timm_model(depth=1), "pos_embed"),
    "timm bias": (lambda: support.timm_model(depth=1), "blocks.0.attn.qkv.bias"),
    "timm patch bias": (lambda: support.timm_model(depth=1), "patch_embed.proj.bias"),
    "timm norm": (lambda: support.timm_model(depth=1), "norm.bias"),
    "eva bias": (lambda: support.eva(depth=1), "blocks.0.attn.q_bias"),
    "torchvision": (lambda: support.torchvision_model(num_layers=1), "class_token"),
    "dinov2": (lambda: support.hf_dinov2(num_hidden_layers=1), "encoder.layer.0.layer_scale1.lambda1"),
    "clip": (lambda: support.hf_clip(num_hidden_layers=1), "embeddings.position_embedding.weight"),
}


def _half_but_for(model: nn.Module, name: str) -> None:
    module, _, parameter = name.rpartition(".")
    owner = model.half().get_submodule(module)
    setattr(owner, parameter, nn.Parameter(getattr(owner, parameter).float()))


@pytest.mark.parametrize("early", [True, False], ids=["before accelerate", "after"])
@pytest.mark.parametrize("name", list(MIXED))
@torch.no_grad()
def test_parameters_of_two_dtypes(name: str, early: bool) -> None:
    build, parameter = MIXED[name]
    theirs = build()
    ours = copy.deepcopy(theirs)
    _half_but_for(theirs, parameter)
    if early:
        _half_but_for(ours, parameter)
        vit_engine.accelerate(ours)
    else:
        vit_engine.accelerate(ours)(images(1))
        _half_but_for(ours, parameter)
    _both_raise(ours, theirs, lambda model: model(images(1).half()))
    assert any("float32" in why and "float16" in why for why in reasons(ours).values())


@torch.no_grad()
def test_what_is_put_right_runs_on_the_kernels_again() -> None:
    build, parameter = MIXED["timm LayerScale"]
    ours = vit_engine.accelerate(build())
    _half_but_for(ours, parameter)
    with pytest.raises(RuntimeError):
        ours(images(1).half())
    ours.half()
    assert "attention" in launches_of(lambda: ours(images(1).half()))


@pytest.mark.parametrize("name", ["timm eva", "timm beit", "vit", "dinov2", "clip", "siglip"])
@torch.no_grad()
def test_an_empty_batch(name: str) -> None:
    theirs, ours = support.pair(support.ALL[name])
    _both_raise(ours, theirs, lambda model: model(images(0)))


def _block(model: Any, **more: Any) -> Tensor:
    return model.blocks[0](torch.ones(2, 17, 32, device=DEVICE), **more)


MASKS = {
    "one dimension": torch.ones(17, dtype=torch.bool),
    "no dimension": torch.tensor(1.0),
    "another precision": torch.zeros(17, 17, dtype=torch.float16),
    "whole numbers": torch.ones(17, 17, dtype=torch.int64),
}


@pytest.mark.parametrize("build", [support.timm_model, support.eva], ids=["timm", "eva"])
@pytest.mark.parametrize("mask", list(MASKS.values()), ids=list(MASKS))
@torch.no_grad()
def test_masks_of_timm(build: Callable[..., Any], mask: Tensor) -> None:
    """What PyTorch's fused attention refuses, timm's other code may take."""
    mask = mask.to(DEVICE)
    theirs, ours = support.pair(build, depth=1)
    _both_raise(ours, theirs, lambda model: _block(model, attn_mask=mask))
    assert "attn_mask has the shape" in reasons(ours)["blocks.0"]
    for model in (theirs, ours):
        model.blocks[0].attn.fused_attn = False
    close(_block(ours, attn_mask=mask), _block(theirs, attn_mask=mask))


@pytest.mark.parametrize("name", ["timm vit", "timm eva", "timm beit", "torchvision", "vit"])
@torch.no_grad()
def test_arguments_of_no_or_another_version(name: str) -> None:
    theirs, ours = support.pair(support.ALL[name])
    tokens = torch.ones(2, 17, 32, device=DEVICE)
    for model in (theirs, ours):
        model.layer = next(part for part in model.modules() if is_block(part))
    _both_raise(ours, theirs, lambda model: model.layer(tokens, *[None] * 4))
    if name != "vit":  # transformers hands on what it does not know
        _both_raise(ours, theirs, lambda model: model.layer(tokens, window=3))


@torch.no_grad()
def test_a_rotary_embedding_for_another_number_of_tokens() -> None:
    theirs, ours = support.pair(support.eva, depth=1)
    rope = theirs.rope.get_embed()
    close(_block(ours, rope=rope), _block(theirs, rope=rope))
    for model in (theirs, ours):
        model.blocks[0].attn.num_prefix_tokens = 2
    _both_raise(ours, theirs, lambda model: _block(model, rope=rope))
    assert "num_prefix_tokens=2" in reasons(ours)["blocks.0"]
