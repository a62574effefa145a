"""What users put into models: where a block is no longer plain, its own code runs, and explain() says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

import vit_engine

from .support import (
    beit,
    close,
    differs,
    hf_vit,
    images,
    kernels,
    launches_of,
    pair,
    reasons,
    timm_model,
    torchvision_model,
    watched,
)

pytestmark = pytest.mark.interpreted_only


class Lora(nn.Module):
    """A low-rank adapter around a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.linspace(-1, 1, 2 * base.in_features).view(2, -1).to(base.weight))
        self.up = nn.Parameter(torch.linspace(-1, 1, 2 * base.out_features).view(-1, 2).to(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class Negated(torch.Tensor):
    """A tensor that is not what its memory says."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            return -value.as_subclass(Tensor) if isinstance(value, cls) else value

        if func is nn.functional.linear:
            return func(*map(plain, args), **{k: plain(v) for k, v in (kwargs or {}).items()})
        return super().__torch_function__(func, types, args, kwargs or {})


class MyBlock(timm_vit.Block):
    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        return super().forward(x) + x.flip(-1)


def halve(module: Any, arguments: Any, output: Tensor) -> Tensor:
    return output * 0.5


def negate_first(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (-arguments[0], *arguments[1:])


def lora(block: Any) -> None:
    block.attn.qkv = Lora(block.attn.qkv)


def lora_in_the_mlp(block: Any) -> None:
    block.mlp.fc2 = Lora(block.mlp.fc2)


def parametrization(block: Any) -> None:
    parametrize.register_parametrization(block.mlp.fc1, "weight", Doubled())


def subclassed_parameter(block: Any) -> None:
    block.mlp.fc1.weight = nn.Parameter(block.mlp.fc1.weight.data.as_subclass(Negated))


def forward_of_a_part(block: Any) -> None:
    block.mlp.forward = lambda x: x * 0.5


def hook_inside(block: Any) -> None:
    block.attn.register_forward_hook(halve)


def pre_hook_inside(block: Any) -> None:
    block.mlp.fc1.register_forward_pre_hook(negate_first)


def forward_of_the_block(block: Any) -> None:
    block.forward = lambda x, **more: x * 0.5


def another_class(block: Any) -> None:
    block.__class__ = MyBlock


def another_activation(block: Any) -> None:
    block.mlp.act = nn.Hardswish()


INSIDE: dict[Callable[[Any], None], str] = {
    lora: "attn.qkv is tests.dropin.test_user_changes.Lora, expected torch.nn.Linear",
    lora_in_the_mlp: "mlp.fc2 is tests.dropin.test_user_changes.Lora",
    parametrization: "mlp.fc1 has parametrizations",
    subclassed_parameter: "mlp.fc1.weight is a",
    forward_of_a_part: "mlp.forward is overridden on the instance",
    hook_inside: "attn has a hook (halve)",
    pre_hook_inside: "mlp.fc1 has a hook (negate_first)",
    another_class: "MyBlock",
    another_activation: "mlp.act is torch.nn.modules.activation.Hardswish",
}


@pytest.mark.parametrize("early", [pytest.param(True, marks=pytest.mark.slow), False], ids=["before", "after"])
@pytest.mark.parametrize("change", list(INSIDE), ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_changed_block_runs_its_own_code(change: Callable[[Any], None], early: bool) -> None:
    """Whether it was changed before or after acceleration; the other block stays on the kernels."""
    theirs = timm_model()
    plain = theirs(images(1))
    ours = copy.deepcopy(theirs)
    if early:
        change(ours.blocks[1])
        vit_engine.accelerate(ours, strict=change is not another_activation)
    else:
        vit_engine.accelerate(ours)
        close(ours(images(1)), plain)
        change(ours.blocks[1])
    change(theirs.blocks[1])
    expected = theirs(images(1))
    # No tolerance: that it matters at all, far beyond rounding.
    assert differs(expected, plain), "the change does not matter"
    result, launches = watched(lambda: ours(images(1)))
    close(result, expected)
    assert launches.count("attention") == 1
    assert INSIDE[change] in reasons(ours)["blocks.1"]
    assert "blocks.0" in kernels(ours)


@torch.no_grad()
def test_a_forward_set_on_a_block() -> None:
    """It is in front of ours, so the block is no longer taken over; restore() leaves it where it is."""
    theirs, ours = pair(timm_model)
    for model in (theirs, ours):
        forward_of_the_block(model.blocks[1])
    close(ours(images(1)), theirs(images(1)))
    vit_engine.restore(ours)
    assert "forward" in vars(ours.blocks[1])
    vit_engine.accelerate(ours)
    close(ours(images(1)), theirs(images(1)))
    assert "overridden" in reasons(ours)["blocks.1"]


@pytest.mark.parametrize("build", [timm_model, torchvision_model, hf_vit], ids=lambda f: f.__name__)
@torch.no_grad()
def test_hooks_on_a_block_run_and_stop_running(build: Callable[..., Any]) -> None:
    theirs, ours = pair(build)
    plain = theirs(images(1))
    close(ours(images(1)), plain)
    handles = []
    for model in (theirs, ours):
        block = next(p for n, p in model.named_modules() if n.endswith(("blocks.0", "layers.0", "encoder_layer_0")))
        handles += [block.register_forward_hook(halve), block.register_forward_pre_hook(negate_first)]
    result, launches = watched(lambda: ours(images(1)))
    close(result, theirs(images(1)))
    assert launches.count("attention") == 2, "hooks on a block leave it on the kernels"
    for handle in handles:
        handle.remove()
    close(ours(images(1)), plain)


@torch.no_grad()
def test_hooks_inside_come_and_go() -> None:
    theirs, ours = pair(timm_model, depth=1)
    plain = theirs(images(1))
    handle = ours.blocks[0].mlp.register_forward_hook(halve)
    # No tolerance: that it matters at all, far beyond rounding.
    assert differs(ours(images(1)), plain)
    handle.remove()
    close(ours(images(1)), plain)
    assert "blocks.0" in kernels(ours)


@pytest.mark.parametrize("name", ["patch_embed", "patch_embed.proj", "pos_drop", "norm", "blocks"])
@torch.no_grad()
def test_hooks_around_the_blocks_of_timm(name: str) -> None:
    theirs, ours = pair(timm_model, depth=1)
    for model in (theirs, ours):
        model.get_submodule(name).register_forward_hook(halve)
    close(ours(images(1)), theirs(images(1)))


@pytest.mark.parametrize("name", ["conv_proj", "encoder", "encoder.dropout", "encoder.layers", "encoder.ln", "heads"])
@torch.no_grad()
def test_hooks_around_the_blocks_of_torchvision(name: str) -> None:
    theirs, ours = pair(torchvision_model, num_layers=1)
    for model in (theirs, ours):
        model.get_submodule(name).register_forward_hook(halve)
    close(ours(images(1)), theirs(images(1)))


@pytest.mark.parametrize("name", ["", ".patch_embeddings", ".patch_embeddings.projection", ".dropout"])
@torch.no_grad()
def test_hooks_in_the_stem_of_transformers(name: str) -> None:
    theirs, ours = pair(hf_vit, num_hidden_layers=1)
    for model in (theirs, ours):
        model.get_submodule(f"embeddings{name}").register_forward_hook(halve)
    close(ours(images(1)), theirs(images(1)))


@torch.no_grad()
def test_replaced_parts_around_the_blocks() -> None:
    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    def replace(model: Any) -> None:
        model.blocks = Twice(*model.blocks)
        model.norm = nn.Sequential(model.norm, nn.Tanh())

    theirs, ours = pair(timm_model, depth=1)
    for model in (theirs, ours):
        replace(model)
    close(ours(images(1)), theirs(images(1)))
    theirs, ours = pair(torchvision_model, num_layers=1)
    for model in (theirs, ours):
        model.encoder.layers = Twice(*model.encoder.layers)
    close(ours(images(1)), theirs(images(1)))


@torch.no_grad()
def test_global_hooks_run() -> None:
    theirs, ours = pair(timm_model, depth=1)
    close(ours(images(1)), theirs(images(1)))
    names: list[str] = []
    handle = torch_module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    try:
        theirs(images(1))
        expected = names.copy()
        names.clear()
        ours(images(1))
        assert names == expected and "Attention" in expected
        assert "global module hooks" in reasons(ours)["blocks.0"]
    finally:
        handle.remove()
    assert "mlp" in launches_of(lambda: ours(images(1)))


@torch.no_grad()
def test_a_subclass_of_a_block_is_left_alone_and_named() -> None:
    theirs = timm_model()
    theirs.blocks[0].__class__ = MyBlock
    ours = vit_engine.accelerate(copy.deepcopy(theirs))
    close(ours(images(1)), theirs(images(1)))
    assert "MyBlock" in reasons(ours)["blocks.0"]


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    theirs, ours = pair(hf_vit)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(0)
    ours = peft.get_peft_model(ours, config).eval()
    with torch.no_grad():
        close(ours(images(1)), adapted(images(1)))
        assert "lora" in "".join(reasons(ours).values())
        with ours.disable_adapter(), adapted.disable_adapter():
            close(ours(images(1)), adapted(images(1)))
        merged, expected = ours.merge_and_unload(), adapted.merge_and_unload()
        close(merged(images(1)), expected(images(1)))
        assert launches_of(lambda: merged(images(1))).count("attention") == 2, "merged adapters leave plain blocks"


def test_training_an_adapter() -> None:
    theirs, ours = pair(timm_model)
    for model in (theirs, ours):
        model.requires_grad_(False)
        lora(model.blocks[0])
        model.train()
        model(images(1)).square().sum().backward()
    for a, b in ((ours, theirs),):
        close(a.blocks[0].attn.qkv.down.grad, b.blocks[0].attn.qkv.down.grad)
        close(a.blocks[0].attn.qkv.up.grad, b.blocks[0].attn.qkv.up.grad)


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@torch.no_grad()
def test_what_is_put_behind_the_mlp_of_torchvision_runs(early: bool) -> None:
    """It is a Sequential, so that more may stand in it than torchvision puts there."""
    theirs = torchvision_model()
    ours = copy.deepcopy(theirs)
    if not early:
        vit_engine.accelerate(ours)
    for model in (theirs, ours):
        model.encoder.layers[0].mlp.append(nn.Tanh())
    if early:
        vit_engine.accelerate(ours)
    close(ours(images(1)), theirs(images(1)))
    assert "mlp has the parts 0, 1, 2, 3, 4, 5" in reasons(ours)["encoder.layers.encoder_layer_0"]


@torch.no_grad()
def test_an_adapter_around_the_projection_of_beit() -> None:
    theirs, ours = pair(beit, depth=1)
    for model in (theirs, ours):
        model.blocks[0].attn.proj = Lora(model.blocks[0].attn.proj)
    close(ours(images(1)), theirs(images(1)))
    assert "attn.proj is" in reasons(ours)["blocks.0"]
