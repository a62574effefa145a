"""Settings and parameters of timm's and torchvision's parts that their code asks in every pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .support import (
    beit,
    close,
    differs,
    eva,
    images,
    launches_of,
    pair,
    reasons,
    timm_model,
    torchvision_model,
    watched,
)

pytestmark = pytest.mark.interpreted_only


SETTINGS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "vit, fused: the scale is not asked": (timm_model, {"scale": 2.0}),
    "vit, not fused: it is": (timm_model, {"scale": 2.0, "fused_attn": False}),
    "vit, other heads": (timm_model, {"num_heads": 4, "head_dim": 8}),
    "eva, fused": (eva, {"scale": 2.0}),
    "eva, not fused": (eva, {"scale": 2.0, "fused_attn": False}),
    "eva, other heads": (lambda: eva(use_rot_pos_emb=False), {"num_heads": 4}),
    "beit, fused": (beit, {"scale": 2.0}),
    "beit, not fused": (beit, {"scale": 2.0, "fused_attn": False}),
    "beit, other heads": (lambda: beit(use_rel_pos_bias=False, use_abs_pos_emb=True), {"num_heads": 4}),
}


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_settings_of_timms_attention(name: str) -> None:
    build, settings = SETTINGS[name]
    theirs, ours = pair(build)
    close(ours(images(1)), theirs(images(1)))
    for model in (theirs, ours):
        for setting, value in settings.items():
            setattr(model.blocks[1].attn, setting, value)
    close(ours(images(1)), theirs(images(1)))
    assert launches_of(lambda: ours(images(1))).count("attention") == 2


@pytest.mark.parametrize("build", [timm_model, eva, beit], ids=lambda f: f.__name__)
@torch.no_grad()
def test_attention_in_training_mode_drops_although_its_dropout_is_not(build: Callable[..., Any]) -> None:
    """timm hands the rate to PyTorch's fused attention where the attention, not its dropout, is in training mode."""
    theirs, ours = pair(build, depth=1, attn_drop_rate=0.5)
    results = []
    for model in (theirs, ours):
        model.train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.eval()
        torch.manual_seed(0)
        results.append(model(images(1)))
    close(results[1], results[0])
    assert "training mode with dropout" in reasons(ours)["blocks.0"]


@pytest.mark.parametrize("build", [timm_model, eva, torchvision_model], ids=lambda f: f.__name__)
@torch.no_grad()
def test_other_weights_in_the_patch_projection(build: Callable[..., Any]) -> None:
    """A convolution goes by its weights, whatever in_channels and kernel_size say: often done for grey images."""
    theirs, ours = pair(build)
    close(ours(images(1)), theirs(images(1)))

    def put(change: Callable[[Tensor], Tensor]) -> None:
        for model in (theirs, ours):
            proj = model.conv_proj if build is torchvision_model else model.patch_embed.proj
            proj.weight = nn.Parameter(change(proj.weight.detach()))

    put(lambda weight: weight.sum(1, keepdim=True))
    result, launches = watched(lambda: ours(images(1)[:, :1]))
    close(result, theirs(images(1)[:, :1]))
    assert "patch_embed" in launches
    with pytest.raises(ValueError, match=r"shape \[B, 1, H, W\]"):
        ours(images(1))
    put(lambda weight: weight[..., :4, :4].clone())
    close(ours(images(1)[:, :1]), theirs(images(1)[:, :1]))
    assert "has weights of (4, 4) pixels" in "".join(reasons(ours).values())


@pytest.mark.parametrize("build", [eva, beit], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["gamma_1", "gamma_2"])
@torch.no_grad()
def test_one_layer_scale_taken_away(build: Callable[..., Any], name: str) -> None:
    """timm's BEiT looks at the first one and leaves out both; without the second it raises."""
    theirs, ours = pair(build, depth=1, init_values=0.5)
    plain = ours(images(1))
    for model in (theirs, ours):
        setattr(model.blocks[0], name, None)
    if build is beit and name == "gamma_2":
        with pytest.raises(TypeError):
            theirs(images(1))
        with pytest.raises(TypeError):
            ours(images(1))
    else:
        close(ours(images(1)), theirs(images(1)))
        # No tolerance: that it matters at all, far beyond rounding.
        assert differs(ours(images(1)), plain)
