"""facebookresearch/dinov2's files in our ViT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from tests.engine.redraw import SMALL, blank, equal, images, relative, timm_model
from vit_engine import ViTConfig, dinov2_to_timm, load_checkpoint
from vit_engine.checkpoint import CheckpointError
from vit_engine.position import resample_position

DINOV2: dict[str, Any] = {"layer_scale": 1e-5, "num_classes": 0}
REGISTERS: dict[str, Any] = {**DINOV2, "num_register_tokens": 4, "no_embed_class": True}
GIANT: dict[str, Any] = {"activation": "swiglu", "hidden_dim": 96}
VARIANTS = {
    "plain": DINOV2,
    "registers": REGISTERS,
    "giant": {**DINOV2, **GIANT},
    "giant with registers": {**REGISTERS, **GIANT},
}


def facebook_state(state: dict[str, Tensor], swiglu: bool, chunks: int = 0) -> dict[str, Tensor]:
    """A timm state_dict in DinoVisionTransformer's names: the class token apart from its position embedding, registers
    without any, a mask token, and blocks in chunks of that many if asked for."""
    result = {}
    for name, tensor in state.items():
        if swiglu:
            name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if chunks and (block := re.match(r"blocks\.(\d+)\.", name)):
            name = f"blocks.{int(block[1]) // chunks}.{name[7:]}"
        result[name] = tensor
    width = state["norm.weight"].shape[0]
    generator = torch.Generator().manual_seed(7)
    if "reg_token" in state:
        position = torch.randn(1, 1, width, generator=generator, dtype=torch.float64)
        result["register_tokens"] = result.pop("reg_token")
        result["cls_token"] = state["cls_token"] - position
        result["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    result["mask_token"] = torch.randn(1, width, generator=generator, dtype=torch.float64)
    return result


@pytest.mark.parametrize("chunks", [0, 1, 2])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_facebooks_file_loads(tmp_path: Path, name: str, chunks: int) -> None:
    variant = VARIANTS[name]
    theirs = timm_model(ViTConfig(**{**SMALL, **variant})).double()
    torch.save(facebook_state(theirs.state_dict(), "swiglu" in variant.values(), chunks), tmp_path / "dinov2.pth")
    ours = blank(**variant)
    assert load_checkpoint(ours, tmp_path / "dinov2.pth", allow_pickle=True) == ((), (), ())
    x = images(2, 3, 32, 32)
    assert relative(ours(x), theirs(x)) < 1e-10


@pytest.mark.parametrize("name", VARIANTS)
def test_as_timm_reads_it(tmp_path: Path, name: str) -> None:
    """timm's own conversion of the same file, bit for bit."""
    variant = VARIANTS[name]
    theirs = timm_model(ViTConfig(**{**SMALL, **variant})).double()
    state = facebook_state(theirs.state_dict(), "swiglu" in variant.values())
    ours = blank(**variant)
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "dinov2.safetensors")
    load_checkpoint(ours, tmp_path / "dinov2.safetensors")
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs), strict=True)
    assert equal(ours, theirs)
    assert dinov2_to_timm(state).keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("variant", [DINOV2, REGISTERS], ids=["plain", "registers"])
def test_positions_are_resized_without_the_class_token(tmp_path: Path, variant: dict) -> None:
    source = timm_model(ViTConfig(**{**SMALL, **variant, "image_size": 48})).double()
    torch.save({"model": facebook_state(source.state_dict(), False)}, tmp_path / "dinov2.pth")
    model = blank(**variant)
    assert load_checkpoint(model, tmp_path / "dinov2.pth", allow_pickle=True).resized == ("pos_embed",)
    prefix = model.config.num_position_prefix
    expected = resample_position(source.pos_embed, (4, 4), (6, 6), num_prefix=prefix)  # type: ignore[arg-type]
    assert torch.equal(model.pos_embed, expected)


def test_registers_alone_tell_whose_file_it_is(tmp_path: Path) -> None:
    state = state_of(REGISTERS)
    del state["mask_token"]
    torch.save(state, tmp_path / "dinov2.pth")
    model = blank(**REGISTERS)
    load_checkpoint(model, tmp_path / "dinov2.pth", allow_pickle=True)
    assert all(torch.equal(tensor, dinov2_to_timm(state)[name]) for name, tensor in model.state_dict().items())


def test_is_refused_unless_asked_for(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "dinov2.pth")
    with pytest.raises(CheckpointError, match="pickles"):
        load_checkpoint(blank(**DINOV2), tmp_path / "dinov2.pth")


def state_of(variant: dict) -> dict[str, Tensor]:
    theirs = timm_model(ViTConfig(**{**SMALL, **variant})).double()
    return facebook_state(theirs.state_dict(), "swiglu" in variant.values())


def refusal(tmp_path: Path, state: dict[str, Tensor], variant: dict) -> list[str]:
    torch.save(state, tmp_path / "bad.pth")
    model = blank(**variant)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, tmp_path / "bad.pth", allow_pickle=True)
    assert equal(model, blank(**variant))
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = state_of(REGISTERS)
    state["dino_head.mlp.0.weight"] = torch.ones(48, 48)
    state["blocks.0.1.norm1.bias"] = torch.ones(48)
    del state["blocks.0.ls2.gamma"]
    assert refusal(tmp_path, state, REGISTERS) == [
        "missing from the file: blocks.0.ls2.gamma",
        "unexpected in the file: blocks.0.1.norm1.bias (blocks.1.norm1.bias is in its place)",
        "unexpected in the file: dino_head.mlp.0.weight",
    ]
    with pytest.raises(ValueError, match="dinov2_to_timm: 2 of the tensors have no place in timm's layout"):
        dinov2_to_timm(state)


def test_models_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    """Registers with position embeddings of their own, none at all, or an MLP where the file has SwiGLU."""
    embedded = {**REGISTERS, "no_embed_class": False}
    assert refusal(tmp_path, state_of(REGISTERS), embedded) == [
        "mis-shaped pos_embed: [1, 16, 48] in the file, [1, 21, 48] in the model"
    ]
    assert refusal(tmp_path, state_of(REGISTERS), DINOV2) == [
        "mis-shaped pos_embed: [1, 16, 48] in the file, [1, 17, 48] in the model",
        "unexpected in the file: reg_token",
    ]
    assert len(refusal(tmp_path, state_of(VARIANTS["giant"]), DINOV2)) == 6


def test_positions_that_cannot_be_taken_apart(tmp_path: Path) -> None:
    state = state_of(REGISTERS)
    state["pos_embed"] = state["pos_embed"][0]
    assert refusal(tmp_path, state, REGISTERS) == [
        "missing from the file: pos_embed",
        "unexpected in the file: pos_embed (beside register_tokens it should be [1, 1 + N, D], not [17, 48])",
    ]
