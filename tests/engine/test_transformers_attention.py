"""`attn_implementation="vit_engine"` in models of Hugging Face transformers, against "eager" with the same weights."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, StaticCache

import vit_engine
from tests.engine.redraw import redraw, relative
from tests.rung import DEVICE, RUNG, child_environment
from vit_bench.tolerance import check
from vit_engine.dropin.transformers_attention import HARMLESS, attention_forward, attention_mask_of

transformers.logging.set_verbosity_error()
vit_engine.register_attention()

NAME = "vit_engine"
TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
VISION: dict[str, Any] = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 24,
    "patch_size": 8,
}
TOKENS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
LEFT = RIGHT.flip(1)


def eager_and_ours(model_class: Any, config: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(transformers' eager model on the CPU, ours on the device), same weights, each of which matters."""
    eager = model_class._from_config(config, attn_implementation="eager").eval()
    redraw(eager)
    eager = eager.to(dtype)
    ours = copy.deepcopy(eager).to(DEVICE)
    ours.set_attn_implementation(NAME)
    assert ours.config._attn_implementation == NAME and eager.config._attn_implementation == "eager"
    return eager, ours


def placed(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def bert(**more: Any) -> tuple[Any, Any]:
    return eager_and_ours(transformers.BertModel, transformers.BertConfig(**{**TEXT, **more}))


def gpt2() -> tuple[Any, Any]:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return eager_and_ours(transformers.GPT2LMHeadModel, config)


def qwen2() -> tuple[Any, Any]:
    return eager_and_ours(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**GROUPED))


def assert_same_hidden_states(pair: tuple[Any, Any], rows: Tensor | None = None, **inputs: Any) -> None:
    """All hidden states, in the rows given."""
    eager, ours = pair
    theirs = eager(**inputs, output_hidden_states=True).hidden_states
    mine = ours(**placed(inputs), output_hidden_states=True).hidden_states
    assert len(theirs) == len(mine) > 2
    for a, b in zip(mine, theirs, strict=True):
        a = a.cpu()
        assert torch.isfinite(a).all()
        assert relative(a, b) < 1e-5 if rows is None else relative(a[rows], b[rows]) < 1e-5


@torch.no_grad()
def test_bidirectional_with_padding() -> None:
    """Queries that are padding attend as the others do, so they count too."""
    pair = bert()
    assert_same_hidden_states(pair, input_ids=TOKENS, attention_mask=RIGHT)
    assert_same_hidden_states(pair, input_ids=TOKENS)


@torch.no_grad()
def test_padding_does_not_reach_the_others() -> None:
    _, ours = bert()
    ids, mask = TOKENS.to(DEVICE), RIGHT.to(DEVICE)
    padded = ours(input_ids=ids, attention_mask=mask)[0]
    other = ours(input_ids=torch.where(mask.bool(), ids, 7), attention_mask=mask)[0]
    assert torch.equal(padded[mask.bool()], other[mask.bool()])
    assert not torch.equal(padded, other)


@torch.no_grad()
def test_without_the_mask_function_padding_is_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second registration is for: transformers drops the mask of an implementation it knows no masks of."""
    eager, ours = bert()
    theirs = eager(input_ids=TOKENS, attention_mask=RIGHT)[0]
    inputs = placed({"input_ids": TOKENS, "attention_mask": RIGHT})
    assert relative(ours(**inputs)[0].cpu(), theirs) < 1e-5
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, NAME)
    assert relative(ours(**inputs)[0].cpu(), theirs) > 1e-2
    vit_engine.register_attention()
    assert relative(ours(**inputs)[0].cpu(), theirs) < 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mask", [LEFT, torch.ones_like(LEFT)], ids=["left-padded", "whole"])
@torch.no_grad()
def test_greedy_generation(mask: Tensor, cache: str) -> None:
    """Prefill and one query at a time against the cache; a static one has keys beyond those that were written."""
    more = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    answers = []
    for model, inputs in zip(gpt2(), ({"input_ids": TOKENS, "attention_mask": mask},) * 2, strict=True):
        inputs = {name: x.to(model.device) for name, x in inputs.items()}
        answers.append(
            model.generate(
                **inputs, do_sample=False, max_new_tokens=4, min_new_tokens=4, output_logits=True,
                return_dict_in_generate=True, **more,
            )
        )  # fmt: skip
    theirs, ours = answers
    assert ours.sequences.shape == (2, 11) and torch.equal(ours.sequences.cpu(), theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert relative(a.cpu(), b) < 1e-5


@torch.no_grad()
def test_grouped_heads() -> None:
    pair = qwen2()
    assert_same_hidden_states(pair, input_ids=TOKENS)
    assert_same_hidden_states(pair, LEFT.bool(), input_ids=TOKENS, attention_mask=LEFT)


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@torch.no_grad()
def test_prefill_in_two_parts(cache: type) -> None:
    """More than one query and more keys than queries, once with the cache behind them empty and once not."""
    eager, ours = qwen2()
    states = cache(config=ours.config, **({"max_cache_len": 12} if cache is StaticCache else {}))
    parts = [ours(input_ids=ids.to(DEVICE), past_key_values=states).logits.cpu() for ids in TOKENS.split([4, 3], 1)]
    assert relative(torch.cat(parts, 1), eager(input_ids=TOKENS).logits) < 1e-5


@torch.no_grad()
def test_sliding_window() -> None:
    config = transformers.MistralConfig(**GROUPED, sliding_window=3)
    eager, ours = eager_and_ours(transformers.MistralForCausalLM, config)
    assert_same_hidden_states((eager, ours), input_ids=TOKENS)
    eager.config.sliding_window = None
    assert relative(ours(input_ids=TOKENS.to(DEVICE)).logits.cpu(), eager(input_ids=TOKENS).logits) > 1e-2


@torch.no_grad()
def test_cross_attention() -> None:
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    inputs = {"encoder_hidden_states": states, "encoder_attention_mask": RIGHT[:, 1:6]}
    pair = bert(is_decoder=True, add_cross_attention=True)
    assert_same_hidden_states(pair, LEFT.bool(), input_ids=TOKENS, attention_mask=LEFT, **inputs)


VISION_MODELS = {
    "vit": (transformers.ViTModel, transformers.ViTConfig),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
}


@pytest.mark.parametrize("name", VISION_MODELS)
@torch.no_grad()
def test_vision(name: str) -> None:
    model, config = VISION_MODELS[name]
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    assert_same_hidden_states(eager_and_ours(model, config(**VISION)), pixel_values=images)


@torch.no_grad()
def test_half_precision() -> None:
    eager, ours = eager_and_ours(transformers.ViTModel, transformers.ViTConfig(**VISION), torch.float16)
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2)).half()
    truth = copy.deepcopy(eager).double()(pixel_values=images.double())
    results = ours(pixel_values=images.to(DEVICE)), eager(pixel_values=images), truth
    check(*(result.last_hidden_state.cpu() for result in results), name="ViT")


class Layer(nn.Module):
    """What an attention function sees of the layer that calls it."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


def qkv(queries: int = 5, keys: int = 5, width: int = 8, batch: int = 2, dtype: Any = torch.float32) -> list[Tensor]:
    """query [B, 4, Nq, D], key and value [B, 2, Nk, D] on the device."""
    generator = torch.Generator().manual_seed(3)
    shapes = (batch, 4, queries, width), (batch, 2, keys, width), (batch, 2, keys, width)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def formula(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, scale: float | None = None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    return (s if allowed is None else s.masked_fill(~allowed, float("-inf"))).softmax(3).matmul(v).transpose(1, 2)


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [x.cpu().double() for x in tensors]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_layer(dtype: torch.dtype) -> None:
    """Grouped heads, a mask per image, a scale: within twice eager's error of float64."""
    tensors = qkv(6, 9, dtype=dtype)
    allowed = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(4)) > 0.4
    ours, weights = attention_forward(Layer(True), *tensors, allowed.to(DEVICE), scaling=0.5)
    assert weights is None
    eager = formula(*(x.cpu() for x in tensors), allowed, 0.5)
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
    theirs, _ = AttentionInterface()["sdpa"](layer(module), *tensors, None, is_causal=argument)
    assert relative(ours, theirs) < 1e-5


def layer(is_causal: bool) -> Layer:
    """For transformers' own integration, which has to be told to repeat key and value heads."""
    module = Layer(is_causal)
    module.num_key_value_groups = 2  # type: ignore[assignment]
    return module


def test_a_layer_that_does_not_say_is_causal() -> None:
    tensors = qkv()
    ours, _ = attention_forward(nn.Module(), *tensors, None)
    assert relative(ours.cpu().double(), formula(*double(tensors), LOWER)) < 1e-5


@pytest.mark.parametrize("keys", [3, 7])
def test_causal_without_a_mask_needs_as_many_keys_as_queries(keys: int) -> None:
    with pytest.raises(ValueError, match=f"attention_mask must be given for causal attention of 5 queries to {keys} keys"):
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
    half, _ = attention_forward(Layer(False), *(x.half() for x in tensors), None)
    assert ours.dtype == torch.float16 and torch.equal(ours, half)


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


def test_gradients_are_refused() -> None:
    _, ours = bert()
    with pytest.raises(NotImplementedError, match="attn_implementation='vit_engine' has no backward pass"):
        ours(input_ids=TOKENS.to(DEVICE))
    with torch.inference_mode():
        ours(input_ids=TOKENS.to(DEVICE))
    with torch.no_grad(), pytest.raises(ValueError, match="does not support dropout; got 0.1"):
        ours.train()(input_ids=TOKENS.to(DEVICE))


REFUSED_MODELS = {
    "softcap": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**GROUPED, head_dim=8)),
    "s_aux": (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=2),
    ),
    "position_bias": (
        transformers.T5EncoderModel,
        transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, num_layers=1, num_heads=4, d_ff=48),
    ),
    "is not supported by BloomPreTrainedModel": (
        transformers.BloomForCausalLM,
        transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4),
    ),
}


@pytest.mark.parametrize("what", REFUSED_MODELS)
@torch.no_grad()
def test_models_that_are_refused(what: str) -> None:
    model_class, config = REFUSED_MODELS[what]
    model = model_class._from_config(config, attn_implementation=NAME).eval().to(DEVICE)
    with pytest.raises(ValueError, match=rf"attn_implementation='vit_engine' .*{what}"):
        model(input_ids=TOKENS.to(DEVICE))


@torch.no_grad()
def test_attention_weights_are_refused() -> None:
    _, ours = bert()
    with pytest.raises(ValueError, match="does not support output_attentions; got True"):
        ours(input_ids=TOKENS.to(DEVICE), output_attentions=True)


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


@torch.no_grad()
def test_registering_twice_and_switching_back() -> None:
    vit_engine.register_attention()
    assert AttentionInterface()[NAME] is attention_forward and AttentionMaskInterface()[NAME] is attention_mask_of
    eager, ours = bert()
    theirs = eager(input_ids=TOKENS)[0]
    loaded = type(eager)._from_config(eager.config, attn_implementation=NAME).eval()
    loaded.load_state_dict(eager.state_dict())
    assert relative(loaded.to(DEVICE)(input_ids=TOKENS.to(DEVICE))[0].cpu(), theirs) < 1e-5
    ours.set_attn_implementation("eager")
    assert relative(ours(input_ids=TOKENS.to(DEVICE))[0].cpu(), theirs) < (1e-5 if RUNG == "executed" else 1e-30)


def test_importing_does_not_import_transformers() -> None:
    code = """
import sys, vit_engine, vit_engine.dropin
assert "register_attention" in dir(vit_engine)
from vit_engine import *
assert "transformers" not in sys.modules
register_attention()
assert "transformers" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], env=child_environment(), check=True, timeout=300)


@pytest.mark.slow
@pytest.mark.interpreted_only
@pytest.mark.parametrize("mask", [None, LEFT], ids=["no mask", "left-padded"])
@torch.no_grad()
def test_compiles_as_one_graph(mask: Tensor | None) -> None:
    eager, ours = qwen2()
    rows = slice(None) if mask is None else mask.bool()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    theirs = eager(input_ids=TOKENS, attention_mask=mask, use_cache=False).logits
    assert relative(compiled(input_ids=TOKENS, attention_mask=mask, use_cache=False).logits[rows], theirs[rows]) < 1e-5
