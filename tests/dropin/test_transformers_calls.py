"""Everything that transformers' models can be asked for, after acceleration as before it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import vit_engine
from vit_engine.dropin.api import attached_to

from . import support
from .support import (
    HF,
    close,
    differs,
    hf_dinov2,
    hf_vit,
    images,
    kernels,
    launches_of,
    pair,
    reasons,
    slow_but,
    watched,
)

pytestmark = pytest.mark.interpreted_only

LABELLED: dict[str, Callable[..., Any]] = {
    "ViT": lambda: hf_vit(transformers.ViTForImageClassification, num_labels=5),
    "DINOv2": lambda: hf_dinov2(transformers.Dinov2ForImageClassification, num_labels=5),
}


@pytest.mark.parametrize("name", slow_but(HF, "vit", "clip"))
@torch.no_grad()
def test_hidden_states(name: str) -> None:
    theirs, ours = pair(HF[name])
    result, plain = watched(lambda: ours(images(1)))
    close(result, theirs(images(1)))
    given: dict[str, Any] = {"output_hidden_states": True}
    result, launches = watched(lambda: ours(images(1), **given))
    assert len(result.hidden_states) == 3
    close(result, theirs(images(1), **given))
    assert launches == plain
    assert launches_of(lambda: ours(images(1))) == plain, "the hooks that stay behind cost nothing"


@pytest.mark.parametrize("name", slow_but(HF, "vit"))
@torch.no_grad()
def test_attentions(name: str) -> None:
    """The kernel keeps no weights, so the original runs for this call, and only for this one."""
    theirs, ours = pair(HF[name])
    given: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
    result = ours(images(1), **given)
    assert [tuple(a.shape[:2]) for a in result.attentions] == [(1, 2), (1, 2)]
    close(result, theirs(images(1), **given))
    block = next(name for name in reasons(ours) if name.endswith(".0"))
    assert "output_attentions" in reasons(ours)[block]
    result, launches = watched(lambda: ours(images(1)))
    close(result, theirs(images(1)))
    assert launches.count("attention") == 2
    assert block in kernels(ours)


@torch.no_grad()
def test_a_hook_in_the_place_of_a_listening_one() -> None:
    """transformers' own hooks only listen; one that took the place of such a hook may do more."""
    theirs, ours = pair(hf_vit, num_hidden_layers=1)
    for model in (theirs, ours):
        model(images(1), output_attentions=True)
        model(images(1))
        attention = model.layers[0].attention
        assert len(attention._forward_hooks) == 1
        attention._forward_hooks.clear()
        attention.register_forward_hook(lambda module, arguments, output: (output[0] * 0.5, *output[1:]))
    close(ours(images(1)), theirs(images(1)))


@torch.no_grad()
def test_attentions_asked_for_by_the_configuration() -> None:
    theirs, ours = pair(hf_vit, output_attentions=True, output_hidden_states=True)
    close(ours(images(1)), theirs(images(1)))
    assert len(ours(images(1)).attentions) == 2


@pytest.mark.parametrize("build", [hf_vit, hf_dinov2, support.hf_clip, support.hf_siglip], ids=lambda f: f.__name__)
@torch.no_grad()
def test_other_sizes_of_images(build: Callable[..., Any]) -> None:
    theirs, ours = pair(build, num_hidden_layers=1)
    given: dict[str, Any] = {} if build is hf_dinov2 else {"interpolate_pos_encoding": True}
    for size in ((40, 24), (32, 32), (40, 24)):
        result, launches = watched(lambda size=size: ours(images(1, size), **given))
        close(result, theirs(images(1, size), **given))
        assert "patch_embed" in launches
    if build is not hf_dinov2:
        with pytest.raises(ValueError, match=r"40.*24|24.*40|32"):
            ours(images(1, (40, 24)))


def with_mask_token() -> Any:
    return hf_vit(lambda config: transformers.ViTModel(config, use_mask_token=True))


@pytest.mark.parametrize("build", [with_mask_token, hf_dinov2], ids=lambda f: f.__name__)
@torch.no_grad()
def test_masked_positions(build: Callable[..., Any]) -> None:
    theirs, ours = pair(build)
    masked = torch.zeros(1, 16, dtype=torch.bool, device=images(1).device)
    masked[:, ::3] = True
    expected = theirs(images(1), bool_masked_pos=masked)
    # No tolerance: that it matters at all, far beyond rounding.
    assert differs(expected[0], theirs(images(1))[0])
    result, launches = watched(lambda: ours(images(1), bool_masked_pos=masked))
    close(result, expected)
    assert "bool_masked_pos" in reasons(ours)["embeddings"]
    assert launches.count("attention") == 2
    close(ours(images(1)), theirs(images(1)))
    assert "embeddings" in kernels(ours)


@torch.no_grad()
def test_masked_image_modelling() -> None:
    theirs, ours = pair(lambda: hf_vit(transformers.ViTForMaskedImageModeling, encoder_stride=8))
    masked = (torch.arange(16, device=images(1).device) % 2 == 0)[None]
    close(ours(images(1), bool_masked_pos=masked), theirs(images(1), bool_masked_pos=masked))


@pytest.mark.parametrize("name", slow_but(LABELLED, "ViT"))
def test_labels(name: str) -> None:
    theirs, ours = pair(LABELLED[name])
    labels = torch.tensor([3, 1], device=images(1).device)
    with torch.no_grad():
        result = ours(images(2), labels=labels)
        close(result, theirs(images(2), labels=labels))
        assert result.loss > 0
        close(ours(images(2), labels=labels, return_dict=False), theirs(images(2), labels=labels, return_dict=False))
    for model in (ours, theirs):
        model.train()
        model(images(2), labels=labels).loss.backward()
    close(ours.classifier.weight.grad, theirs.classifier.weight.grad)


@torch.no_grad()
def test_what_a_trainer_adds_for_the_loss_leaves_the_layers_on_the_kernels() -> None:
    theirs, ours = pair(LABELLED["ViT"])
    given = {"labels": torch.tensor([3, 1], device=images(1).device), "num_items_in_batch": torch.tensor(2)}
    close(ours(images(2), **given), theirs(images(2), **given))
    assert set(reasons(ours)) == {"classifier"}


@pytest.mark.parametrize("name", list(HF))
@torch.no_grad()
def test_tuples_and_pooled_outputs(name: str) -> None:
    theirs, ours = pair(HF[name], num_hidden_layers=1)
    close(ours(pixel_values=images(1), return_dict=False), theirs(pixel_values=images(1), return_dict=False))
    result, expected = ours(images(1)), theirs(images(1))
    assert isinstance(expected.pooler_output, Tensor)
    close(result.pooler_output, expected.pooler_output)


@torch.no_grad()
def test_a_whole_clip_model_has_its_vision_part_accelerated() -> None:
    text: dict[str, Any] = {
        "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config={**vision, "intermediate_size": 64})
    theirs = support.ready(transformers.CLIPModel(config))
    ours: Any = vit_engine.accelerate(copy.deepcopy(theirs))
    tokens = torch.tensor([[1, 5, 6, 2]], device=images(1).device)
    mask = torch.tensor([[1, 1, 1, 1]], device=tokens.device)
    given: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "pixel_values": images(1)}
    result, expected = ours(**given), theirs(**given)
    close(result.logits_per_image, expected.logits_per_image)
    close(result.text_embeds, expected.text_embeds)
    close(ours.get_image_features(images(1)), theirs.get_image_features(images(1)))


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    theirs, ours = pair(hf_vit)
    ours(images(1))
    ours.save_pretrained(tmp_path)
    loaded: Any = transformers.ViTModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert not list(attached_to(loaded))
    close(loaded(images(1).cpu()), theirs.cpu()(images(1).cpu()))
    again: Any = vit_engine.accelerate(loaded)
    close(again(images(1).cpu()), theirs(images(1).cpu()))


@torch.no_grad()
def test_other_attention_implementations() -> None:
    theirs, ours = pair(hf_vit)
    for name in ("sdpa", "eager"):
        ours.set_attn_implementation(name)
        result, launches = watched(lambda: ours(images(1)))
        close(result, theirs(images(1)))
        assert launches.count("attention") == 2
    vit_engine.register_attention()
    ours.set_attn_implementation("vit_engine")
    close(ours(images(1)), theirs(images(1)))


@torch.no_grad()
def test_backbones() -> None:
    theirs, ours = pair(lambda: hf_dinov2(transformers.Dinov2Backbone, out_features=["stage1", "stage2"]))
    expected, (result, launches) = theirs(images(1)), watched(lambda: ours(images(1)))
    assert len(expected.feature_maps) == 2
    close(list(result.feature_maps), list(expected.feature_maps))
    assert launches.count("attention") == 2


@pytest.mark.slow
@torch.no_grad()
def test_half_precision_casts_images() -> None:
    theirs, ours = pair(hf_vit)
    for model in (theirs, ours):
        model.half()
    truth = copy.deepcopy(theirs).double()(images(1).half().double()).last_hidden_state
    output, launches = watched(lambda: ours(images(1)))
    result, eager = output.last_hidden_state, theirs(images(1)).last_hidden_state
    assert result.dtype == eager.dtype == torch.float16
    assert (result - truth).abs().max() <= 2 * (eager - truth).abs().max() + 2**-10 * truth.abs().max()
    assert launches.count("attention") == 2


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
@torch.no_grad()
def test_what_eager_attention_makes_of_a_mask_that_is_not_for_adding(kind: torch.dtype) -> None:
    # It adds a boolean mask as ones and zeros; "sdpa" leaves out what is false.
    theirs, ours = pair(hf_vit)
    tokens = theirs.embeddings.position_embeddings.shape[1]
    mask = torch.rand(1, 1, tokens, tokens, generator=torch.Generator().manual_seed(0)) > 0.3
    given = mask.to(kind).to(support.DEVICE)
    close(ours(images(1), attention_mask=given), theirs(images(1), attention_mask=given))
    assert "with an attention mask in" in str(reasons(ours))
    for model in (theirs, ours):
        model.set_attn_implementation("sdpa")
    mask = mask.to(support.DEVICE)
    result, launches = watched(lambda: ours(images(1), attention_mask=mask))
    close(result, theirs(images(1), attention_mask=mask))
    assert launches.count("attention") == 2


@pytest.mark.parametrize("name", ["clip", "siglip", "vit"])
@torch.no_grad()
def test_arguments_of_embeddings_by_position(name: str) -> None:
    theirs, ours = (model.embeddings for model in pair(HF[name]))
    pixels = images(1, (32, 16))
    given = (None, True) if name == "vit" else (True,)
    result, launches = watched(lambda: ours(pixels, *given))
    close(result, theirs(pixels, *given))
    assert launches == ["patch_embed"]
    for wrong in ((None, True, None, 1), ("no such argument",)):
        more = {wrong[0]: 1} if len(wrong) == 1 else {}
        arguments = () if more else wrong
        with pytest.raises(TypeError, match="forward"):
            ours(pixels, *arguments, **more)
