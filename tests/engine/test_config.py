import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vit_engine.config import ACTIVATIONS, PRESETS, ViTConfig
from vit_engine.vit import ViT


def test_defaults_are_vit_base_16() -> None:
    config = ViTConfig()
    assert (config.grid, config.num_patches, config.num_tokens, config.head_dim) == ((14, 14), 196, 197, 64)
    assert (config.mlp_hidden, config.num_prefix_tokens, config.num_position_prefix) == (3072, 1, 1)
    assert not config.norm_after_pool


def test_rectangles_and_registers() -> None:
    config = ViTConfig(image_size=(48, 80), patch_size=(16, 8), num_register_tokens=4, no_embed_class=True)
    assert (config.image_hw, config.patch_hw, config.grid, config.num_patches) == ((48, 80), (16, 8), (3, 10), 30)
    assert (config.num_prefix_tokens, config.num_position_prefix, config.num_tokens) == (5, 0, 35)


def test_equal_spellings_are_equal() -> None:
    assert ViTConfig(image_size=(224, 224), mean=0.5, std=[0.5]) == ViTConfig(mean=(0.5, 0.5, 0.5), std=0.5)  # type: ignore[arg-type]
    assert hash(ViTConfig(image_size=[32, 64])) == hash(ViTConfig(image_size=(32, 64)))  # type: ignore[arg-type]


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ViTConfig().depth = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"image_size": 0}, "image_size must be a positive int or a (height, width) pair of positive ints, got 0"),
        ({"image_size": (224,)}, "image_size must be a positive int or a (height, width) pair"),
        ({"image_size": 100}, "image_size must be divisible by patch_size 16, got 100"),
        ({"image_size": (224, 100)}, "image_size must be divisible by patch_size 16, got (224, 100)"),
        (
            {"patch_size": 16.0},
            "patch_size must be a positive int or a (height, width) pair of positive ints, got 16.0",
        ),
        ({"in_channels": 0}, "in_channels must be a positive int, got 0"),
        ({"embed_dim": 770}, "embed_dim must be divisible by num_heads 12, got 770"),
        ({"depth": True}, "depth must be a positive int, got True"),
        ({"num_heads": -1}, "num_heads must be a positive int, got -1"),
        ({"mlp_ratio": 0}, "mlp_ratio must be a positive number, got 0"),
        ({"mlp_ratio": 1e-9}, "mlp_ratio must be large enough for a hidden layer"),
        ({"hidden_dim": 0}, "hidden_dim must be a positive int or None, got 0"),
        ({"hidden_dim": 7, "activation": "swiglu"}, "hidden_dim must be such that fc1 has an even number of outputs"),
        ({"qkv_bias": 1}, "qkv_bias must be True or False, got 1"),
        ({"num_classes": -1}, "num_classes must be an int of 0 or more, got -1"),
        ({"class_token": "yes"}, "class_token must be True or False, got 'yes'"),
        ({"class_token": False}, "global_pool must be 'avg' or 'map' where class_token is False, got 'token'"),
        (
            {"global_pool": "map", "activation": "swiglu"},
            "global_pool must be 'token' or 'avg' where activation is 'swiglu', got 'map'",
        ),
        ({"num_register_tokens": 1.5}, "num_register_tokens must be an int of 0 or more, got 1.5"),
        ({"global_pool": "max"}, "global_pool must be one of 'token', 'avg', 'map', got 'max'"),
        ({"fc_norm": 1}, "fc_norm must be True, False or None, got 1"),
        ({"fc_norm": 1.0}, "fc_norm must be True, False or None, got 1.0"),
        ({"fc_norm": np.True_}, "fc_norm must be True, False or None, got "),
        ({"head": np.array(["finetune", "pretrain"])}, "head must be one of 'finetune', 'pretrain', got array("),
        ({"layer_scale": 0.0}, "layer_scale must be a number other than 0 in float32, or None for no LayerScale, got"),
        ({"mlp_ratio": 1e308}, "mlp_ratio must be such that embed_dim 768 times it is finite, got 1e+308"),
        ({"embed_dim": 12 * 10**400}, "mlp_ratio must be such that embed_dim 12000"),
        ({"norm_eps": 10**400}, "norm_eps must be a positive number in float32, got 1000"),
        ({"norm_eps": float("nan")}, "norm_eps must be a positive number in float32, got nan"),
        ({"norm_eps": 1e-300}, "norm_eps must be a positive number in float32, got 1e-300"),
        ({"layer_scale": -1e-300}, "layer_scale must be a number other than 0 in float32, or None"),
        ({"layer_scale": 1e300}, "layer_scale must be a number other than 0 in float32, or None"),
        ({"mean": 1e300, "std": 1}, "mean must be finite numbers in float32, one or one per channel (3), got 1e+300"),
        ({"mean": 0, "std": 1e-300}, "std must be positive numbers in float32, one or one per channel (3), got 1e-300"),
        (
            {"activation": "relu"},
            "activation must be one of 'gelu', 'gelu_tanh', 'quick_gelu', 'silu', 'swiglu', got 'relu'",
        ),
        ({"head": "linear"}, "head must be one of 'finetune', 'pretrain', got 'linear'"),
        ({"representation_size": 64}, "representation_size must be None unless head is 'pretrain', got 64"),
        ({"dropout": 1.0}, "dropout must be a number in [0, 1), got 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout must be a number in [0, 1), got -0.1"),
        ({"stochastic_depth": "0.1"}, "stochastic_depth must be a number in [0, 1), got '0.1'"),
        ({"position_interpolation": "nearest"}, "position_interpolation must be one of 'bicubic', 'bilinear'"),
        ({"mean": (0.5, 0.5), "std": 0.5}, "mean must be finite numbers in float32, one or one per channel (3), got"),
        ({"mean": 0.5, "std": (0.5, 0.0, 0.5)}, "std must be positive numbers in float32, one or one per channel (3)"),
        ({"mean": 0.5}, "std must be given where the other of mean and std is given, got None"),
    ],
)
def test_refuses(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError) as error:
        ViTConfig(**arguments)
    assert str(error.value).startswith("ViTConfig: ")
    assert text in str(error.value)


def test_unknown_preset_lists_near_names() -> None:
    with pytest.raises(ValueError) as error:
        ViTConfig.preset("vit_base_patch16_225")
    assert "no preset 'vit_base_patch16_225'; did you mean vit_base_patch16_224" in str(error.value)
    with pytest.raises(ValueError, match="no preset 'resnet'") as error:
        ViTConfig.preset("resnet")
    assert "did you mean" not in str(error.value)
    name: Any = 16
    with pytest.raises(TypeError, match="preset: name must be a str, got int"):
        ViTConfig.preset(name)


def test_unknown_field_is_named() -> None:
    with pytest.raises(TypeError, match="no field 'drop', 'img_size'; its fields are activation,"):
        ViTConfig.preset("vit_tiny_patch16_224", img_size=64, drop=0.1)
    fields: Any = {"drop": 0.1, 3: None}
    with pytest.raises(TypeError, match="no field 3, 'drop'; its fields are activation,"):
        ViTConfig.from_dict(fields)


@pytest.mark.parametrize("values", [None, 3, ["depth"], ViTConfig()], ids=lambda value: type(value).__name__)
def test_what_is_no_mapping_of_fields_is_named(values: Any) -> None:
    text = f"ViTConfig.from_dict: values must map fields to values, got {type(values).__name__}"
    with pytest.raises(TypeError, match=text):
        ViTConfig.from_dict(values)


def test_preset_overrides() -> None:
    config = ViTConfig.preset("vit_tiny_patch16_224", image_size=(32, 64), in_channels=1, num_classes=10)
    assert (config.embed_dim, config.grid, config.num_classes, config.mean) == (192, (2, 4), 10, (0.5,))


def test_issue_list_of_presets() -> None:
    families = {
        "tiny": [16],
        "small": [8, 16, 32],
        "base": [8, 16, 32],
        "large": [14, 16, 32],
        "huge": [14],
        "giant": [14],
    }
    for family, patches in families.items():
        for patch in patches:
            assert f"vit_{family}_patch{patch}_224" in PRESETS
    for family in ("tiny", "small", "base", "large"):
        assert ViTConfig.preset(f"vit_{family}_patch16_384").image_size == 384


class _Counted(nn.Module):
    """Stands in for timm's blocks, so that a model of 48 is made quickly."""

    def __init__(self, **_: object) -> None:
        super().__init__()


def _activation(layer: object) -> str:
    if isinstance(layer, nn.GELU):
        return "gelu" if layer.approximate == "none" else "gelu_tanh"
    return {"GELUTanh": "gelu_tanh", "SiLU": "swiglu"}[type(layer).__name__]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_timms(name: str) -> None:
    """Depth, and name and shape of every parameter outside and inside of the blocks, are those of timm's model."""
    config = ViTConfig.preset(name)
    # timm's default classes and image size come with its pretrained tag, which may change between releases.
    arguments = {"img_size": config.image_size, "num_classes": config.num_classes}
    with torch.device("meta"):
        assert config.depth == len(timm.create_model(name, block_fn=_Counted, **arguments).blocks)  # type: ignore[arg-type]
        theirs = timm.create_model(name, depth=1, **arguments)
        ours = ViT(dataclasses.replace(config, depth=1))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    mine, other = ours.blocks[0], theirs.blocks[0]  # type: ignore[index]
    assert (mine.attn.num_heads, mine.norm1.eps) == (other.attn.num_heads, other.norm1.eps)  # type: ignore[union-attr]
    if ours.attn_pool is not None:
        other_pool: Any = theirs.attn_pool
        assert (ours.attn_pool.num_heads, ours.attn_pool.norm.eps) == (other_pool.num_heads, other_pool.norm.eps)
    assert config.activation == _activation(other.mlp.act)  # type: ignore[union-attr]
    default = timm.get_pretrained_cfg(name)
    assert default is not None
    assert (config.mean, config.std) == (tuple(default.mean), tuple(default.std))


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 9).map(lambda n: 2 * n),
    patch=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 4),
    registers=st.integers(0, 3),
    activation=st.sampled_from(ACTIVATIONS),
    pool=st.sampled_from(["token", "avg"]),
    scale=st.none() | st.floats(1e-6, 1.0),
)
def test_survives_json(heads, head_dim, patch, grid, channels, registers, activation, pool, scale) -> None:
    config = ViTConfig(
        image_size=(grid[0] * patch, grid[1] * patch),
        patch_size=patch,
        in_channels=channels,
        embed_dim=heads * head_dim,
        num_heads=heads,
        num_register_tokens=registers,
        activation=activation,
        global_pool=pool,
        layer_scale=scale,
        mean=0.25,
        std=tuple(0.1 * (i + 1) for i in range(channels)),
    )
    assert config.grid == grid
    assert ViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
