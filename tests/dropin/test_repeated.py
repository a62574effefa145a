"""Models whose own loop calls the blocks: of shapes seen before their code is left out, and nothing of what it does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vit_engine
from tests.engine.stand_in import repeated
from vit_engine.dropin.api import attached_to
from vit_engine.dropin.repeated import Repeated, RepeatedEncoder

from .support import (
    beit,
    close,
    eva,
    hf_clip,
    hf_dinov2,
    hf_siglip,
    hf_vit,
    images,
    pair,
    ready,
    reasons,
    slow_but,
    timm_model,
)

pytestmark = pytest.mark.interpreted_only
__all__ = ["repeated"]

_SIZES: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip


def _of(name: str, **more: Any) -> Callable[[], Any]:
    model, config = (getattr(transformers, f"{name}{kind}") for kind in ("Model", "Config"))
    return lambda: ready(model(config(**_SIZES, **more)))


MODELS: dict[str, Callable[[], Any]] = {
    "ViT": hf_vit,
    "ViT classifier": lambda: hf_vit(transformers.ViTForImageClassification, num_labels=5),
    "DeiT": _of("DeiT"),
    "DINOv2": hf_dinov2,
    "DINOv2 with registers": _of("Dinov2WithRegisters", mlp_ratio=2),
    "DINOv3": _of("DINOv3ViT"),
    "CLIP": hf_clip,
    "SigLIP": hf_siglip,
    "BEiT": _of("Beit"),
    "ViTMAE": _of("ViTMAE"),
    "timm EVA": eva,
    "timm BEiT": beit,
    "timm, another stem": lambda: timm_model(embed_norm_layer=nn.LayerNorm),
}


def whole(model: nn.Module) -> Repeated:
    found = (attached for attached in attached_to(model) if isinstance(attached, Repeated))
    (outer,) = (attached for attached in found if not isinstance(attached, RepeatedEncoder))
    return outer


@pytest.mark.parametrize("name", slow_but(MODELS, "ViT", "DINOv3", "SigLIP", "ViTMAE", "timm BEiT"))
@torch.no_grad()
def test_every_family_is_repeated_as_a_whole(name: str, repeated: list[str]) -> None:
    theirs, ours = pair(MODELS[name])

    def both(seed: int) -> None:
        x, results = images(1, seed=seed), []
        for model in (theirs, ours):
            torch.manual_seed(seed)  # ViTMAE draws its mask
            results.append(model(x))
        close(results[1], results[0])

    for seed in range(2):
        both(seed)
    assert not repeated, "the first pass of a shape runs as written, the second is noted"
    for seed in range(2, 4):
        both(seed)
    assert not whole(ours).replays.refused
    assert repeated.count("attention_kernel") == 2 * 2
    assert reasons(vit_engine.accelerate(copy.deepcopy(theirs))) == reasons(ours)


CALLS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any]]] = {
    "hidden states": (hf_vit, lambda model, x: model(x, output_hidden_states=True)),
    "a tuple": (hf_dinov2, lambda model, x: model(x, return_dict=False)),
    "by name": (hf_vit, lambda model, x: model(pixel_values=x)),
    "other positions": (hf_clip, lambda model, x: model(torch.cat([x, x], -1), interpolate_pos_encoding=True)),
    "images of another dtype": (lambda: hf_vit().half(), lambda model, x: model(x)),
}


@pytest.mark.parametrize("name", list(CALLS))
@torch.inference_mode()
def test_arguments_are_part_of_what_is_repeated(name: str, repeated: list[str]) -> None:
    build, call = CALLS[name]
    theirs, ours = pair(build)
    tolerance = 2e-2 if theirs.dtype == torch.float16 else 1e-4
    for seed in range(4):
        x = images(1, seed=seed)
        close(call(ours, x), call(theirs, x), tolerance)
        close(ours(x), theirs(x), tolerance)
    assert repeated and not whole(ours).replays.refused


@torch.no_grad()
def test_a_mask_is_read_anew_every_time(repeated: list[str]) -> None:
    theirs, ours = pair(hf_vit)
    for keys in (17, 9, 5, 12):
        mask = (torch.arange(17) < keys).long()[None]
        close(ours(images(1), attention_mask=mask), theirs(images(1), attention_mask=mask))


@torch.no_grad()
def test_as_many_patches_as_a_mask_leaves(repeated: list[str]) -> None:
    theirs, ours = pair(_of("VideoMAE", num_frames=2))
    video = torch.stack([images(1), images(1, seed=1)], dim=1)
    for hidden in (4, 4, 4, 10, 10, 6):
        mask = (torch.arange(16) < hidden)[None]
        close(ours(video, bool_masked_pos=mask), theirs(video, bool_masked_pos=mask))
    assert "depends on values" in str(whole(ours).replays.refused)
    for seed in range(4):
        video = torch.stack([images(1, seed=seed), images(1)], dim=1)
        close(ours(video), theirs(video))
    assert len(whole(ours).replays.refused) == 1


@torch.no_grad()
def test_attentions_come_from_the_library(repeated: list[str]) -> None:
    theirs, ours = pair(hf_vit)
    for _ in range(4):
        close(ours(images(1), output_attentions=True), theirs(images(1), output_attentions=True))
    assert "attention_kernel" not in repeated
    (why,) = whole(ours).replays.refused.values()
    assert why == "layers.0 runs the original code: argument output_attentions=True"
    ours(images(1))
    assert "attentions" not in str(reasons(ours))


def mirror(module: Any, arguments: Any, output: Tensor) -> Tensor:
    return output + output.flip(-1)


def hook_on_a_layer(model: Any, _: Any) -> None:
    model.layers[0].register_forward_hook(mirror)


def hook_on_the_pooler(model: Any, _: Any) -> None:
    model.pooler.register_forward_hook(mirror)


def forward_of_a_part(model: Any, _: Any) -> None:
    model.pooler.forward = lambda tokens: tokens[:, 1] * 0.5


def parameter(model: Any, _: Any) -> None:
    model.pooler.dense.weight.mul_(1.5)


def dropped(model: Any, _: Any) -> None:
    model.pooler = None


def setting(model: Any, _: Any) -> None:
    model.config.return_dict = False


def forward_of_the_class(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(model.pooler), "forward", lambda self, tokens: tokens[:, 1] * 0.5)


def forward_of_the_models_class(model: Any, patch: pytest.MonkeyPatch) -> None:
    original = type(model).forward
    patch.setattr(type(model), "forward", lambda self, x: original(self, 2 * x))


def twice(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
    return 2 * value.transpose(1, 2), None


def attention_function(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", twice)


CHANGES = [
    hook_on_a_layer, hook_on_the_pooler, forward_of_a_part, parameter, dropped, setting, forward_of_the_class,
    forward_of_the_models_class, attention_function,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_change_is_never_left_out(
    change: Callable[[Any, Any], None], repeated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = pair(hf_vit, attn_implementation="sdpa")
    for _ in range(3):
        before = ours(images(1))
    assert repeated
    for model in (theirs, ours):
        change(model, monkeypatch)
    for _ in range(3):
        close(ours(images(1)), theirs(images(1)))
    after = theirs(images(1))
    assert type(after) is not type(before) or not all(map(torch.equal, before.values(), after.values()))


@torch.no_grad()
def test_a_forward_of_somebodys_own_inside_is_called_every_time(repeated: list[str]) -> None:
    _, ours = pair(hf_vit)
    calls, original = [], ours.pooler.forward
    ours.pooler.forward = lambda tokens: calls.append(1) or original(tokens)
    for _ in range(4):
        ours(images(1))
    assert len(calls) == 4 and repeated, "the blocks are repeated"
    assert "pooler has a forward() of somebody's own" in str(whole(ours).replays.refused)


@torch.no_grad()
def test_the_loop_is_repeated_where_the_model_is_not(repeated: list[str]) -> None:
    """With the row statistics of its own tokens, which the part before it hands over by no argument."""
    theirs, ours = pair(hf_siglip)
    parts = [model.post_layernorm for model in (theirs, ours)]
    hooks = [part.register_forward_hook(mirror) for part in parts]

    def compare(seeds: range) -> list[str]:
        repeated.clear()
        for seed in seeds:
            close(ours(images(1, seed=seed)), theirs(images(1, seed=seed)))
        return list(repeated)

    (encoder,) = (attached for attached in attached_to(ours) if isinstance(attached, RepeatedEncoder))
    compare(range(3))
    assert compare(range(3, 5)).count("attention_kernel") == 2 * 2
    assert len(encoder.replays._entries) == 1 and not encoder.replays.refused
    for hook in hooks:
        hook.remove()
    compare(range(2))
    assert "patch_embed_kernel" in compare(range(3, 5)) and not whole(ours).replays.refused


def test_what_stands_around_a_vision_model_is_called(repeated: list[str]) -> None:
    """Of CLIP the images' half alone is one of the models that are repeated."""
    text = {**_SIZES, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=_SIZES, projection_dim=16)
    theirs, ours = pair(lambda: ready(transformers.CLIPModel(config)))
    assert whole(ours).module is ours.vision_model
    with torch.no_grad():
        for seed in range(4):
            tokens = torch.tensor([[1, 5 + seed, 2]])
            found, wanted = (model(input_ids=tokens, pixel_values=images(1, seed=seed)) for model in (ours, theirs))
            close(found.logits_per_image, wanted.logits_per_image)
    assert repeated
    with torch.enable_grad():
        ours(input_ids=tokens, pixel_values=images(1)).logits_per_image.sum().backward()
    assert all(p.grad is not None for p in ours.vision_model.parameters() if p.requires_grad)
