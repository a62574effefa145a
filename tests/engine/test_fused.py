"""The whole ViT through the kernels, against float64 and against timm."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import timm
import torch

from tests.engine.redraw import redraw
from tests.rung import DEVICE, DTYPES, RUNG
from vit_bench.tolerance import check
from vit_bench.whole_model import SMALL
from vit_engine import ViT, ViTConfig, fused

BACKEND = "interpret" if RUNG == "interpreted" else "triton"

VARIANTS = {
    "registers, LayerScale": SMALL,
    "plain": dataclasses.replace(SMALL, num_register_tokens=0, layer_scale=None),
    "average pooling": dataclasses.replace(SMALL, global_pool="avg", num_register_tokens=0),
    "average of normed tokens": dataclasses.replace(SMALL, global_pool="avg", fc_norm=False, class_token=False),
    "swiglu, no qkv bias": dataclasses.replace(SMALL, activation="swiglu", qkv_bias=False),
    "positions for patches only": dataclasses.replace(SMALL, no_embed_class=True),
    "pre-training head": dataclasses.replace(SMALL, head="pretrain", representation_size=40),
    "norm after pooling": dataclasses.replace(SMALL, fc_norm=True),
    "no classes": dataclasses.replace(SMALL, num_classes=0),
}

TINY = dataclasses.replace(SMALL, depth=1, embed_dim=32, num_heads=2, image_size=16)


def models(config: ViTConfig, dtype: torch.dtype) -> tuple[ViT, ViT, ViT]:
    """(through the kernels, eager in the same dtype, truth in float64) with the same parameters."""
    eager = ViT(config, backend="torch").eval()
    redraw(eager)
    eager = eager.to(dtype)
    ours = copy.deepcopy(eager).to(DEVICE).set_backend(BACKEND)
    return ours, eager, copy.deepcopy(eager).double()


def images(batch: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size)).to(dtype)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(VARIANTS)[:1])
@torch.inference_mode()
def test_logits(name: str, dtype: torch.dtype) -> None:
    ours, eager, truth = models(VARIANTS[name], dtype)
    x = images(2, 32, dtype)
    check(ours(x.to(DEVICE)).cpu(), eager(x), truth(x.double()), name=name)


@pytest.mark.parametrize("name", list(VARIANTS)[1:])
@torch.inference_mode()
def test_variants(name: str) -> None:
    ours, eager, truth = models(dataclasses.replace(VARIANTS[name], depth=1), torch.float32)
    x = images(2, 32, torch.float32)
    logits = ours(x.to(DEVICE))
    check(logits.cpu(), eager(x), truth(x.double()), name=name)
    features = ours.forward_features(x.to(DEVICE))
    check(features.cpu(), eager.forward_features(x), truth.forward_features(x.double()), name=f"{name}, features")
    assert torch.equal(fused.forward_head(ours, features), logits)


@torch.inference_mode()
def test_another_resolution_from_pixels() -> None:
    """uint8 images of a size the position embeddings were not made for."""
    config = dataclasses.replace(SMALL, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    ours, eager, truth = models(config, torch.float32)
    x = torch.randint(0, 256, (1, 3, 24, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # The position embeddings are interpolated in fp32 whatever the model's dtype; the truth takes the same ones.
    truth.pos_embed.data = ours.position_embedding((3, 5)).double().cpu()[None]
    truth.config = dataclasses.replace(config, image_size=(24, 40))
    check(ours(x.to(DEVICE)).cpu(), eager(x), truth(x), name="uint8, 24 x 40")


@torch.inference_mode()
def test_an_empty_batch() -> None:
    ours, _, _ = models(SMALL, torch.float32)
    assert ours(images(0, 32, torch.float32).to(DEVICE)).shape == (0, SMALL.num_classes)


@torch.no_grad()
def test_folded_weights_follow_their_parameters() -> None:
    ours, eager, _ = models(TINY, torch.float32)
    x = images(1, 16, torch.float32)
    before = ours(x.to(DEVICE))
    assert torch.equal(ours(x.to(DEVICE)), before)
    assert ours.derived.nbytes() > 0
    for model in (ours, eager):
        model.get_parameter("blocks.0.norm2.weight").mul_(1.5)
        model.get_parameter("blocks.0.attn.qkv.bias").add_(0.25)
    after = ours(x.to(DEVICE))
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after.cpu(), eager(x), rtol=1e-4, atol=1e-4)
    assert not any("derived" in key for key in ours.state_dict())


@torch.no_grad()
def test_every_parameter_reaches_the_logits() -> None:
    """Zeroing any one tensor changes the logits (of the qkv bias the key third does not count: softmax ignores it)."""
    ours, _, _ = models(TINY, torch.float32)
    x = images(1, 16, torch.float32).to(DEVICE)
    logits = ours(x)
    for name, parameter in ours.named_parameters():
        kept = parameter.clone()
        parameter.zero_()
        assert (ours(x) - logits).abs().max() > 1e-3 * logits.abs().max(), f"{name} does not matter"
        parameter.copy_(kept)
    assert torch.equal(ours(x), logits)


@pytest.mark.slow
@torch.inference_mode()
def test_logits_of_timms_vit_tiny() -> None:
    """timm's vit_tiny_patch16_224, weights redrawn, fp32: within 1e-4 relative through the kernels."""
    theirs = timm.create_model("vit_tiny_patch16_224").eval()
    redraw(theirs)
    ours = ViT(ViTConfig.preset("vit_tiny_patch16_224"), backend=BACKEND).eval()
    ours.load_state_dict(theirs.state_dict())
    ours.to(DEVICE)
    x = images(1, 224, torch.float32)
    expected, logits = theirs.double()(x.double()), ours(x.to(DEVICE)).double().cpu()
    assert (logits - expected).norm() / expected.norm() < 1e-4


@pytest.mark.interpreted_only
@pytest.mark.parametrize(
    "config",
    [TINY, dataclasses.replace(TINY, global_pool="map", class_token=False)],
    ids=["folded bias", "query of the attention pooling"],
)
@torch.inference_mode()
def test_a_pass_under_autocast_leaves_nothing_behind(config: ViTConfig) -> None:
    ours, _, _ = models(config, torch.float32)
    x = images(1, 16, torch.float32)
    expected = copy.deepcopy(ours)(x)
    with torch.autocast("cpu", torch.bfloat16):
        # Nothing is cast: the kernels take all of it as it is.
        assert torch.equal(ours(x), expected)
    assert torch.equal(ours(x), expected)
