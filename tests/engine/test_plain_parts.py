"""What users put into a ViT is never left out by the kernels without a word: they refuse it by name."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.engine.redraw import redraw, relative
from tests.engine.stand_in import repeated
from vit_bench.whole_model import SMALL
from vit_engine import ViT, ViTConfig

pytestmark = pytest.mark.interpreted_only
__all__ = ["repeated"]

TINY = dataclasses.replace(SMALL, depth=2, embed_dim=32, num_heads=2, image_size=16, num_register_tokens=0)
ONE_BLOCK = dataclasses.replace(TINY, depth=1)  # where passes are run: the interpreter takes its time
MEAN = dataclasses.replace(TINY, class_token=False, global_pool="avg")
MAP = dataclasses.replace(TINY, class_token=False, global_pool="map")
PRETRAIN = dataclasses.replace(TINY, head="pretrain")


def model(config: ViTConfig = TINY) -> Any:
    made = ViT(config, backend="interpret").eval()
    redraw(made)
    return made


def images(seed: int = 0) -> Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class Adapted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Tagged(torch.Tensor):
    pass


class Scaled(ViT):
    def forward_features(self, images: Tensor) -> Tensor:
        return super().forward_features(images) * 2


def listen(*_: Any) -> None:
    pass


def put(name: str, part: Any) -> Callable[[Any], None]:
    """Sets a part of the model, given itself or as a function of what was there."""

    def change(vit: Any) -> None:
        parent, _, last = name.rpartition(".")
        home = vit.get_submodule(parent)
        setattr(home, last, part(getattr(home, last)) if isinstance(part, types.FunctionType) else part)

    return change


def on(name: str, act: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda vit: act(vit.get_submodule(name))


def train_with_a_rate(name: str) -> Callable[[Any], None]:
    """As for Monte Carlo dropout: in training mode alone, whatever the model's config says."""

    def change(vit: Any) -> None:
        part = vit.get_submodule(name).train()
        setattr(part, next(rate for rate in ("p", "rate", "attention_dropout") if hasattr(part, rate)), 0.5)

    return change


def hooked(name: str) -> Callable[[Any], None]:
    return on(name, lambda part: part.register_forward_hook(listen))


# In front of the head: what is put in, and what the error says of it.
FEATURES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "adapter": (put("blocks.1.attn.qkv", Adapted(32, 96)), "blocks.1.attn.qkv is .*Adapted, expected torch.nn.Linear;"),
    "wrapped layer": (put("blocks.0.mlp.fc1", lambda fc1: nn.Sequential(fc1)), "blocks.0.mlp.fc1 is torch.nn.Seq"),
    "wrapped projection": (put("blocks.0.attn.proj", lambda it: nn.Sequential(it)), "blocks.0.attn.proj is"),
    "wrapped fc2": (put("blocks.0.mlp.fc2", lambda fc2: nn.Sequential(fc2)), "blocks.0.mlp.fc2 is"),
    "hook on the stem": (hooked("patch_embed"), r"patch_embed has a hook \(listen\), expected none"),
    "hook on the projection": (hooked("patch_embed.proj"), "patch_embed.proj has a hook"),
    "hook on pos_drop": (hooked("pos_drop"), "pos_drop has a hook"),
    "hook on the blocks": (hooked("blocks"), "blocks has a hook"),
    "hook on a block": (hooked("blocks.1"), "blocks.1 has a hook"),
    "hook on attention": (hooked("blocks.0.attn"), "blocks.0.attn has a hook"),
    "hook on dropout": (hooked("blocks.0.attn.proj_drop"), "blocks.0.attn.proj_drop has a hook"),
    "hook on LayerScale": (hooked("blocks.0.ls2"), "blocks.0.ls2 has a hook"),
    "hook on the last norm": (hooked("norm"), "norm has a hook"),
    "hook in front": (
        on("blocks.0.norm2", lambda part: part.register_forward_pre_hook(listen)), "blocks.0.norm2 has a hook",
    ),
    "forward of an instance": (
        on("blocks.0.mlp", lambda mlp: setattr(mlp, "forward", lambda x: x)), "blocks.0.mlp.forward is overridden",
    ),
    "norm1 away": (put("blocks.0.norm1", nn.Identity()), "blocks.0.norm1 is .*Identity, expected .*LayerNorm;"),
    "RMSNorm in a block": (put("blocks.0.norm1", nn.RMSNorm(32)), "blocks.0.norm1 is torch.nn.RMSNorm"),
    "RMSNorm behind the blocks": (put("norm", nn.RMSNorm(32)), "norm is torch.nn.RMSNorm, expected .*LayerNorm or"),
    "norm over more": (put("norm", nn.LayerNorm([5, 32])), r"norm normalises \(5, 32\), expected the last"),
    "LayerScale": (put("blocks.0.ls1", Doubled()), "blocks.0.ls1 is .*Doubled, expected .*LayerScale or"),
    "DropPath": (put("blocks.0.drop_path2", Doubled()), "blocks.0.drop_path2 is .*Doubled"),
    "dropout of positions": (put("pos_drop", Doubled()), "pos_drop is .*Doubled, expected torch.nn.Dropout or"),
    "block away": (put("blocks.1", nn.Identity()), "blocks.1 is torch.nn.Identity, expected vit_engine.layers.Block"),
    "no blocks": (put("blocks", nn.Sequential()), "blocks is empty"),
    "list of blocks": (put("blocks", lambda b: nn.ModuleList(b)), "blocks is torch.nn.ModuleList"),
    "parametrization": (
        on("blocks.0.mlp.fc1", lambda fc1: parametrize.register_parametrization(fc1, "weight", Doubled())),
        "blocks.0.mlp.fc1 is .*ParametrizedLinear",
    ),
    "tensor of its own class": (
        put("blocks.0.mlp.fc1.weight", lambda w: nn.Parameter(w.data.as_subclass(Tagged))),
        "blocks.0.mlp.fc1.weight is a .*Tagged",
    ),
    "token of its own class": (put("cls_token", lambda t: nn.Parameter(t.data.as_subclass(Tagged))), "cls_token is a"),
    "overlapping patches": (
        put("patch_embed.proj", lambda old: nn.Conv2d(3, 32, old.kernel_size, old.kernel_size, padding=1)),
        "patch_embed.proj is Conv2d",
    ),
    "dropout alone": (train_with_a_rate("blocks.0.mlp.drop1"), "blocks.0.mlp.drop1 is in training mode"),
    "attention's dropout alone": (train_with_a_rate("blocks.0.attn"), "blocks.0.attn is in training mode"),
    "stochastic depth alone": (train_with_a_rate("blocks.1.drop_path1"), "blocks.1.drop_path1 is in training mode"),
}  # fmt: skip
# Behind it.
HEADS: dict[str, tuple[ViTConfig, Callable[[Any], Any], str]] = {
    "head": (TINY, put("head", lambda old: nn.Sequential(nn.LayerNorm(32), old)), "head is torch.nn.Sequential,"),
    "head's adapter": (TINY, put("head", Adapted(32, 7)), "head is .*Adapted"),
    "hook on the head": (TINY, hooked("head"), "head has a hook"),
    "pre_logits": (TINY, put("pre_logits", nn.Tanh()), "pre_logits is torch.nn.Tanh, expected torch.nn.Identity or"),
    "hidden layer": (PRETRAIN, put("pre_logits.act", nn.GELU()), "pre_logits.act is .*GELU, expected .*Tanh"),
    "two hidden layers": (PRETRAIN, on("pre_logits", lambda it: it.append(nn.Tanh())), "pre_logits is a Sequential"),
    "hook on the hidden layer": (PRETRAIN, hooked("pre_logits.fc"), "pre_logits.fc has a hook"),
    "head_drop": (TINY, put("head_drop", Doubled()), "head_drop is .*Doubled"),
    "fc_norm": (MEAN, put("fc_norm", nn.RMSNorm(32)), "fc_norm is torch.nn.RMSNorm"),
    "head behind the mean": (MEAN, put("head", Adapted(32, 7)), "head is .*Adapted"),
    "hook on the pool": (MAP, hooked("attn_pool"), "attn_pool has a hook"),
    "layer of the pool": (MAP, put("attn_pool.kv", Adapted(32, 64)), "attn_pool.kv is .*Adapted"),
    "method": (TINY, lambda vit: setattr(vit, "pool", lambda x: x.mean(1)), r"pool\(\) is overridden on the instance"),
    "subclass": (TINY, lambda vit: setattr(vit, "__class__", Scaled), r"forward_features\(\) is over.*Scaled"),
}  # fmt: skip


def refused(call: Callable[[Tensor], Tensor], text: str) -> str:
    with pytest.raises(RuntimeError, match=rf"backend 'interpret' would leave out .*: {text}") as error:
        call(images())
    assert "take it out, or use model.set_backend('torch')" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", list(FEATURES))
def test_what_is_in_front_of_the_head(name: str, repeated: list[str]) -> None:
    change, text = FEATURES[name]
    vit = model()
    change(vit)
    for call in (vit, vit.forward_features):
        assert "runs any head" not in refused(call, text)
    assert not repeated


@pytest.mark.parametrize("name", list(HEADS))
def test_what_is_behind(name: str, repeated: list[str]) -> None:
    config, change, text = HEADS[name]
    vit = model(config)
    change(vit)
    assert "which runs any head" in refused(vit, text)
    if name != "subclass":
        vit.forward_features(images())


@pytest.mark.parametrize("name", ["hook on attention", "RMSNorm behind the blocks", "dropout alone", "LayerScale"])
def test_what_comes_once_passes_are_repeated(name: str, repeated: list[str]) -> None:
    change, text = FEATURES[name]
    vit = model(ONE_BLOCK)
    plain = [vit(images()) for _ in range(3)]
    count = len(repeated)
    assert count
    change(vit)
    for call in (vit, vit, vit.forward_features):
        refused(call, text)
    assert len(repeated) == count
    assert plain[0].shape == vit.set_backend("torch")(images()).shape


def test_hooks_come_and_go_and_those_around_the_model_stay(repeated: list[str]) -> None:
    vit = model(ONE_BLOCK)
    expected, seen = vit(images()), []
    vit.register_forward_hook(lambda *_: seen.append(1))
    handle = vit.blocks[0].register_forward_hook(listen)
    refused(vit, "blocks.0 has a hook")
    handle.remove()
    for number in range(1, 4):
        assert torch.equal(vit(images()), expected) and len(seen) == number
    assert repeated
    with torch.enable_grad():
        vit.blocks[0].register_full_backward_hook(listen)  # there is no backward pass for it
        vit(images())


@pytest.mark.parametrize("name", ["pool", "forward_head", "forward_features"])
@pytest.mark.parametrize("where", ["instance", "class"])
def test_methods_set_once_passes_are_repeated(
    where: str, name: str, monkeypatch: pytest.MonkeyPatch, repeated: list[str]
) -> None:
    vit = model(ONE_BLOCK)
    *_, expected = [vit(images()) for _ in range(3)]
    count = len(repeated)
    with monkeypatch.context() as patch:
        patch.setattr(vit if where == "instance" else ViT, name, lambda *_: None)
        refused(vit, rf"{name}\(\) is overridden")
    assert len(repeated) == count and torch.equal(vit(images()), expected)


@pytest.mark.parametrize("name", ["prefix_tokens", "position_embedding"])
@pytest.mark.parametrize("where", ["instance", "class"])
@pytest.mark.parametrize("registers", [0, 2])
def test_tokens_and_positions_of_somebodys_own(
    registers: int, where: str, name: str, monkeypatch: pytest.MonkeyPatch, repeated: list[str]
) -> None:
    vit = model(dataclasses.replace(ONE_BLOCK, num_register_tokens=registers))
    *_, plain = [vit(images()) for _ in range(3)]
    rows = registers + (5 if name == "position_embedding" else 1)
    mine = torch.linspace(-1, 1, rows * 32).view(rows, 32)
    with monkeypatch.context() as patch:
        patch.setattr(vit if where == "instance" else ViT, name, lambda *_: mine)
        expected = vit.set_backend("torch")(images())
        vit.set_backend("interpret")
        for _ in range(3):
            assert relative(vit(images()), expected) < 1e-5
            vit.forward_features(images())
    assert torch.equal(vit(images()), plain)


def test_code_set_on_a_class(monkeypatch: pytest.MonkeyPatch, repeated: list[str]) -> None:
    vit = model(ONE_BLOCK)
    expected = vit(images())
    for _ in range(2):
        vit(images())
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x)
        refused(vit, "blocks.0.attn.qkv: Linear.forward was replaced on the class")
    assert torch.equal(vit(images()), expected)


@pytest.mark.parametrize("grad", [False, True])
def test_parts_are_looked_at_once(grad: bool, repeated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that are not repeated remember it, too."""
    from vit_engine import plain_parts

    looks, original = [], plain_parts._objections
    monkeypatch.setattr(plain_parts, "_objections", lambda *args: looks.append(1) or original(*args))
    vit = model(ONE_BLOCK)
    with torch.set_grad_enabled(grad):
        for _ in range(4):
            vit(images())
        assert len(looks) == 1 and bool(repeated) is not grad
        vit.forward_features(images())
        vit.head = nn.Linear(32, 3)
        vit(images())
        assert len(looks) == 3
    for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert torch.equal(other(images()), vit(images()))


ALLOWED: dict[str, tuple[ViTConfig, Callable[[Any], Any]]] = {
    "nothing": (TINY, lambda vit: None),
    "two norms": (TINY, put("fc_norm", nn.LayerNorm(32, eps=0.1))),
    "no norm": (TINY, put("norm", nn.Identity())),
    "dropout away": (TINY, put("blocks.0.mlp.drop1", nn.Identity())),
    "fewer blocks": (TINY, put("blocks", lambda blocks: blocks[:1])),
    "a block twice": (TINY, put("blocks", lambda blocks: nn.Sequential(blocks[0], blocks[0]))),
    "more classes": (TINY, put("head", lambda old: nn.Linear(32, 11))),
    "no head": (MEAN, put("head", nn.Identity())),
    "no bias": (TINY, put("blocks.0.mlp.fc2", lambda old: nn.Linear(old.in_features, 32, bias=False))),
    "a part that nobody calls": (TINY, lambda vit: vit.blocks[0].add_module("more", Doubled())),
}


@pytest.mark.parametrize("name", list(ALLOWED))
@torch.no_grad()
def test_what_the_kernels_compute_is_allowed(name: str) -> None:
    config, change = ALLOWED[name]
    vit = model(config)
    change(vit)
    expected = copy.deepcopy(vit).set_backend("torch")(images())
    assert relative(vit(images()), expected) < 1e-4


UNREADABLE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "float64": (lambda vit: vit.double(), r"cannot run a model in torch.float64; .*: use model.float\(\), "),
    "8 bits": (lambda vit: vit.to(torch.float8_e4m3fn), "cannot run a model in torch.float8_e4m3fn"),
    "a norm": (on("norm", nn.Module.double), "cannot read norm.weight, which is torch.float64"),
    "blocks": (on("blocks", nn.Module.half), "blocks.0.attn.qkv.weight is torch.float16, and patch_embed.proj.weight"),
    "no values": (on("head", lambda head: head.to("meta")), "cannot read head.weight, which is on the meta device"),
}


@pytest.mark.parametrize("name", list(UNREADABLE))
@torch.no_grad()
def test_parameters_that_the_kernels_cannot_read_are_named(name: str) -> None:
    change, words = UNREADABLE[name]
    vit = model()
    vit(images())
    change(vit)
    given = images().to(vit.patch_embed.proj.weight.dtype)
    with pytest.raises(RuntimeError, match=f"backend 'interpret' .*{words}.*set_backend"):
        vit(given)
    if name != "no values":
        vit.float()(images())
    else:
        vit.forward_features(images())  # reads no head


@torch.no_grad()
def test_a_traced_graph_is_asked_too() -> None:
    vit = model()
    vit.blocks[0].mlp.fc1 = Adapted(32, vit.blocks[0].mlp.fc1.out_features)
    with pytest.raises(Exception, match=r"blocks.0.mlp.fc1 is .*Adapted"):
        torch.compile(vit, backend="eager")(images())


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    vit = model()
    config = peft.LoraConfig(target_modules=["qkv", "fc1"], init_lora_weights=False)
    adapted = peft.get_peft_model(vit, config).eval()
    with torch.no_grad():
        refused(adapted, "blocks.0.attn.qkv is peft.tuners.lora.layer.Linear, expected torch.nn.Linear")
        merged = adapted.merge_and_unload()
        assert relative(merged(images()), copy.deepcopy(merged).set_backend("torch")(images())) < 1e-4
