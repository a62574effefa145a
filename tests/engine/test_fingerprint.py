"""What a `Fingerprint` sees of a module that is no longer what it was, without a pass being made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vit_bench.whole_model import SMALL
from vit_engine import ViT
from vit_engine.fingerprint import Fingerprint


def set_forward(vit: Any) -> None:
    vit.blocks[0].forward = lambda x: x


def train(vit: Any) -> None:
    vit.blocks[0].mlp.train()


def change_class(vit: Any) -> None:
    vit.blocks[0].mlp.__class__ = type("Other", (type(vit.blocks[0].mlp),), {})


@pytest.mark.parametrize("change", [set_forward, train, change_class], ids=lambda change: change.__name__)
def test_other_code_is_seen(change: Callable[[ViT], None]) -> None:
    vit = ViT(SMALL).eval()
    fingerprint = Fingerprint(vit)
    assert fingerprint.holds()
    change(vit)
    assert not fingerprint.holds()


def test_a_fingerprint_knows_tensors_of_inference_mode_by_address() -> None:
    with torch.inference_mode():
        layer = torch.nn.Linear(2, 2)
        fingerprint = Fingerprint(layer)
        assert fingerprint.holds()
        layer.weight = torch.nn.Parameter(layer.weight.clone())
        assert not fingerprint.holds()


def test_hooks_that_only_listen_may_be_left_out() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    layer[0].register_forward_hook(print)
    assert not Fingerprint(layer).usable
    fingerprint = Fingerprint(layer, listens=lambda hook: hook is print)
    assert fingerprint.holds()
    layer[0]._forward_hooks.clear()
    layer[0].register_forward_hook(print)
    assert not fingerprint.holds(), "a hook in the place of another"
