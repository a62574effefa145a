"""A ViT on the kernels under torch.compile, in one graph, before any other pass has been made."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch._dynamo

from tests.engine.redraw import redraw
from vit_bench.whole_model import SMALL
from vit_engine import ViT

pytestmark = pytest.mark.interpreted_only

TINY = dataclasses.replace(SMALL, depth=1, embed_dim=32, num_heads=2, image_size=16, num_register_tokens=0)
HEADS = {
    "class token": TINY,
    "pre-training head": dataclasses.replace(TINY, head="pretrain"),
    "mean": dataclasses.replace(TINY, class_token=False, global_pool="avg"),
    "attention pooling": dataclasses.replace(TINY, class_token=False, global_pool="map"),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", list(HEADS))
@torch.no_grad()
def test_a_model_that_never_ran_is_one_graph(name: str) -> None:
    """What repeats passes has locks, which no graph can hold."""
    model = ViT(HEADS[name], backend="interpret").eval()
    redraw(model)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(model)(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    features = torch.compile(model.forward_features, fullgraph=True, backend="eager")
    torch.testing.assert_close(features(x), copy.deepcopy(model).forward_features(x), rtol=1e-4, atol=1e-5)
