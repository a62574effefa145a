"""Methods that users replace on a class, which reaches every instance: the original runs, and explain() says why."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import timm.models.vision_transformer as timm_vit
import torch
import torch._dynamo
import torchvision.models.vision_transformer as torchvision_vit
import transformers
from torch import Tensor, nn
from transformers.models.vit import modeling_vit

import vit_engine
from vit_engine.class_code import replaced

from .support import (
    close,
    differs,
    hf_vit,
    images,
    kernels,
    launches_of,
    reasons,
    timm_model,
    torchvision_model,
    watched,
)

pytestmark = pytest.mark.interpreted_only


def hf_classifier(**more: Any) -> Any:
    return hf_vit(transformers.ViTForImageClassification, num_labels=5, **more)


def pooling(**more: Any) -> Any:
    return timm_model(class_token=False, global_pool="map", **more)


# As small as has all parts: the interpreter takes its time.
ONE_BLOCK: dict[Any, dict[str, int]] = {
    timm_model: {"depth": 1}, pooling: {"depth": 1}, torchvision_model: {"num_layers": 1},
    hf_vit: {"num_hidden_layers": 1}, hf_classifier: {"num_hidden_layers": 1},
}  # fmt: skip


def mixed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Other results, which no norm undoes, under the names of the original."""

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        first = found if isinstance(found, Tensor) else found[0]
        first = first + first.flip(-1) * 0.5
        return first if isinstance(found, Tensor) else (first, *found[1:])

    return method


def pool_of_all_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, x, *more: x.mean(1)


def head_of_all_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, x: self.head(x.mean(1))


def logits_of_all_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, pixel_values, **more: (self.classifier(self.vit(pixel_values)[0].mean(1)),)


def all_tokens_to_the_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """A backbone whose first token is made of all."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        found["last_hidden_state"] = found["last_hidden_state"].mean(1, keepdim=True)
        return found

    return method


TIMM = timm_vit.VisionTransformer
LAYERS: Any = timm.layers  # timm exports these without saying so
# The model, the class, its method, what replaces it; what explain() says of which module (None: it runs anyway).
Case = tuple[Callable[..., Any], type, str, Callable[..., Any], str | None, str]
CASES: dict[str, Case] = {
    "attention": (timm_model, LAYERS.Attention, "forward", mixed, "blocks.0", "attn: Attention.forward was"),
    "block": (timm_model, timm_vit.Block, "forward", mixed, "blocks.0", "it: Block.forward was"),
    "activation": (timm_model, nn.GELU, "forward", mixed, "blocks.0", "mlp.act: GELU.forward was"),
    "linear layer": (timm_model, nn.Linear, "forward", mixed, "blocks.0", "attn.qkv: Linear.forward was"),
    "norm": (timm_model, LAYERS.LayerNorm, "forward", mixed, "norm", "it: LayerNorm.forward was"),
    "convolution": (timm_model, nn.Conv2d, "forward", mixed, "forward_features", "it: Conv2d.forward was"),
    "patches": (
        timm_model, LAYERS.PatchEmbed, "forward", mixed, "forward_features", "PatchEmbed.forward was",
    ),
    "features": (timm_model, TIMM, "forward_features", mixed, "forward_features", "forward_features was"),
    "positions": (timm_model, TIMM, "_pos_embed", mixed, "forward_features", "_pos_embed was"),
    "head": (timm_model, TIMM, "forward_head", head_of_all_tokens, None, ""),
    "pool": (timm_model, TIMM, "pool", pool_of_all_tokens, None, ""),
    "pool of attention": (
        pooling, LAYERS.AttentionPoolLatent, "forward", mixed, "attn_pool", "it: AttentionPoolLatent.forward was",
    ),
    "torchvision's block": (
        torchvision_model, torchvision_vit.EncoderBlock, "forward", mixed, "encoder.layers.encoder_layer_0",
        "it: EncoderBlock.forward was",
    ),
    "torchvision's encoder": (
        torchvision_model, torchvision_vit.Encoder, "forward", mixed, "the model", "encoder: Encoder.forward was",
    ),
    "torchvision's patches": (
        torchvision_model, torchvision_vit.VisionTransformer, "_process_input", mixed, "the model",
        "VisionTransformer._process_input was",
    ),
    "torchvision's model": (
        torchvision_model, torchvision_vit.VisionTransformer, "forward", mixed, "the model",
        "VisionTransformer.forward was",
    ),
    "transformers' MLP": (hf_vit, modeling_vit.ViTMLP, "forward", mixed, "layers.0", "mlp: ViTMLP.forward was"),
    "transformers' attention": (
        hf_vit, modeling_vit.ViTAttention, "forward", mixed, "layers.0", "attention: ViTAttention.forward was",
    ),
    "transformers' stem": (
        hf_vit, modeling_vit.ViTEmbeddings, "forward", mixed, "embeddings", "ViTEmbeddings.forward was",
    ),
    "transformers' patches": (
        hf_vit, modeling_vit.ViTPatchEmbeddings, "forward", mixed, "embeddings", "patch_embeddings has",
    ),
    "transformers' model": (hf_classifier, modeling_vit.ViTModel, "forward", all_tokens_to_the_first, None, ""),
    "transformers' classifier": (
        hf_classifier, modeling_vit.ViTForImageClassification, "forward", logits_of_all_tokens, None, "",
    ),
}  # fmt: skip


# A class that was changed before accelerate() is asked the same question, so a few of those are enough.
@pytest.mark.parametrize(
    ("name", "early"),
    [*((name, False) for name in CASES), *((name, True) for name in list(CASES)[::4])],
)
@torch.no_grad()
def test_a_method_replaced_on_the_class_runs(name: str, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    build, kind, method, replacement, module, why = CASES[name]
    theirs = build(**ONE_BLOCK[build])
    ours, x = copy.deepcopy(theirs), images(1)
    plain = theirs(x)
    if not early:
        vit_engine.accelerate(ours)
        close(ours(x), plain)
    with monkeypatch.context() as patch:
        patch.setattr(kind, method, replacement(getattr(kind, method)))
        expected = theirs(x)
        first = [next(iter(t.values())) if isinstance(t, dict) else t[0] for t in (expected, plain)]
        # No tolerance: that it matters at all, far beyond rounding.
        assert differs(*first), "the change does not matter"
        if early:
            vit_engine.accelerate(ours)
        close(ours(x), expected)
        if module is None:
            assert launches_of(lambda: ours(x)).count("attention") == 1, "blocks stay on the kernels"
        else:
            assert why in reasons(ours)[module]
    result, launches = watched(lambda: ours(x))
    close(result, plain)
    assert "attention" in launches and (module is None or module in kernels(ours)), "it was put back"


@torch.no_grad()
def test_a_forward_replaced_while_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then passes are not repeated, and what a block is built of is asked in another way."""
    theirs = timm_model(depth=1)
    ours, x = vit_engine.accelerate(copy.deepcopy(theirs)), images(1)
    with torch.enable_grad():
        ours(x)
        monkeypatch.setattr(nn.GELU, "forward", mixed(nn.GELU.forward))
        close(ours(x), theirs(x))


@pytest.mark.parametrize("build", [timm_model, torchvision_model, hf_classifier], ids=lambda build: build.__name__)
@torch.no_grad()
def test_classes_in_a_traced_graph(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = build(**ONE_BLOCK[build])
    ours, x = vit_engine.accelerate(copy.deepcopy(theirs)), images(1)
    for patched in (False, True):
        torch._dynamo.reset()
        if patched:
            monkeypatch.setattr(nn.Linear, "forward", mixed(nn.Linear.forward))
        seen: list[str] = []

        def count(graph: torch.fx.GraphModule, example: Any, seen: list[str] = seen) -> Any:
            seen += [str(node.target) for node in graph.graph.nodes]
            return graph.forward

        compiled: Any = torch.compile(ours, backend=count, fullgraph=True)
        close(compiled(x), theirs(x))
        assert any("vit_engine.attention" in name for name in seen) is not patched
        assert any("vit_engine.patch_embed" in name for name in seen)
    compiled = torch.compile(replaced, backend="eager")
    assert compiled(nn.Linear) and not compiled(nn.LayerNorm)


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.no_grad()
    def decorated(self, x: Tensor) -> Tensor:
        return x


class Derived(Own):
    pass


def test_methods_that_libraries_decorate_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Own, Derived, nn.Linear, nn.GELU, nn.Sequential, nn.ModuleList, modeling_vit.ViTModel, TIMM):
        assert not replaced(kind), kind
    assert not replaced(Derived, "decorated")
    original = LAYERS.Attention.forward
    for function, other in (
        (torch.no_grad()(original), False),
        (torch.no_grad()(mixed(original)), True),
        (lambda self, x: x, True),
        (functools.partialmethod(original), True),
        (LAYERS.Mlp.forward, True),
    ):
        monkeypatch.setattr(LAYERS.Attention, "forward", function)
        assert replaced(LAYERS.Attention) is other
    monkeypatch.setattr(Own, "forward", nn.Identity.forward)
    assert replaced(Derived) and replaced(Own)
