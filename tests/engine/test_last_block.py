"""The last block behind which the class token alone is read: the first token of the whole block, and no other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.mlp import SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tests.engine.redraw import redraw, small_vit
from tests.rung import DEVICE
from vit_bench import tolerance
from vit_engine import encoder_block
from vit_engine.derived import DerivedCache
from vit_engine.dropin.parts import describe_block
from vit_engine.encoder_block import AttentionInputs, queries_apart, run_block

BATCH, TOKENS, WIDTH = 3, 21, 64
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Block(WIDTH, 2, qkv_bias=True),
    "no biases": lambda: Block(WIDTH, 2, qkv_bias=False, proj_bias=False),
    "layer scale, normalised heads": lambda: Block(WIDTH, 4, qkv_bias=True, qk_norm=True, init_values=0.5),
    "norms inside, swiglu": lambda: Block(
        WIDTH, 2, scale_attn_norm=True, scale_mlp_norm=True, mlp_layer=SwiGLU, act_layer=nn.SiLU
    ),
}


@pytest.fixture(params=[True, False], ids=["queries apart", "one product"])
def apart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(encoder_block, "queries_apart", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "norms apart"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.sanitize) if n == "plain" else n for n in BLOCKS])
@torch.no_grad()
def test_it_is_the_first_token_of_the_whole_block(name: str, fold: bool, apart: bool) -> None:
    dtype = torch.float16
    block = redraw(BLOCKS[name]().eval()).to(dtype).to(DEVICE)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    rows, stats = run_block(
        describe_block(block).plan, x.view(-1, WIDTH), None, (BATCH, TOKENS), DerivedCache(), "it", fold=fold,
        first_token=True,
    )  # fmt: skip
    truth = copy.deepcopy(block).double()(x.double())[:, 0]
    tolerance.check(rows.cpu(), block(x)[:, 0].cpu(), truth.cpu(), name=name)
    partials = rows.double().unflatten(1, (-1, 64))
    mean = partials.mean(2).T
    expected = torch.stack([mean, ((partials - mean.T[..., None]) ** 2).sum(2).T])
    torch.testing.assert_close(stats.double(), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_statistics_that_are_known_are_used(apart: bool) -> None:
    block = redraw(BLOCKS["plain"]().eval()).to(DEVICE)
    x = torch.randn(BATCH * TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    plan = describe_block(block).plan

    def first(stats: Tensor | None) -> Tensor:
        return run_block(plan, x, stats, (BATCH, TOKENS), DerivedCache(), "it", first_token=True)[0]

    known = encoder_block.ops.row_stats(x)
    assert torch.equal(first(known), first(None))
    assert not torch.equal(first(known + 1), first(None)), "keys and values are normalised by them"


@pytest.mark.parametrize("inputs", [AttentionInputs(causal=True), AttentionInputs(mask=torch.zeros(1, 1, 3, 3))])
def test_orders_and_masks_are_refused(inputs: AttentionInputs) -> None:
    plan: Any = None
    with pytest.raises(ValueError, match="first_token must be False with a mask or a causal order; got True"):
        run_block(plan, torch.empty(3, 8), None, (1, 3), DerivedCache(), "it", inputs, first_token=True)


def test_queries_are_apart_where_there_are_many() -> None:
    for rows, width, apart in ((8 * 197, 768, False), (64 * 197, 768, True), (64 * 197, 384, False)):
        assert queries_apart(rows, width, width) is apart, (rows, width)


@pytest.mark.parametrize("more", [{}, {"num_register_tokens": 2}, {"head": "pretrain"}, {"num_classes": 0}], ids=str)
@torch.no_grad()
def test_logits_are_those_of_the_features(more: dict[str, Any], apart: bool) -> None:
    model = small_vit(**more).float().to(DEVICE).set_backend("interpret" if DEVICE == "cpu" else "triton")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "width", "anew"), [
    (torch.float32, 1088, True), (torch.float32, 1024, False), (torch.float16, 1088, False),
])  # fmt: skip
@torch.no_grad()
def test_many_partial_statistics_of_few_rows_in_fp32_become_one(dtype: torch.dtype, width: int, anew: bool) -> None:
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(3)).to(dtype).to(DEVICE)
    known = torch.empty(2, -(-width // 64), 2, device=x.device)
    stats = encoder_block.stats_of_few(x, known)
    assert (stats is known) is not anew
    if anew:
        assert torch.equal(stats, encoder_block.ops.row_stats(x)) and stats.shape == (2, 1, 2)
