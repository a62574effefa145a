"""What transformers' models get from the attention function and the mask function that we register, called directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface

from tests.engine.redraw import relative
from tests.rung import DEVICE
from vit_bench.tolerance import check
from vit_engine.dropin.transformers_attention import HARMLESS, attention_forward, attention_mask_of

RIGHT = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


class Layer(nn.Module):
    """What an attention function sees of the layer that calls it."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        # transformers' own integration has to be told to repeat key and value heads.
        self.num_key_value_groups: Any = 2


QKV = tuple[Tensor, Tensor, Tensor]


def qkv(queries: int = 5, keys: int = 5, width: int = 8, batch: int = 2, dtype: torch.dtype = torch.float32) -> QKV:
    """query [B, 4, Nq, D], key and value [B, 2, Nk, D] on the device."""
    generator = torch.Generator().manual_seed(3)

    def draw(heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, width, generator=generator).to(DEVICE, dtype)

    return draw(4, queries), draw(2, keys), draw(2, keys)


def formula(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, scale: float | None = None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    return (s if allowed is None else s.masked_fill(~allowed, float("-inf"))).softmax(3).matmul(v).transpose(1, 2)


def double(tensors: QKV) -> QKV:
    query, key, value = (x.cpu().double() for x in tensors)
    return query, key, value


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_layer(dtype: torch.dtype) -> None:
    """Grouped heads, a mask per image, a scale: within twice eager's error of float64."""
    tensors = qkv(6, 9, dtype=dtype)
    allowed = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(4)) > 0.4
    ours, weights = attention_forward(Layer(True), *tensors, allowed.to(DEVICE), scaling=0.5)
    assert weights is None
    query, key, value = (x.cpu() for x in tensors)
    eager = formula(query, key, value, allowed, 0.5)
    check(ours.cpu(), eager, formula(*double(tensors), allowed, 0.5), name="boolean")
    additive = torch.where(allowed, 0.0, torch.finfo(dtype).min).to(DEVICE, dtype)
    ours, _ = attention_forward(Layer(True), *tensors, additive, scaling=0.5)
    check(ours.cpu(), eager, formula(*double(tensors), allowed, 0.5), name="additive")


LOWER = torch.ones(5, 5, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("module", "argument", "queries", "allowed"),
    [
        (True, None, 5, LOWER),
        (False, None, 5, None),
        (True, False, 5, None),
        (False, True, 5, LOWER),
        (True, None, 1, None),  # the newest token sees all that came before
        (False, None, 3, None),
    ],
)
def test_when_it_is_causal(module: bool, argument: bool | None, queries: int, allowed: Tensor | None) -> None:
    tensors = qkv(queries)
    ours, _ = attention_forward(Layer(module), *tensors, None, is_causal=argument)
    assert relative(ours.cpu().double(), formula(*double(tensors), allowed)) < 1e-5
    theirs, _ = AttentionInterface()["sdpa"](Layer(module), *tensors, None, is_causal=argument)
    assert relative(ours, theirs) < 1e-5


def test_a_layer_that_does_not_say_is_causal() -> None:
    tensors = qkv()
    ours, _ = attention_forward(nn.Module(), *tensors, None)
    assert relative(ours.cpu().double(), formula(*double(tensors), LOWER)) < 1e-5


@pytest.mark.parametrize("keys", [3, 7])
def test_causal_without_a_mask_needs_as_many_keys_as_queries(keys: int) -> None:
    with pytest.raises(ValueError, match=f"attention_mask must be given .* 5 queries to {keys} keys"):
        attention_forward(Layer(True), *qkv(5, keys), None)


def test_a_query_without_keys_gives_zero() -> None:
    tensors = qkv()
    allowed = LOWER.clone()
    allowed[0] = False
    ours, _ = attention_forward(Layer(True), *tensors, allowed[None, None].to(DEVICE))
    assert not ours[:, 0].any()
    assert relative(ours[:, 1:].cpu().double(), formula(*double(tensors), allowed)[:, 1:]) < 1e-5


def test_queries_shared_by_all_images() -> None:
    query, key, value = qkv()
    ours, _ = attention_forward(Layer(False), query[:1], key, value, None)
    both, _ = attention_forward(Layer(False), query[:1].repeat(2, 1, 1, 1), key, value, None)
    assert ours.shape == (2, 5, 4, 8) and torch.equal(ours, both)


def test_values_narrower_than_keys() -> None:
    query, key, value = qkv()
    ours, _ = attention_forward(Layer(False), query, key, value[..., :5], None)
    assert ours.shape == (2, 5, 4, 5)
    assert torch.equal(ours, attention_forward(Layer(False), query, key, value, None)[0][..., :5])


def test_autocast() -> None:
    tensors = qkv()
    with torch.autocast(torch.device(DEVICE).type, torch.float16):
        ours, _ = attention_forward(Layer(False), *tensors, None)
    half, _ = attention_forward(Layer(False), *qkv(dtype=torch.float16), None)
    assert ours.dtype == torch.float16 and torch.equal(ours, half)


@pytest.mark.interpreted_only
def test_bfloat16_in_the_interpreter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16 in Triton's interpreter.*; use float32 or float16 with it"):
        attention_forward(Layer(False), *qkv(dtype=torch.bfloat16), None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softcap", 50.0),
        ("sliding_window", 4),
        ("s_aux", torch.zeros(4)),
        ("dropout", 0.1),
        ("output_attentions", True),
        ("head_mask", torch.ones(4)),
        ("position_bias", torch.zeros(1, 4, 5, 5)),
        ("cu_seq_lens_q", torch.tensor([0, 5])),
        ("cu_seq_lens_k", torch.tensor([0, 5])),
        ("max_length_q", 5),
        ("indices", torch.zeros(1)),
        ("block_table", torch.zeros(1)),
        ("something_new", False),
    ],
)
def test_arguments_that_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"attn_implementation='vit_engine' does not support {name}; got"):
        attention_forward(Layer(False), *qkv(), None, **{name: value})


def test_arguments_that_ask_for_nothing() -> None:
    tensors = qkv()
    plain, _ = attention_forward(Layer(True), *tensors, None)
    nothing: dict[str, Any] = dict.fromkeys(("softcap", "s_aux", "position_bias", "something_new", "sliding_window"))
    harmless = dict.fromkeys(HARMLESS, torch.ones(1))
    more, _ = attention_forward(
        Layer(True), *tensors, None, dropout=0.0, output_attentions=False, **nothing, **harmless
    )
    assert torch.equal(more, plain)
    wide, _ = attention_forward(Layer(True), *tensors, None, sliding_window=5)
    masked, _ = attention_forward(Layer(True), *tensors, LOWER[None, None].to(DEVICE), sliding_window=2)
    assert torch.equal(wide, plain)
    assert relative(masked, plain) < 1e-6


def test_shapes_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[B, H, Nq, Nk\]; got \(2, 5\)"):
        attention_forward(Layer(False), *qkv(batch=2), torch.ones(2, 5, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match="head width from 1 to 128"):
        attention_forward(Layer(False), *qkv(width=129), None)


def test_masks() -> None:
    """None only where attention needs none: all keys, or queries and keys that are the same tokens."""
    config, padding = transformers.BertConfig(), RIGHT.bool()
    sizes: dict[str, Any] = {"config": config, "batch_size": 2, "q_length": 7, "kv_length": 7}
    assert attention_mask_of(**sizes) is None
    assert attention_mask_of(**sizes, attention_mask=torch.ones_like(padding)) is None
    causal = attention_mask_of(**sizes, attention_mask=padding)
    assert causal is not None and torch.equal(causal[:, 0], torch.ones(7, 7).tril().bool() & padding[:, None])
    ahead = attention_mask_of(**{**sizes, "kv_length": 9})
    assert ahead is not None and torch.equal(ahead, torch.ones(7, 9).tril().bool().expand(2, 1, 7, 9))
    assert attention_mask_of(**{**sizes, "q_length": 1}) is None
    assert attention_mask_of(**sizes, allow_is_causal_skip=False) is not None
