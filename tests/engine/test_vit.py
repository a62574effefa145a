import copy
import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.engine.redraw import SMALL, images, redraw, relative, small_vit, timm_model
from tests.rung import child_environment
from vit_engine import ViT, ViTConfig

VARIANTS: dict[str, dict] = {
    "plain": {},
    "registers": {"num_register_tokens": 4},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "average pool": {"global_pool": "avg"},
    "average pool, norm before": {"global_pool": "avg", "fc_norm": False, "num_register_tokens": 1},
    "class token, norm after": {"fc_norm": True},
    "LayerScale": {"layer_scale": 1e-5},
    "no_embed_class": {"no_embed_class": True},
    "DINOv2 with registers": {
        "no_embed_class": True,
        "num_register_tokens": 4,
        "layer_scale": 1e-5,
        "patch_size": (4, 8),
    },
    "registers only": {"class_token": False, "global_pool": "avg", "num_register_tokens": 2, "no_embed_class": True},
    "no qkv bias": {"qkv_bias": False},
    "rectangle, one channel": {"image_size": (16, 40), "in_channels": 1},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "quick_gelu": {"activation": "quick_gelu"},
    "silu": {"activation": "silu", "mlp_ratio": 2.5},
    "swiglu": {"activation": "swiglu", "hidden_dim": 96},
    "no classifier": {"num_classes": 0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_timm(name: str) -> None:
    """timm's own weights load with strict=True; tokens, pooled features and logits agree in float64."""
    config = ViTConfig(**{**SMALL, **VARIANTS[name]})
    theirs = timm_model(config).double()
    ours = ViT(config).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(2, config.in_channels, *config.image_hw)
    with torch.no_grad():
        tokens = ours.forward_features(x)
        assert tokens.shape == (2, config.num_tokens, 48)
        assert relative(tokens, theirs.forward_features(x)) < 1e-10
        pooled = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        assert relative(ours.forward_head(tokens, pre_logits=True), pooled) < 1e-10
        assert relative(ours(x), theirs(x)) < 1e-10


def test_vit_tiny_patch16_224_equals_timm() -> None:
    theirs = redraw(timm.create_model("vit_tiny_patch16_224")).double().eval()
    ours = ViT(ViTConfig.preset("vit_tiny_patch16_224")).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-10


@pytest.mark.parametrize("representation", [None, 20])
def test_pretraining_head(representation: int | None) -> None:
    """Section 3.1: one hidden layer, with the tanh of Google's code, under the names older timm versions used."""
    model = small_vit(head="pretrain", representation_size=representation)
    state = model.state_dict()
    assert state["pre_logits.fc.weight"].shape == (representation or 48, 48)
    tokens = model.forward_features(images(2, 3, 32, 32))
    hidden = torch.tanh(tokens[:, 0] @ state["pre_logits.fc.weight"].T + state["pre_logits.fc.bias"])
    assert relative(model.forward_head(tokens, pre_logits=True), hidden) < 1e-12
    assert relative(model.forward_head(tokens), hidden @ state["head.weight"].T + state["head.bias"]) < 1e-12


MATTERS = {name: VARIANTS[name] for name in ("plain", "average pool", "DINOv2 with registers", "swiglu")}
MATTERS["pretrain head"] = {"head": "pretrain"}


@pytest.mark.parametrize("name", MATTERS)
@torch.no_grad()
def test_every_parameter_matters(name: str) -> None:
    model = small_vit(**MATTERS[name])
    x = images(2, 3, 32, 32)
    before = model(x)
    for parameter_name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.zero_()
        assert relative(model(x), before) > 1e-4, parameter_name
        parameter.copy_(kept)
    assert torch.equal(model(x), before)
    # Softmax ignores what is added to all scores of a query: of the three biases the key bias has no effect.
    for part, matters in (("query", True), ("key", False), ("value", True)):
        bias = model.state_dict()["blocks.0.attn.qkv.bias"].view(3, 48)[("query", "key", "value").index(part)]
        kept = bias.clone()
        bias.zero_()
        assert (relative(model(x), before) > 1e-4) == matters, part
        bias.copy_(kept)


def test_bytes_and_floats_agree() -> None:
    model = small_vit(mean=(0.4, 0.5, 0.6), std=0.25)
    pixels = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor((0.4, 0.5, 0.6), dtype=torch.float64).reshape(3, 1, 1)
    assert relative(model(pixels), model((pixels.double() / 255 - mean) / 0.25)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_empty_batch(dtype: torch.dtype) -> None:
    model = small_vit(num_register_tokens=1, mean=0.5, std=0.5).to(dtype)
    for batch in (torch.zeros(0, 3, 16, 24, dtype=dtype), torch.zeros(0, 3, 16, 24, dtype=torch.uint8)):
        assert model(batch).shape == (0, 7)
        assert model.forward_features(batch).shape == (0, 8, 48)
    assert model(images(2, 3, 16, 24, dtype=dtype)).dtype == dtype


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = ViT(
        ViTConfig(**{**SMALL, "embed_dim": 192, "num_register_tokens": 2, "layer_scale": 0.1, "head": "pretrain"})
    )
    state = model.state_dict()
    assert not state["head.weight"].any()
    assert not state["head.bias"].any()
    for name in ("blocks.1.attn.qkv.weight", "blocks.0.mlp.fc2.weight", "pos_embed", "pre_logits.fc.weight"):
        # A normal of deviation 0.02 cut at two deviations has deviation 0.0176.
        assert 0.017 < float(state[name].std()) < 0.0182, name
        assert float(state[name].abs().max()) <= 0.04, name
    assert not any(state[name].any() for name in state if name.endswith(".bias"))
    assert torch.equal(state["blocks.0.ls1.gamma"], torch.full((192,), 0.1))
    assert bool((state["norm.weight"] == 1).all())
    # Patches of unit variance give tokens of about unit variance.
    assert 0.8 < model.patch_embed(torch.randn(8, 3, 32, 32)).std().item() < 1.0
    assert not ViT(ViTConfig(**SMALL))(torch.randn(1, 3, 32, 32)).any()


def test_stochastic_depth_rises_linearly() -> None:
    model = ViT(ViTConfig(**{**SMALL, "depth": 5, "stochastic_depth": 0.2}))
    for block, rate in zip(model.blocks, (0.0, 0.05, 0.1, 0.15, 0.2), strict=True):
        assert block.drop_path1.rate == pytest.approx(rate)  # type: ignore[union-attr]
        assert block.drop_path2.rate == pytest.approx(rate)  # type: ignore[union-attr]


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "head_dropout", "stochastic_depth"])
def test_rates_act_in_training_mode_alone(rate: str) -> None:
    overrides: dict[str, Any] = {rate: 0.5}
    model = small_vit(**overrides)
    plain = small_vit()
    x = images(4, 3, 32, 32)
    torch.manual_seed(0)
    assert torch.equal(model(x), plain(x))
    assert not torch.equal(model.train()(x), plain(x))


def test_dropout_follows_the_position_embedding() -> None:
    """Appendix B.1: "directly after adding positional- to patch embeddings"."""
    model = small_vit(dropout=0.25, num_register_tokens=4).train()
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    torch.manual_seed(0)
    model(images(16, 3, 32, 32))
    # 16128 elements, so that the share has a standard deviation of 0.0034.
    assert abs((seen[0] == 0).double().mean().item() - 0.25) < 0.015


def test_trains() -> None:
    model = small_vit(stochastic_depth=0.1, dropout=0.1, layer_scale=0.1, num_register_tokens=1).float().train()
    redraw(model)
    torch.manual_seed(0)
    x, labels = images(8, 3, 32, 32, dtype=torch.float32), torch.arange(8) % 7
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- the module as a module -----------------------------------------------------------------------


def test_prefix_tokens_and_positions_for_the_kernels() -> None:
    model = small_vit(num_register_tokens=2)
    prefix = model.prefix_tokens()
    assert prefix is not None
    assert model.cls_token is not None
    assert model.reg_token is not None
    assert torch.equal(prefix, torch.cat([model.cls_token[0], model.reg_token[0]]))
    assert model.position_embedding((4, 4)).shape == (19, 48)
    assert small_vit(class_token=False, global_pool="avg").prefix_tokens() is None
    assert small_vit(no_embed_class=True).position_embedding((2, 3)).shape == (6, 48)


def test_copies_and_exports() -> None:
    model = small_vit(num_register_tokens=1)
    x = images(2, 3, 32, 32)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    program = torch.export.export(model, (x,))
    assert relative(program.module()(x), expected) < 1e-12
    assert {f.name for f in dataclasses.fields(model.config)} == set(model.config.to_dict())


CHILD = """
import sys
import vit_engine
assert vit_engine.__version__
assert "ViT" in dir(vit_engine)
assert "torch" not in sys.modules and "triton" not in sys.modules, "importing the package loads torch or triton"
try:
    vit_engine.Vit
except AttributeError as error:
    assert "no attribute 'Vit'" in str(error)
vit_engine.ViT, vit_engine.ViTConfig, vit_engine.load_checkpoint, vit_engine.save_checkpoint, vit_engine.load_model
vit_engine.convert, vit_engine.timm_to_google
import torch
assert "vit_kernels" not in sys.modules, "kernels are loaded before they are used"
assert not torch.cuda.is_initialized()
print("fine")
"""


def test_import_is_light() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        capture_output=True,
        text=True,
        env=child_environment(),
        cwd=os.getcwd(),
        check=False,
    )
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_a_head_takes_tokens_alone(pool: str) -> None:
    model = small_vit(global_pool=pool)
    tokens = model.forward_features(images(2, 3, 32, 32))
    assert model.forward_head(tokens).shape == (2, 7)
    for call in (model.pool, model.forward_head):
        with pytest.raises(ValueError, match=r"tokens must be \[B, T, 48\], got \[2, 48\]"):
            call(tokens[:, 0])
        with pytest.raises(TypeError, match=r"tokens must be a torch\.Tensor, got list"):
            call([1])  # type: ignore[arg-type]
