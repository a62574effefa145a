"""Converted weights in the other libraries' own models: they load strictly and compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.layers.mlp import SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from tests.engine.redraw import images, redraw, relative
from vit_engine import (
    ViT,
    ViTConfig,
    convert,
    dinov2_to_timm,
    google_to_timm,
    timm_to_torchvision,
    timm_to_transformers,
    torchvision_to_timm,
    transformers_to_timm,
)

State = dict[str, Tensor]
TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
THEIRS: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
    "num_labels": 7,
}


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    return redraw(model, seed).eval()


def same(a: State, b: State) -> bool:
    """Same names, and same values bit for bit."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def own_memory(state: State) -> bool:
    """Fit for safetensors, which refuses tensors that share memory."""
    return len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)


def x() -> Tensor:
    return images(2, 3, 32, 32, dtype=torch.float32)


# --- torchvision ----------------------------------------------------------------------------------


def torchvision_model(seed: int = 0, **more: Any) -> nn.Module:
    return drawn(TorchvisionViT(32, 8, 2, 3, 48, 96, num_classes=7, **more), seed)


@torch.no_grad()
def test_torchvision_in_timm_and_back() -> None:
    theirs = torchvision_model()
    ours = VisionTransformer(**TIMM, mlp_ratio=2).eval()
    state = torchvision_to_timm(theirs.state_dict())
    ours.load_state_dict(state, strict=True)
    assert relative(ours(x()), theirs(x())) < 1e-5
    back = timm_to_torchvision(state)
    assert same(back, theirs.state_dict())
    other = torchvision_model(seed=1)
    other.load_state_dict(timm_to_torchvision(drawn(ours, 2).state_dict()), strict=True)
    assert relative(other(x()), ours(x())) < 1e-5
    assert same(torchvision_to_timm(timm_to_torchvision(ours.state_dict())), ours.state_dict())


@torch.no_grad()
def test_torchvisions_hidden_head_and_old_names() -> None:
    theirs = torchvision_model(representation_size=20)
    config = ViTConfig(32, 8, 3, 48, 2, 3, 2.0, num_classes=7, head="pretrain", representation_size=20)
    ours = ViT(config).eval()
    old = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
           for name, tensor in theirs.state_dict().items()}  # fmt: skip
    assert "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in old
    ours.load_state_dict(torchvision_to_timm(old), strict=True)
    assert relative(ours(x()), theirs(x())) < 1e-5
    assert same(timm_to_torchvision(ours.state_dict()), theirs.state_dict())


# --- transformers ---------------------------------------------------------------------------------


def vit() -> tuple[nn.Module, nn.Module, str]:
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**THEIRS, intermediate_size=96))
    return theirs, VisionTransformer(**TIMM, mlp_ratio=2), "vit"


def deit() -> tuple[nn.Module, nn.Module, str]:
    config = transformers.DeiTConfig(**THEIRS, intermediate_size=96, qkv_bias=False)
    theirs = transformers.DeiTForImageClassificationWithTeacher(config)
    return theirs, VisionTransformerDistilled(**TIMM, mlp_ratio=2, qkv_bias=False), "deit"


def dinov2(**more: Any) -> tuple[nn.Module, nn.Module, str]:
    theirs = transformers.Dinov2Model(transformers.Dinov2Config(**THEIRS, mlp_ratio=2, **more))
    return theirs, VisionTransformer(**{**TIMM, "num_classes": 0}, mlp_ratio=2, init_values=1e-5), "dinov2"


def dinov2_giant() -> tuple[nn.Module, nn.Module, str]:
    # Two thirds of 96 outputs for gate and for value each.
    theirs = dinov2(use_swiglu_ffn=True)[0]
    options: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 128 / 48}
    return theirs, VisionTransformer(**{**TIMM, "num_classes": 0}, **options, init_values=1e-5), "dinov2"


def dinov2_registers() -> tuple[nn.Module, nn.Module, str]:
    config = transformers.Dinov2WithRegistersConfig(**THEIRS, mlp_ratio=2, num_register_tokens=3)
    options: dict[str, Any] = {"reg_tokens": 3, "no_embed_class": True, "mlp_ratio": 2, "init_values": 1e-5}
    ours = VisionTransformer(**{**TIMM, "num_classes": 0}, **options)
    return transformers.Dinov2WithRegistersModel(config), ours, "dinov2"


PAIRS = [vit, deit, dinov2, dinov2_giant, dinov2_registers]


def outputs(theirs: nn.Module, ours: nn.Module) -> tuple[Tensor, Tensor]:
    result = theirs(x())
    if "logits" in result:
        return result.logits, ours(x())
    return result.last_hidden_state, ours.forward_features(x())  # type: ignore[operator]


def unmasked(model: nn.Module) -> nn.Module:
    """The model with the mask token of a new one, which is zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_transformers_in_timm_and_back(pair, tmp_path: Path) -> None:
    theirs, ours, family = pair()
    unmasked(drawn(theirs))
    state = transformers_to_timm(theirs.state_dict())
    ours.eval().load_state_dict(state, strict=True)
    assert relative(*reversed(outputs(theirs, ours))) < 1e-5
    back = timm_to_transformers(state, family)
    if pair is dinov2_registers:  # the class token's position embedding stays in the class token
        back["embeddings.position_embeddings"][:, 0] = theirs.state_dict()["embeddings.position_embeddings"][:, 0]
        back["embeddings.cls_token"] = theirs.state_dict()["embeddings.cls_token"]
    assert same(back, theirs.state_dict())
    # save_pretrained writes version 4's names.
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() != back.keys()
    assert same(transformers_to_timm(saved), state)
    assert timm_to_transformers(state, family, "v4").keys() == saved.keys()


@pytest.mark.parametrize("layout", ["v5", "v4"])
@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_timm_in_transformers_and_back(pair, layout: str, tmp_path: Path) -> None:
    theirs, ours, family = pair()
    state = drawn(ours, 3).state_dict()
    converted = timm_to_transformers(state, family, layout)
    assert own_memory(converted)
    assert same(transformers_to_timm(converted), state)
    if layout == "v5":
        theirs.load_state_dict(converted, strict=True)
    else:
        theirs.config.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
        save_file(converted, tmp_path / "model.safetensors", metadata={"format": "pt"})
        theirs, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)  # type: ignore[attr-defined]
        assert not any(report.values()), report
    assert relative(*outputs(theirs.eval(), ours)) < 1e-5


@torch.no_grad()
def test_transformers_pooler_is_the_hidden_head() -> None:
    theirs = drawn(transformers.ViTModel(transformers.ViTConfig(**THEIRS, intermediate_size=96)))
    ours = ViT(ViTConfig(32, 8, 3, 48, 2, 3, 2.0, num_classes=0, head="pretrain")).eval()
    ours.load_state_dict(transformers_to_timm(theirs.state_dict()), strict=True)
    assert relative(ours(x()), theirs(x()).pooler_output) < 1e-5
    assert same(timm_to_transformers(ours.state_dict()), theirs.state_dict())


def test_deit_without_a_teacher_and_other_prefixes() -> None:
    config = transformers.DeiTConfig(**THEIRS, intermediate_size=96)
    state = drawn(transformers.DeiTForImageClassification(config)).state_dict()
    assert same(timm_to_transformers(transformers_to_timm(state), "deit"), state)
    bare = {name: tensor for name, tensor in transformers_to_timm(state).items() if not name.startswith("head.")}
    names = timm_to_transformers(bare, "deit")
    assert "embeddings.distillation_token" in names
    assert set(timm_to_transformers(bare, "deit", prefix="deit.")) == {"deit." + name for name in names}
    giant = drawn(dinov2_registers()[0]).state_dict()
    prefixed = {"dinov2_with_registers." + name: tensor for name, tensor in giant.items()}
    assert same(transformers_to_timm(prefixed), transformers_to_timm(giant))


# --- strictness -----------------------------------------------------------------------------------


def timm_state(**more: Any) -> State:
    return drawn(VisionTransformer(**{**TIMM, **more})).state_dict()


def lines(error: pytest.ExceptionInfo[ValueError]) -> list[str]:
    return str(error.value).splitlines()


def test_what_has_no_place_is_named_at_once() -> None:
    state = timm_state(reg_tokens=2, init_values=1e-5, depth=1)
    with pytest.raises(ValueError) as error:
        timm_to_torchvision(state)
    assert lines(error) == [
        "timm_to_torchvision: 3 of the tensors have no place in torchvision's layout:",
        "  blocks.0.ls1.gamma",
        "  blocks.0.ls2.gamma",
        "  reg_token",
    ]
    with pytest.raises(ValueError) as error:
        timm_to_transformers(state)
    assert lines(error)[0].endswith("3 of the tensors have no place in transformers' layout of family 'vit':")
    state = timm_state(class_token=False, global_pool="map", depth=1)
    with pytest.raises(ValueError) as error:
        timm_to_transformers(state, "dinov2")
    assert [line.strip() for line in lines(error)[1:]] == sorted(
        name for name in state if name.startswith(("attn_pool.", "head."))
    )
    with pytest.raises(ValueError, match=r"timm's layout:\n  conv_stem\.weight$"):
        torchvision_to_timm({"conv_stem.weight": torch.ones(1), "class_token": torch.ones(1, 1, 48)})
    for function in (torchvision_to_timm, transformers_to_timm, dinov2_to_timm):
        with pytest.raises(ValueError, match=r"  blocks\.0\.norm9\.weight"):
            function({"blocks.0.norm9.weight": torch.ones(1)})


def test_half_a_projection_is_refused() -> None:
    state = drawn(vit()[0]).state_dict()
    del state["vit.layers.1.attention.k_proj.bias"]
    state["vit.layers.0.attention.v_proj.weight"] = torch.ones(24, 48)
    with pytest.raises(ValueError) as error:
        transformers_to_timm(state)
    layer = "  vit.layers.{}.attention.{}_proj.{} (blocks.{}.attn.qkv.{} needs 3 such tensors of one shape)"
    assert lines(error)[1:] == [layer.format(0, part, "weight", 0, "weight") for part in "kqv"] + [
        layer.format(1, part, "bias", 1, "bias") for part in "qv"
    ]
    scalars = {f"layers.0.attention.{part}_proj.bias": torch.tensor(1.0) for part in "qkv"}
    with pytest.raises(ValueError, match="3 of the tensors"):
        transformers_to_timm(scalars)
    for odd in (torch.ones(49, 48), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"attn\.qkv\.weight \(its shape \[.*\] has no 3 equal shares of rows\)"):
            timm_to_transformers({"blocks.0.attn.qkv.weight": odd})


def test_two_tensors_for_one_place_are_refused() -> None:
    cls = torch.ones(1, 1, 48)
    with pytest.raises(ValueError, match=r"  vit\.embeddings\.cls_token \(embeddings\.cls_token is in its place\)"):
        transformers_to_timm({"embeddings.cls_token": cls, "vit.embeddings.cls_token": cls})
    both = {"layers.0.mlp.fc1.weight": torch.ones(8, 4), "layers.0.mlp.up_proj.weight": torch.ones(4, 4)}
    with pytest.raises(ValueError, match=r"  layers\.0\.mlp\.up_proj\.weight \(layers\.0\.mlp\.fc1\.weight is in its"):
        transformers_to_timm(both)


def test_heads_that_read_something_else_are_refused() -> None:
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**THEIRS, mlp_ratio=2))
    with pytest.raises(ValueError) as error:
        transformers_to_timm(model.state_dict())
    why = "(it reads class token and mean side by side, as no head of timm's does)"
    assert lines(error)[1:] == [f"  classifier.bias {why}", f"  classifier.weight {why}"]
    hidden = {**timm_state(depth=1), "pre_logits.fc.weight": torch.ones(48, 48)}
    with pytest.raises(ValueError, match=r"family 'vit':\n  pre_logits\.fc\.weight$"):
        timm_to_transformers(hidden)


def test_registers_without_their_company_are_refused() -> None:
    state = drawn(dinov2_registers()[0]).state_dict()
    del state["embeddings.cls_token"]
    with pytest.raises(ValueError, match=r"  embeddings\.register_tokens \(beside it there must be a class token"):
        transformers_to_timm(state)
    # Position embeddings for class token and registers: 20 rows.
    with pytest.raises(ValueError, match=r"pos_embed \(beside reg_token it must be .* square grid, not \[1, 20, 48\]"):
        timm_to_transformers(timm_state(reg_tokens=3, num_classes=0, init_values=1e-5), "dinov2")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"family": "beit"}, "family must be one of 'vit', 'deit', 'dinov2', got 'beit'"),
        ({"layout": "v3"}, "layout must be one of 'v5', 'v4', got 'v3'"),
    ],
)
def test_arguments_are_named(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"timm_to_transformers: {text}"):
        timm_to_transformers({}, **arguments)


@pytest.mark.parametrize(
    "function",
    [torchvision_to_timm, timm_to_torchvision, transformers_to_timm, timm_to_transformers, dinov2_to_timm],
)
def test_what_is_no_tensor_is_refused(function) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__}: state_dict must map names to tensors, got 'epoch': int"):
        function({"cls_token": torch.ones(1, 1, 48), "epoch": 3})
    with pytest.raises(
        TypeError, match=f"{function.__name__}: state_dict must map names to tensors, got Identity; pass "
    ):
        function(torch.nn.Identity())


# --- convert --------------------------------------------------------------------------------------


@torch.no_grad()
def test_from_any_layout_to_any_other() -> None:
    """Once around all libraries, in bfloat16: nothing is lost on the way, and nothing rounded."""
    start = {name: tensor.bfloat16() for name, tensor in torchvision_model().state_dict().items()}
    state: dict[str, Any] = convert(start, "torchvision", "transformers", layout="v4")
    assert "vit.encoder.layer.0.output.dense.bias" in state
    state = convert(state, "transformers", "transformers")
    assert "vit.layers.0.mlp.fc2.bias" in state
    state = convert(state, "transformers", "google", num_heads=3)
    assert state["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"].shape == (48, 3, 16)
    state = convert(state, "google", "timm")
    assert state.keys() == timm_state().keys()
    assert same(convert(state, "timm", "torchvision"), start)
    assert same(google_to_timm(convert(state, "timm", "google", num_heads=3)), state)


def test_convert_refuses() -> None:
    with pytest.raises(ValueError, match=r"convert: source must be one of 'timm', .*'dinov2', got 'keras'"):
        convert({}, "keras", "timm")
    with pytest.raises(ValueError, match=r"convert: target must be one of 'timm', .*'google', got 'dinov2'"):
        convert({}, "timm", "dinov2")
    some: Any = ["timm"]
    with pytest.raises(ValueError, match=r"convert: source must be one of 'timm', .*, got \['timm'\]"):
        convert({}, some, "timm")
    with pytest.raises(TypeError, match="num_heads"):
        convert({}, "timm", "google")
    with pytest.raises(TypeError, match="convert: the options of target 'timm' are none, got num_heads"):
        convert({}, "timm", "timm", num_heads=3)
    with pytest.raises(TypeError, match="timm_to_google: root must be a str, got 3"):
        convert({}, "timm", "google", num_heads=3, root=3)
    with pytest.raises(TypeError, match="timm_to_transformers: prefix must be a str or None, got 3"):
        convert({}, "timm", "transformers", prefix=3)
    with pytest.raises(TypeError, match="convert: state_dict must map names to tensors, got 'model': dict"):
        convert({"model": {}}, "timm", "timm")
    model: Any = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="convert: state_dict must map names to tensors, got Linear; pass"):
        convert(model, "timm", "torchvision")
