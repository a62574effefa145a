"""Parts of transformers' models that somebody changed, where a kernel would not be told."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vit_engine

from .support import DEVICE, close, hf_clip, hf_dinov2, hf_siglip, hf_vit, images, pair, ready, reasons

pytestmark = pytest.mark.interpreted_only


@torch.no_grad()
def test_heads_that_were_pruned_without_a_word_to_the_settings() -> None:
    theirs, ours = pair(hf_vit, num_attention_heads=4)
    close(ours(images(1)), theirs(images(1)))
    for model in (theirs, ours):
        attention = model.layers[0].attention
        for name in ("q_proj", "k_proj", "v_proj"):
            layer = getattr(attention, name)
            kept = nn.Linear(layer.in_features, layer.out_features // 2).to(layer.weight.device)
            kept.weight.copy_(layer.weight[: kept.out_features])
            kept.bias.copy_(layer.bias[: kept.out_features])
            setattr(attention, name, kept)
        layer = attention.o_proj
        kept = nn.Linear(layer.in_features // 2, layer.out_features).to(layer.weight.device)
        kept.weight.copy_(layer.weight[:, : kept.in_features])
        kept.bias.copy_(layer.bias)
        attention.o_proj = kept
    close(ours(images(1)), theirs(images(1)))
    assert "layers.0" not in reasons(ours)


@torch.no_grad()
def test_a_relative_position_bias_of_somebodys_own_is_made_anew() -> None:
    from transformers.models.beit.modeling_beit import BeitRelativePositionBias

    class Scaled(BeitRelativePositionBias):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, *args: Any, **more: Any) -> Tensor:
            return self.factor * super().forward(*args, **more)

    settings = {
        "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "use_relative_position_bias": True,
    }  # fmt: skip
    theirs, ours = pair(lambda: ready(transformers.BeitModel(transformers.BeitConfig(**settings))))
    for model in (theirs, ours):
        own = Scaled(model.config).to(DEVICE)
        own.load_state_dict(model.layers[0].relative_position_bias.state_dict(), strict=False)
        model.layers[0].relative_position_bias = own
    close(ours(images(1)), theirs(images(1)))
    for model in (theirs, ours):
        model.layers[0].relative_position_bias.factor.fill_(3.0)
    close(ours(images(1)), theirs(images(1)))
    assert "relative_position_bias is" in str(reasons(ours))


def _reversed_ids(embeddings: Any) -> None:
    embeddings.position_ids = embeddings.position_ids.flip(1)


def _written_ids(embeddings: Any) -> None:
    embeddings.position_ids = embeddings.position_ids.clone()
    embeddings.position_ids[0, :2] = 3


def _max_norm(embeddings: Any) -> None:
    embeddings.position_embedding.max_norm = 0.1


@pytest.mark.parametrize("change", [_reversed_ids, _written_ids, _max_norm])
@pytest.mark.parametrize("build", [hf_clip, hf_siglip])
@torch.no_grad()
def test_positions_that_are_not_the_rows_of_their_table(build: Any, change: Any) -> None:
    theirs, ours = pair(build)
    close(ours(images(1)), theirs(images(1)))
    for model in (theirs, ours):
        change(model.embeddings)
    close(ours(images(1)), theirs(images(1)))
    assert "embeddings" in reasons(ours)


@torch.no_grad()
def test_positions_out_of_order_in_a_graph_and_under_a_mode() -> None:
    theirs = hf_clip()
    _reversed_ids(theirs.embeddings)
    ours = vit_engine.accelerate(copy.deepcopy(theirs))
    exported = torch.export.export(ours, (images(1),)).module()
    close(exported(images(1)), theirs(images(1)))
    other = vit_engine.accelerate(hf_clip())
    _reversed_ids(other.embeddings)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        other(mode.from_tensor(images(1)))
    close(other(images(1)), theirs(images(1)))


@pytest.mark.parametrize("where", ["class", "instance", "subclass"])
@torch.no_grad()
def test_a_way_of_resizing_positions_of_somebodys_own(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(hf_dinov2)
    close(ours(images(1)), theirs(images(1)))  # whose positions are kept

    def resize(self: Any, tokens: Tensor, height: int, width: int) -> Tensor:
        return 3 * self.position_embeddings

    kind = type(ours.embeddings)
    for model in (theirs, ours):
        if where == "class":
            monkeypatch.setattr(kind, "interpolate_pos_encoding", resize)
        elif where == "instance":
            model.embeddings.interpolate_pos_encoding = types.MethodType(resize, model.embeddings)
        else:
            model.embeddings.__class__ = type("Own", (kind,), {"interpolate_pos_encoding": resize})
    close(ours(images(1)), theirs(images(1)))
    assert "embeddings" in reasons(ours)
