"""Passes under transforms and modes of PyTorch leave nothing behind that later passes would find."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.engine.redraw import images, redraw, small_vit
from vit_engine import ViT, ViTConfig

SIZE = (16, 40)  # not the one that the position embeddings are for


def jvp(model: Any, x: Tensor) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
        torch.func.jvp(model, (x,), (x,))


def vmap(model: Any, x: Tensor) -> None:
    torch.func.vmap(lambda image: model(image[None])[0])(x)


def jvp_of_the_positions(model: Any, x: Tensor) -> None:
    def run(position: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"pos_embed": position}, (x,))

    position = model.pos_embed.detach()
    with sdpa_kernel(SDPBackend.MATH):
        torch.func.jvp(run, (position,), (torch.ones_like(position),))


def traced(model: Any, x: Tensor) -> None:
    make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x)


def fake(model: Any, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(x)


@pytest.mark.parametrize("known", [False, True], ids=["first", "behind a plain pass"])
@pytest.mark.parametrize("mode", [jvp, vmap, jvp_of_the_positions, traced, fake])
@torch.no_grad()
def test_torchs_operators(mode: Callable[[Any, Tensor], None], known: bool) -> None:
    model, x = small_vit(depth=1), images(2, 3, *SIZE)
    expected = copy.deepcopy(model)(x)
    if known:
        model(x)
    mode(model, x)
    assert torch.equal(model(x), expected)


@pytest.mark.interpreted_only
@pytest.mark.parametrize("mode", [traced, fake])
@torch.no_grad()
def test_the_kernels(mode: Callable[[Any, Tensor], None]) -> None:
    model: Any = ViT(ViTConfig(16, 8, embed_dim=32, depth=1, num_heads=2, num_classes=5), backend="interpret").eval()
    redraw(model)
    x = images(1, 3, *SIZE, dtype=torch.float32)
    expected = copy.deepcopy(model)(x)
    mode(model, x)
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_tangents_of_the_positions_get_through() -> None:
    model = small_vit(depth=1)
    model.position_embedding((2, 5))
    position = model.pos_embed.detach()
    del model.pos_embed
    with forward_ad.dual_level():
        model.pos_embed = forward_ad.make_dual(position, torch.ones_like(position))  # type: ignore[assignment]
        assert forward_ad.unpack_dual(model.position_embedding((2, 5))).tangent is not None
