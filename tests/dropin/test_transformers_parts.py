"""Parts of transformers' models that somebody changed, where a kernel would not be told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .support import close, hf_vit, images, pair, reasons

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
