"""The table of shapes: what is in it, how it is narrowed down, and that FLOP and bytes are those of the problem."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from vit_bench.plan import BATCHES
from vit_bench.timed.shapes import MODELS, TOKENS, Case, select, table
from vit_bench.timed.work import work


def case(name: str) -> Case:
    (found,) = select(only=[name])
    return found


def test_every_size_at_every_resolution_and_batch():
    names = [one.name for one in table()]
    assert len(set(names)) == len(names)
    assert len(MODELS) == 15
    widths = {192: 0, 384: 0, 768: 0, 1024: 0, 1280: 0}
    for name, config in MODELS.items():
        widths[config.embed_dim] += 1
        assert config.image_size in (224, 384, 518) or name == "vit_huge_patch14_378"
        assert {one.batch for one in table() if one.model == name and one.suite == "model"} == set(BATCHES)
    assert set(widths.values()) == {3}
    attention = [one for one in table() if one.suite == "attention"]
    assert {one.shape["head_dim"] for one in attention} == {64, 72, 80, 128}
    assert {one.shape["tokens"] for one in attention} == set(TOKENS) and {50, 16384} <= set(TOKENS)
    labels = {one.label for one in table() if one.suite == "kernels"}
    assert {"stem", "qkv", "attention", "projection", "mlp", "final norm, class token", "head"} == labels


def test_flop_are_those_that_papers_count():
    # ViT-B/16 and ViT-L/16 by image, as published: 35.1, 111 and 123 GFLOP with a multiply-add as two. That is with all
    # tokens behind the last block's attention, of which the head reads one.
    for name, published in (("base_patch16_224", 35.13), ("base_patch16_384", 110.97), ("large_patch16_224", 123.1)):
        found = case(f"model/vit_{name}/b1")
        assert found.config is not None
        tokens, width = found.config.num_tokens, found.config.embed_dim
        unread = (tokens - 1) * (2 * 9 * width**2 + 4 * tokens * width)
        flops, _ = work(found, torch.bfloat16)
        assert (flops + unread) / 1e9 == pytest.approx(published, rel=1e-3)
    one, many = (work(case(f"model/vit_small_patch16_224/b{batch}"), torch.bfloat16) for batch in (1, 64))
    assert many[0] == 64 * one[0] and one[1] < many[1] < 64 * one[1], "weights are read once a batch"


def test_bytes_count_every_operand_once_in_its_dtype():
    rows, width = 8 * 197, 192
    attention = case("kernels/vit_tiny_patch16_224/b8/attention")
    assert work(attention, torch.bfloat16) == (4 * 8 * 3 * 197 * 197 * 64, 2 * 4 * rows * width)
    assert work(attention, torch.float32)[1] == 2 * work(attention, torch.bfloat16)[1]
    weights, statistics = width * width + width, 2 * 3 * rows * 4
    projection = case("kernels/vit_tiny_patch16_224/b8/projection")
    # x, residual and y, weight and bias in 2 bytes; the row statistics that it leaves behind in fp32
    assert work(projection, torch.bfloat16) == (2 * rows * width * width, 2 * (3 * rows * width + weights) + statistics)


def test_a_forward_is_the_sum_of_its_calls():
    model = case("model/vit_base_patch16_224/b64")
    calls = model.calls(torch.bfloat16)
    parts = [replace(model, suite="kernels", label=call.label) for call in calls]
    found = [(call.times, *work(one, torch.bfloat16)) for call, one in zip(calls, parts, strict=True)]
    whole = work(model, torch.bfloat16)
    assert len(found) > len(select(("kernels",), ["vit_base_patch16_224"], [64])), "the last block's are among them"
    assert whole == (sum(t * f for t, f, _ in found), sum(t * b for t, _, b in found))


def test_shapes_of_rows_are_those_of_the_calls():
    for one in select(("kernels",), batches=[8]):
        (call,) = one.calls(torch.bfloat16)
        flops = work(one, torch.bfloat16)[0]
        m, n, k = (one.shape.get(name, 0) for name in "mnk")
        if one.label == "mlp":
            assert flops == 2 * 2 * m * n * k, one
        elif call.kernel in ("linear", "patch_embed"):
            assert flops == 2 * m * n * k, one
        elif call.kernel == "attention":
            heads, width, tokens = (one.shape[name] for name in ("heads", "head_dim", "tokens"))
            assert flops == 4 * 8 * heads * tokens**2 * width, one


def test_cases_are_selected_by_all_that_is_asked_for():
    assert [str(one) for one in select(("model",), ["vit_tiny*224"], [1, 8])] == [
        "model/vit_tiny_patch16_224/b1",
        "model/vit_tiny_patch16_224/b8",
    ]
    heads = {(one.shape["heads"], one.shape["head_dim"]) for one in select(("attention",), ["vit_huge*"])}
    assert heads == {(16, 80)}, "attention alone belongs to the models with its heads"
    assert len(select(only=["*/qkv"])) == 15 * 4
    assert select(("model",), only=["kernels/*"]) == []


@pytest.mark.parametrize(
    ("options", "argument", "words"),
    [
        ({"models": ["vit_giant*"]}, "models", "'vit_giant*' matches nothing in the table of shapes: vit_tiny"),
        ({"batches": [1, 3]}, "batches", "3 matches nothing in the table of shapes: 1, 8, 64, 256"),
        ({"only": ["*b64*", "head"]}, "only", "'head' matches nothing in the table of shapes; `vit-engine bench"),
    ],
    ids=["model", "batch", "only"],
)
def test_what_matches_nothing_is_refused(options, argument, words):
    with pytest.raises(ValueError, match=re.escape(words)) as failure:
        select(**options)
    assert failure.value.args[0] == argument
