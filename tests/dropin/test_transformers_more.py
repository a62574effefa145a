"""transformers' OWL-ViT, OWLv2, BLIP and VideoMAE, and models of other classes around towers that are known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.models.naflexvit as naflexvit
import timm.models.pit as pit
import torch
import transformers
from torch import Tensor, nn

import vit_engine
from tests.rung import DEVICE

from .support import close, images, kernels, launches_of, pair, ready, reasons

pytestmark = pytest.mark.interpreted_only

_SMALL: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip


def _vision(name: str, **more: Any) -> Any:
    config = getattr(transformers, f"{name.removesuffix('Model')}Config")
    return ready(getattr(transformers, name)(config(**{**_SMALL, "attn_implementation": "eager", **more})))


def _videos() -> Tensor:
    return torch.stack([images(1, seed=i) for i in range(4)], dim=1)


FAMILIES: dict[str, tuple[Callable[..., Any], Callable[[], Tensor], str]] = {
    "OwlViT": (lambda **m: _vision("OwlViTVisionModel", **m), images, "vision_model.encoder.layers.0"),
    "Owlv2": (lambda **m: _vision("Owlv2VisionModel", **m), images, "vision_model.encoder.layers.0"),
    "Blip": (lambda **m: _vision("BlipVisionModel", **m), images, "encoder.layers.0"),
    "VideoMAE": (lambda **m: _vision("VideoMAEModel", num_frames=4, **m), _videos, "encoder.layer.0"),
}
WITHOUT_STEM = {"Blip": "embeddings.patch_embedding", "VideoMAE": "embeddings.patch_embeddings.projection"}


@pytest.mark.parametrize("name", list(FAMILIES))
@torch.no_grad()
def test_what_a_model_can_be_asked_for(name: str) -> None:
    build, inputs, layer = FAMILIES[name]
    theirs, ours = pair(build)
    x = inputs()
    for asked in ({}, {"output_hidden_states": True}, {"return_dict": False}):
        close(ours(x, **asked), theirs(x, **asked))
    assert launches_of(lambda: ours(x)).count("attention") == 2
    assert reasons(ours).keys() <= {WITHOUT_STEM.get(name)}
    asked = {"output_attentions": True, "output_hidden_states": True}
    close(ours(x, **asked), theirs(x, **asked))
    assert "output_attentions" in reasons(ours)[layer]


@pytest.mark.parametrize("name", list(FAMILIES))
@torch.no_grad()
def test_what_is_put_into_a_layer_runs(name: str) -> None:
    build, inputs, layer = FAMILIES[name]
    theirs, ours = pair(build)
    x = inputs()
    ours(x)
    for model in (theirs, ours):
        block = model.get_submodule(layer)
        where = next(key for key, part in block.named_modules() if isinstance(part, nn.Linear))
        outer, _, last = where.rpartition(".")
        setattr(block.get_submodule(outer), last, nn.Sequential(block.get_submodule(where), nn.Tanh()))
    close(ours(x), theirs(x))
    assert "Sequential, expected torch.nn.Linear" in reasons(ours)[layer]


@pytest.mark.parametrize("name", ["Blip", "VideoMAE"])
@torch.no_grad()
def test_dropout_of_a_layer_in_training_mode(name: str) -> None:
    build, inputs, layer = FAMILIES[name]
    rate = {"Blip": "attention_dropout", "VideoMAE": "attention_probs_dropout_prob"}[name]
    theirs, ours = pair(build, **{rate: 0.5})
    for model in (theirs, ours):
        model.train()
        torch.manual_seed(0)
        model.result = model(inputs())
    close(ours.result, theirs.result)
    assert "dropout" in reasons(ours)[layer]


@torch.no_grad()
def test_another_attention_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """VideoMAE looks it up by name; BLIP has but its own."""

    def none(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(value).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "none", none)
    build, inputs, layer = FAMILIES["VideoMAE"]
    theirs, ours = pair(build)
    for model in (theirs, ours):
        model.config._attn_implementation = "none"
    close(ours(inputs()), theirs(inputs()))
    assert "somebody's own" in reasons(ours)[layer]


@torch.no_grad()
def test_a_mask_is_for_videomae_to_refuse() -> None:
    build, _, layer = FAMILIES["VideoMAE"]
    for model in pair(build):
        with pytest.raises(TypeError, match="attention_mask"):
            model.get_submodule(layer)(torch.ones(1, 4, 32, device=DEVICE), attention_mask=torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("name", ["OwlViT", "Owlv2"])
@torch.no_grad()
def test_other_sizes_of_images(name: str) -> None:
    theirs, ours = pair(FAMILIES[name][0])
    for size in ((40, 24), 64):
        x = images(1, size)
        close(ours(x, interpolate_pos_encoding=True), theirs(x, interpolate_pos_encoding=True))
    with pytest.raises(ValueError, match=r"images must be \(32, 32\) pixels .*got \(64, 64\)"):
        ours(images(1, 64))
    close(ours(images(1, (16, 64))), theirs(images(1, (16, 64))))  # as many patches: taken as they come


def _llava(**text: Any) -> Any:
    towers: dict[str, Any] = {
        "vision_config": transformers.CLIPVisionConfig(**_SMALL),
        "text_config": transformers.LlamaConfig(**{**_TEXT, **text}, num_key_value_heads=2),
    }
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**towers, image_token_index=49))


def _depth_anything() -> Any:
    stages: dict[str, Any] = {"out_features": [f"stage{i}" for i in range(1, 5)], "reshape_hidden_states": False}
    backbone = transformers.Dinov2Config(**{**_SMALL, "num_hidden_layers": 4}, mlp_ratio=2, **stages)
    sizes: dict[str, Any] = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    config = transformers.DepthAnythingConfig(backbone_config=backbone, patch_size=8, head_hidden_size=8, **sizes)
    return transformers.DepthAnythingForDepthEstimation(config)


def _owl_detection() -> Any:
    config = transformers.OwlViTConfig(text_config=_TEXT, vision_config=_SMALL, projection_dim=32)
    return transformers.OwlViTForObjectDetection(config)


def _naflex() -> Any:
    config = naflexvit.NaFlexVitCfg(patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2)
    return naflexvit.NaFlexVit(config, num_classes=5, img_size=32)


def _pit() -> Any:
    return pit.PoolingVisionTransformer(32, 8, 4, base_dims=(16,) * 3, depth=(1,) * 3, heads=(1, 2, 2), mlp_ratio=2)


_IDS = torch.tensor([[1, *[49] * 16, 5, 2]] * 2, device=DEVICE)
LARGER: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], int]] = {
    "LLaVA": (_llava, lambda model: model(input_ids=_IDS, pixel_values=images()).logits, 2),
    "Depth Anything": (_depth_anything, lambda model: model(images()).predicted_depth, 4),
    "OWL-ViT": (_owl_detection, lambda model: model(_IDS[:, :4] % 40, images()).pred_boxes, 2),
    "NaFlexViT": (_naflex, lambda model: model(images(2, (24, 40))), 2),
    "PiT": (_pit, lambda model: model(images()), 3),
}


@pytest.mark.parametrize("name", list(LARGER))
@torch.no_grad()
def test_a_tower_inside_another_model(name: str) -> None:
    build, run, blocks = LARGER[name]
    theirs = ready(build())
    ours = vit_engine.accelerate(copy.deepcopy(theirs))
    close(run(ours), run(theirs))
    assert launches_of(lambda: run(ours)).count("attention") >= blocks
    assert sum(text.startswith("linear (norm folded), attention") for text in kernels(ours).values()) >= blocks


def test_explain_is_short_for_a_long_model() -> None:
    """Layers of a language model have a row for each of their parts, not one for each part of each layer."""
    layers = 12
    model: Any = vit_engine.accelerate(ready(_llava(num_hidden_layers=layers)))
    lines = str(vit_engine.explain(model)).splitlines()
    assert len(lines) == len(str(vit_engine.explain(vit_engine.accelerate(ready(_llava())))).splitlines()) < 20
    part = "model.language_model.layers.{}.self_attn.q_proj"
    assert any(line.startswith(f"{part.format(0)} to {part.format(layers - 1)} ") for line in lines)
    model.model.language_model.layers[5].self_attn.q_proj.forward = lambda x: x
    lines = str(vit_engine.explain(model)).splitlines()
    assert any(line.startswith(f"{part.format(0)} to {part.format(4)} ") for line in lines)
    assert any(line.startswith(f"{part.format(6)} to {part.format(layers - 1)} ") for line in lines)
