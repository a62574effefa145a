"""`attn_implementation="vit_engine"` in models of Hugging Face transformers, against "eager" with the same weights."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, StaticCache

import vit_engine
from tests.engine.redraw import redraw, relative
from tests.rung import DEVICE, RUNG, child_environment
from vit_bench.tolerance import check
from vit_engine.dropin.transformers_attention import attention_forward, attention_mask_of

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


def test_gradients_are_refused() -> None:
    _, ours = bert()
    with pytest.raises(NotImplementedError, match="attn_implementation='vit_engine' has no backward pass"):
        ours(input_ids=TOKENS.to(DEVICE))
    with torch.inference_mode():
        ours(input_ids=TOKENS.to(DEVICE))
    with torch.no_grad(), pytest.raises(ValueError, match=r"does not support dropout; got 0\.1"):
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
assert not {"torch", "transformers"} & set(sys.modules)
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
