import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.mlp import SwiGLUPacked
from torch import Tensor, nn

from tests.engine.redraw import SMALL, images, redraw, relative, small_vit
from vit_engine.config import ACTIVATIONS, ViTConfig
from vit_engine.layers import Attention, Block, DropPath, LayerScale, Mlp, PatchEmbed, activate


def config(**overrides) -> ViTConfig:
    return ViTConfig(**{**SMALL, **overrides})


def drawn(module: nn.Module) -> nn.Module:
    return redraw(module.double()).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_appendix_a(bias: bool) -> None:
    """Equations 5 to 8 written out, one head at a time."""
    layer = drawn(Attention(config(qkv_bias=bias)))
    state, z = layer.state_dict(), tokens(2, 5, 48)
    assert set(state) == {"qkv.weight", "proj.weight", "proj.bias"} | ({"qkv.bias"} if bias else set())
    heads = []
    for head in range(3):
        q, k, v = (
            z @ state["qkv.weight"][48 * part + 16 * head :][:16].T
            + (state["qkv.bias"][48 * part + 16 * head :][:16] if bias else 0)
            for part in range(3)
        )
        weights = torch.exp(q @ k.transpose(1, 2) / math.sqrt(16))
        heads.append(weights / weights.sum(-1, keepdim=True) @ v)
    expected = torch.cat(heads, -1) @ state["proj.weight"].T + state["proj.bias"]
    assert relative(layer(z), expected) < 1e-12


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_their_formulas(kind: str) -> None:
    x = torch.linspace(-9, 9, 38, dtype=torch.float64).reshape(2, 19).T.contiguous()  # [19, 2]
    formulas = {
        "gelu": lambda v: v / 2 * (1 + math.erf(v / math.sqrt(2))),
        "gelu_tanh": lambda v: v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "quick_gelu": lambda v: v / (1 + math.exp(-1.702 * v)),
        "silu": lambda v: v / (1 + math.exp(-v)),
    }
    if kind == "swiglu":
        expected = [[formulas["silu"](gate) * value] for gate, value in x.tolist()]
    else:
        expected = [[formulas[kind](v) for v in row] for row in x.tolist()]
    assert relative(activate(x, kind), torch.tensor(expected, dtype=torch.float64)) < 1e-14


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        activate(torch.ones(2), "relu")


def test_swiglu_packs_as_timm() -> None:
    ours = drawn(Mlp(config(activation="swiglu", hidden_dim=100)))
    theirs = SwiGLUPacked(48, hidden_features=100, act_layer=nn.SiLU).double()  # type: ignore[call-arg]
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = tokens(3, 4, 48)
    assert relative(ours(x), theirs(x)) < 1e-14


def test_mlp_is_fc2_of_activation_of_fc1() -> None:
    layer = drawn(Mlp(config(mlp_ratio=1.5)))
    state, x = layer.state_dict(), tokens(2, 3, 48)
    assert state["fc1.weight"].shape == (72, 48)
    hidden = activate(x @ state["fc1.weight"].T + state["fc1.bias"], "gelu")
    assert relative(layer(x), hidden @ state["fc2.weight"].T + state["fc2.bias"]) < 1e-13


@pytest.mark.parametrize("scale", [None, 1e-5])
def test_block_is_equations_2_and_3(scale: float | None) -> None:
    layer = drawn(Block(config(layer_scale=scale, norm_eps=0.1)))
    assert isinstance(layer, Block)
    state = layer.state_dict()
    assert ("ls1.gamma" in state) == ("ls2.gamma" in state) == (scale is not None)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 0.1) * state[f"{name}.weight"] + state[f"{name}.bias"]

    z = tokens(2, 5, 48)
    one: Tensor | float = 1.0
    after = layer.attn(norm(z, "norm1")) * state.get("ls1.gamma", one) + z
    expected = layer.mlp(norm(after, "norm2")) * state.get("ls2.gamma", one) + after
    assert relative(layer(z), expected) < 1e-13


def test_layer_scale_starts_at_its_value() -> None:
    assert torch.equal(LayerScale(3, 0.25)(torch.ones(2, 3)), torch.full((2, 3), 0.25))


def test_patch_embed_is_a_linear_layer_on_patches() -> None:
    """Equation 1: row-major patches, each flattened as (channel, row, column)."""
    layer = drawn(PatchEmbed(config(image_size=(16, 24), patch_size=(8, 4), in_channels=2)))
    x = images(3, 2, 16, 24)
    expected = [
        x[:, :, 8 * row : 8 * row + 8, 4 * column : 4 * column + 4].reshape(3, -1)
        @ layer.state_dict()["proj.weight"].reshape(48, -1).T
        + layer.state_dict()["proj.bias"]
        for row in range(2)
        for column in range(6)
    ]
    assert relative(layer(x), torch.stack(expected, 1)) < 1e-13
    assert relative(layer(x.contiguous(memory_format=torch.channels_last)), torch.stack(expected, 1)) < 1e-13


@pytest.mark.parametrize("normalised", [True, False])
def test_bytes_are_normalised(normalised: bool) -> None:
    constants = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.7)} if normalised else {}
    layer = drawn(PatchEmbed(config(**constants)))
    assert set(layer.state_dict()) == {"proj.weight", "proj.bias"}
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    floats = pixels.double() / 255
    if normalised:
        mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.7)))
        floats = (floats - mean) / std
    assert relative(layer(pixels), layer(floats)) < 1e-13


def test_constants_stay_exact_in_half_precision() -> None:
    layer = PatchEmbed(config(mean=1 / 3, std=0.3))
    for dtype, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        layer = layer.to(dtype)
        assert layer.proj.weight.dtype == dtype
        assert torch.equal(layer.mean, torch.full((3,), 1 / 3, dtype=kept))  # type: ignore[arg-type]
        assert torch.equal(layer.std, torch.full((3,), 0.3, dtype=kept))  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = PatchEmbed(config(mean=1 / 3, std=0.3))
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    for module in (empty.to_empty(device="cpu"), assigned):
        assert module.mean is not None
        assert torch.equal(module.mean, torch.full((3,), 1 / 3, dtype=module.mean.dtype))


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (torch.zeros(3, 32, 32), ValueError, "images must be [B, 3, H, W], got [3, 32, 32]"),
        (torch.zeros(1, 1, 32, 32), ValueError, "images must be [B, 3, H, W], got [1, 1, 32, 32]"),
        (torch.zeros(1, 3, 32, 36), ValueError, "images of 32 x 36 pixels do not divide into patches of 8 x 8"),
        (torch.zeros(1, 3, 0, 32), ValueError, "images of 0 x 32 pixels do not divide into patches of 8 x 8"),
        (torch.zeros(1, 3, 32, 32).half(), TypeError, "images must be torch.float32, as the model's parameters are"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), TypeError, "or torch.uint8; got torch.int64"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "images are on meta, but the model is on cpu"),
    ],
)
def test_patch_embed_refuses(value: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        PatchEmbed(config())(value)
    assert text in str(raised.value)


def test_autocast_takes_float_images() -> None:
    layer = PatchEmbed(config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.zeros(1, 3, 32, 32)).dtype == torch.bfloat16


def test_drop_path_drops_whole_images() -> None:
    layer = DropPath(0.25).train()
    torch.manual_seed(0)
    y = layer(torch.ones(4000, 2, 3))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    # Standard deviation of the share of 4000 draws: 0.0068.
    assert abs(float((y[:, 0, 0] == 0).float().mean()) - 0.25) < 0.03
    x = torch.ones(3, 2)
    assert layer.eval()(x) is x
    assert DropPath(0.0).train()(x) is x


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout"])
def test_dropout_only_in_training(rate: str) -> None:
    layer = drawn(Block(config(**{rate: 0.5})))
    x = tokens(2, 5, 48)
    torch.manual_seed(0)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("images", [None, [[0.0]], np.zeros((1, 3, 32, 32))], ids=["None", "list", "numpy"])
def test_what_is_no_tensor_is_named(images: object) -> None:
    model: Any = small_vit()
    for call in (model, model.forward_features, model.patch_embed):
        with pytest.raises(TypeError, match=rf"images must be a torch\.Tensor, got {type(images).__name__}"):
            call(images)
