import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.redraw import SMALL, blank, equal, images, redraw, relative, small_vit, timm_model
from vit_engine import ViT, ViTConfig, load_checkpoint, load_model
from vit_engine.checkpoint import CheckpointError
from vit_engine.position import resample_position


def google_arrays(model: ViT) -> dict[str, Any]:
    """The model's weights as flax stores them: inputs first, query, key and value apart, heads as a dimension."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    heads, width = model.config.num_heads, model.config.embed_dim
    arrays: dict[str, Any] = {
        "cls": state["cls_token"],
        "embedding/kernel": np.einsum("dchw->hwcd", state["patch_embed.proj.weight"]),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    if model.config.head == "pretrain":
        arrays |= {"pre_logits/kernel": state["pre_logits.fc.weight"].T, "pre_logits/bias": state["pre_logits.fc.bias"]}
    for i in range(model.config.depth):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = theirs + "MultiHeadDotProductAttention_1/"
        weight = state[ours + "attn.qkv.weight"].reshape(3, heads, -1, width)
        bias = state[ours + "attn.qkv.bias"].reshape(3, heads, -1)
        for part, name in enumerate(("query", "key", "value")):
            arrays[f"{attention}{name}/kernel"] = np.einsum("hkd->dhk", weight[part])
            arrays[f"{attention}{name}/bias"] = bias[part]
        arrays[attention + "out/kernel"] = np.einsum(
            "dhk->hkd", state[ours + "attn.proj.weight"].reshape(width, heads, -1)
        )
        arrays[attention + "out/bias"] = state[ours + "attn.proj.bias"]
        for norm, layer in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}{layer}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}{layer}/bias"] = state[f"{ours}{norm}.bias"]
        for layer in (0, 1):
            arrays[f"{theirs}MlpBlock_3/Dense_{layer}/kernel"] = state[f"{ours}mlp.fc{layer + 1}.weight"].T
            arrays[f"{theirs}MlpBlock_3/Dense_{layer}/bias"] = state[f"{ours}mlp.fc{layer + 1}.bias"]
    return arrays


@pytest.mark.parametrize("variant", [{}, {"head": "pretrain", "representation_size": 20}])
@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_google_file_loads(tmp_path: Path, variant: dict, prefix: str) -> None:
    source = small_vit(**variant)
    arrays = {prefix + name: array for name, array in google_arrays(source).items()}
    if prefix:
        arrays["opt/state/step"] = np.array(7)
    np.savez(tmp_path / "google.npz", **arrays)
    model = blank(**variant)
    assert load_checkpoint(model, tmp_path / "google.npz") == ((), (), ())
    assert equal(model, source)


def test_google_file_as_timm_reads_it(tmp_path: Path) -> None:
    """timm's loader for the same layout is a second opinion on every transposition."""
    np.savez(tmp_path / "google.npz", **google_arrays(small_vit()))
    theirs = timm_model(ViTConfig(**SMALL), seed=5).double()
    theirs.load_pretrained(str(tmp_path / "google.npz"))
    ours = blank()
    load_checkpoint(ours, tmp_path / "google.npz")
    x = images(2, 3, 32, 32)
    assert relative(ours(x), theirs(x)) < 1e-10


def test_google_file_in_bfloat16(tmp_path: Path) -> None:
    source = redraw(ViT(ViTConfig(**SMALL)).bfloat16())
    arrays = google_arrays(source.float())  # type: ignore[arg-type]
    opaque = {name: (array.view(np.uint32) >> 16).astype(np.uint16).view("V2") for name, array in arrays.items()}
    np.savez(tmp_path / "bf16.npz", **opaque)
    model = ViT(ViTConfig(**SMALL))
    load_checkpoint(model, tmp_path / "bf16.npz")
    assert equal(model, source)  # type: ignore[arg-type]


def test_google_positions_are_resized_bilinearly(tmp_path: Path) -> None:
    source = small_vit(image_size=48)
    np.savez(tmp_path / "google.npz", **google_arrays(source))
    model = blank(image_size=(16, 40))
    assert load_checkpoint(model, tmp_path / "google.npz").resized == ("pos_embed",)
    expected = resample_position(source.pos_embed, (2, 5), (6, 6), num_prefix=1, method="bilinear")
    assert torch.equal(model.pos_embed, expected)


def test_google_file_that_does_not_fit(tmp_path: Path) -> None:
    arrays = google_arrays(small_vit())
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/"
    del arrays[attention + "key/kernel"], arrays["cls"]
    arrays["head/kernel"] = np.zeros((48, 21843), np.float32)
    arrays["pre_logits/bias"] = np.zeros(48, np.float32)
    arrays["embedding/kernel"] = np.zeros((8, 8), np.float32)
    np.savez(tmp_path / "bad.npz", **arrays)
    model = blank()
    incomplete = "blocks.0.attn.qkv.weight needs 3 such tensors of one shape"
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, tmp_path / "bad.npz")
    assert str(error.value).splitlines()[1:] == [
        "  missing from the file: blocks.0.attn.qkv.weight",
        "  missing from the file: cls_token",
        "  missing from the file: patch_embed.proj.weight",
        "  mis-shaped head.weight: [21843, 48] in the file, [7, 48] in the model",
        f"  unexpected in the file: {attention}query/kernel ({incomplete})",
        f"  unexpected in the file: {attention}value/kernel ({incomplete})",
        "  unexpected in the file: embedding/kernel (it should have 4 axes, not the shape [8, 8])",
        "  unexpected in the file: pre_logits.fc.bias",
    ]
    assert equal(model, blank())


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_file_is_closed(tmp_path: Path) -> None:
    np.savez(tmp_path / "google.npz", **google_arrays(small_vit()))
    content = (tmp_path / "google.npz").read_bytes()
    (tmp_path / "google.npz").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"cannot be read as an \.npz archive"):
        load_checkpoint(blank(), tmp_path / "google.npz")
    gc.collect()


def test_google_file_with_other_heads(tmp_path: Path) -> None:
    """Same shapes once packed: only the file's head dimension tells."""
    np.savez(tmp_path / "google.npz", **google_arrays(small_vit(num_heads=6)))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(blank(), tmp_path / "google.npz")
    assert str(error.value).splitlines()[1:] == ["  contradiction: attention has 6 heads in the file, 3 in the model"]


def test_load_model_says_what_reads_other_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", cls=np.zeros((1, 1, 4)))
    with pytest.raises(CheckpointError, match=r"m\.npz does not describe its model.*load_checkpoint\(model, path\)"):
        load_model(tmp_path / "m.npz")
    for dtype in ("float16", torch.int8):
        with pytest.raises(TypeError, match=f"load_model: dtype must be a floating point torch.dtype .* got {dtype!r}"):
            load_model(tmp_path / "m.npz", dtype=dtype)  # type: ignore[arg-type]
