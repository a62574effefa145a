"""Changes that leave few traces, by optimizers, configurations, functional calls, threads; and no GPU anywhere."""

from __future__ import annotations

import copy
import functools
import threading
from collections import OrderedDict
from typing import Any

import pytest
import timm.models.eva
import torch
from torch import Tensor, nn
from torch.func import functional_call

import vit_engine
from tests.bench.child import run
from vit_engine.fingerprint import Fingerprint
from vit_engine.replay import ReplayCache

from .support import close, differs, eva, hf_vit, images, pair, reasons, tensors, timm_model, torchvision_model

pytestmark = pytest.mark.interpreted_only


@pytest.mark.compiled
def test_the_original_runs_where_triton_finds_no_driver() -> None:
    """In a process without interpreter and GPU."""
    found = run("""
        import json, torch, vit_engine
        from timm.models.vision_transformer import VisionTransformer
        model = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3).eval()
        images = torch.randn(1, 3, 16, 16)
        with torch.no_grad():
            expected = model(images)
            same = torch.equal(vit_engine.accelerate(model)(images), expected)
        rows = [row.why for row in vit_engine.explain(model).rows if row.module == "blocks.0"]
        print(json.dumps([same, rows]))
    """)
    assert found[0] is True and "NVIDIA GPU" in found[1][0]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=lambda o: o.__name__)
def test_a_fused_optimizer_step_is_seen(optimizer: Any) -> None:
    """It writes parameters without touching their version counters."""
    theirs, ours = pair(timm_model, depth=1)
    with torch.no_grad():
        close(ours(images(1)), theirs(images(1)))
    for model in (theirs, ours):
        step = optimizer(model.parameters(), lr=0.05, fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        step.step()
    with torch.no_grad():
        close(ours(images(1)), theirs(images(1)))


@pytest.mark.parametrize("name", ["somebodys", "sdpa_somebodys", "sdpa", "eager"])
def test_an_attention_function_of_somebodys_own_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    @functools.wraps(sdpa_attention_forward)
    def own(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        calls.append(module)
        return v.transpose(1, 2).contiguous() * 0.5, None

    monkeypatch.setitem(AttentionInterface._global_mapping, name, own)
    theirs, ours = pair(hf_vit)
    for model in (theirs, ours):
        model.set_attn_implementation(name)
    with torch.no_grad():
        expected = theirs(images(1))
        count = len(calls)
        close(ours(images(1)), expected)
    assert count and len(calls) == 2 * count and f"{name!r}, a function of somebody's own" in str(reasons(ours))


def test_an_eager_attention_set_on_the_module_of_a_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.vit import modeling_vit

    theirs, ours = pair(hf_vit)
    with torch.no_grad():
        before = ours(images(1)).last_hidden_state
        usual = modeling_vit.eager_attention_forward
        monkeypatch.setattr(
            modeling_vit,
            "eager_attention_forward",
            lambda module, q, k, v, mask, **more: usual(module, 2 * q, k, v, mask, **more),
        )
        expected = theirs(images(1))
        close(ours(images(1)), expected)
    assert (before - expected.last_hidden_state).abs().max() > 1e-2


def test_functional_call_has_the_gradients_of_the_tensors_it_is_given() -> None:
    theirs, ours = pair(timm_model, depth=1)
    gradients = []
    for model in (theirs, ours):
        given = {name: (p.detach() + 0.1).requires_grad_() for name, p in model.named_parameters()}
        loss = functional_call(model, given, (images(1),)).square().sum()
        gradients.append(torch.autograd.grad(loss, list(given.values())))
    for mine, wanted in zip(gradients[1], gradients[0], strict=True):
        close(mine, wanted)


def test_a_frozen_parameter_changed_before_the_backward_pass_is_an_error() -> None:
    _, ours = pair(timm_model, depth=1)
    ours.blocks[0].mlp.fc2.weight.requires_grad_(False)
    loss = ours(images(1)).square().sum()
    with torch.no_grad():
        ours.blocks[0].mlp.fc2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()


def stem_of(model: Any) -> Any:
    return model.patch_embed.proj if hasattr(model, "patch_embed") else model.embeddings.patch_embeddings.projection


@pytest.mark.parametrize("build", [timm_model, eva, hf_vit])
def test_a_forward_of_the_patch_projections_own_is_called(build: Any) -> None:
    theirs, ours = pair(build)
    for model in (theirs, ours):
        conv = stem_of(model)
        conv.forward = lambda x, conv=conv: type(conv).forward(conv, x) * 0.5
    with torch.no_grad():
        close(ours(images(1)), theirs(images(1)))


class Negated(Tensor):
    """A tensor that is not what its memory says."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "add" in func.__name__ or func.__name__ == "expand":
            args = [-a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


STEMS: dict[str, tuple[Any, str, str]] = {
    "timm class token": (timm_model, "", "cls_token"),
    "timm position": (timm_model, "", "pos_embed"),
    "torchvision class token": (torchvision_model, "", "class_token"),
    "torchvision position": (torchvision_model, "encoder", "pos_embedding"),
    "transformers class token": (hf_vit, "embeddings", "cls_token"),
    "transformers position": (hf_vit, "embeddings", "position_embeddings"),
}


@pytest.mark.parametrize("name", STEMS)
@torch.no_grad()
def test_a_tensor_of_another_class_in_the_stem_runs_the_original(name: str) -> None:
    build, place, tensor = STEMS[name]
    theirs, ours = pair(build)
    before = ours(images(1))
    for model in (theirs, ours):
        part = model.get_submodule(place)
        setattr(part, tensor, nn.Parameter(getattr(part, tensor).detach().as_subclass(Negated)))
    close(ours(images(1)), theirs(images(1)))
    # No tolerance: that it matters at all, far beyond rounding.
    assert differs(tensors(ours(images(1)))[0], tensors(before)[0]), "it does not matter"
    assert f"{tensor} is a Negated" in str(reasons(ours))


def test_positions_in_another_number_than_tokens_are_for_timm() -> None:
    """It adds one row to all tokens, and raises for a class token's row where only patches get positions."""
    theirs, ours = pair(timm_model, depth=1)
    for model in (theirs, ours):
        model.pos_embed = nn.Parameter(model.pos_embed.detach()[:, :1])
    with torch.no_grad():
        close(ours(images(1)), theirs(images(1)))
    assert reasons(ours)["forward_features"] == "pos_embed has a shape of [1, 1, 32], for 17 tokens"
    theirs, ours = pair(timm_model, depth=1)
    for model in (theirs, ours):
        model.no_embed_class = True
        with torch.no_grad(), pytest.raises(RuntimeError, match="must match the size"):
            model(images(1))


def test_norms_of_queries_and_keys_that_differ_run_the_original() -> None:
    theirs, ours = pair(timm_model, depth=1, qk_norm=True)
    for model in (theirs, ours):
        model.blocks[0].attn.k_norm.eps = 0.5
    with torch.no_grad():
        close(ours(images(1)), theirs(images(1)))
    assert "different ways" in str(reasons(ours))


def test_a_parameter_where_there_was_none_is_seen() -> None:
    block = timm.models.eva.EvaBlock(dim=16, num_heads=2, init_values=None)
    fingerprint = Fingerprint(block)
    assert fingerprint.holds()
    block.gamma_1 = nn.Parameter(torch.ones(16))
    assert not fingerprint.holds()


def test_a_hook_in_a_table_that_replaced_another_is_seen() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    fingerprint = Fingerprint(layer)
    layer[0]._forward_hooks = OrderedDict()
    assert fingerprint.holds()
    layer[0].register_forward_hook(print)
    assert not fingerprint.holds()


def test_a_hook_inside_a_block_in_a_table_that_replaced_another_runs() -> None:
    theirs, ours = pair(timm_model, depth=1)
    with torch.no_grad():
        close(ours(images(1)), theirs(images(1)))
        for model in (theirs, ours):
            mlp = model.blocks[0].mlp
            mlp._forward_hooks = OrderedDict()
            mlp.register_forward_hook(lambda module, arguments, output: output * 0.5)
        close(ours(images(1)), theirs(images(1)))
    assert "hook" in str(reasons(ours))


def test_norms_are_called_by_keyword_too() -> None:
    theirs, ours = pair(hf_vit, num_hidden_layers=1)
    x = torch.randn(2, 3, theirs.config.hidden_size)
    with torch.no_grad():
        close(ours.layernorm(input=x), theirs.layernorm(input=x))


def test_what_one_thread_notes_is_not_kept_for_the_weights_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a pass is noted down, another thread changes a weight and begins anew."""
    from vit_engine import replay

    monkeypatch.setattr(replay, "interpreting", lambda: False)
    monkeypatch.setattr(replay, "active_driver", lambda: None)
    monkeypatch.setattr(replay, "Pass", lambda *_: "of the old weights")
    layer, cache = nn.Linear(2, 2), ReplayCache()
    x = torch.ones(1, 2)
    noting, changed = threading.Event(), threading.Event()

    def slowly() -> list[Tensor]:
        noting.set()
        assert changed.wait(10)
        return [x]

    def note() -> None:
        with torch.no_grad():
            cache.run("pass", layer, (x,), slowly)

    with torch.no_grad():
        cache.run("pass", layer, (x,), lambda: [x])
        thread = threading.Thread(target=note)
        thread.start()
        assert noting.wait(10)
        layer.weight.mul_(2)
        cache.run("pass", layer, (x,), lambda: [x])
        changed.set()
        thread.join()
    assert list(cache._entries.values()) == [None]


def test_a_second_acceleration_that_is_refused_leaves_the_first() -> None:
    _, ours = pair(timm_model, depth=1)
    with pytest.raises(TypeError):
        vit_engine.accelerate(ours, strict="yes")  # type: ignore[arg-type]
    assert vit_engine.explain(ours).rows[0].kernels != "PyTorch"
    wrapped: Any = copy.deepcopy(vit_engine.restore(ours))
    wrapped.blocks[0].forward = lambda x: x
    with pytest.raises(TypeError, match="overridden on every block"):
        vit_engine.accelerate(wrapped)


def test_explain_does_not_list_a_projection_that_runs_inside_another_launch() -> None:
    _, ours = pair(torchvision_model, num_layers=1)
    assert set(reasons(ours)) == {"heads.head"}


@torch.no_grad()
def test_norms_that_lose_their_weights_are_the_librarys_own() -> None:
    theirs, ours = pair(timm_model, depth=1)
    for model in (theirs, ours):
        model.norm.register_parameter("weight", None)
        model.norm.register_parameter("bias", None)
    close(ours(images(1)), theirs(images(1)))
    assert reasons(ours)["norm"] == "it has no weight"
