"""big_vision's checkpoints (blocks apart or stacked, MAP head), and Google's layouts as plain functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.redraw import SMALL, blank, equal, images, relative, small_vit, timm_model
from tests.engine.test_google_npz import google_arrays
from vit_engine import ViT, ViTConfig, google_to_timm, load_checkpoint, timm_to_google
from vit_engine.checkpoint import CheckpointError
from vit_engine.position import resample_position

SIGLIP: dict[str, Any] = {"global_pool": "map", "class_token": False, "num_classes": 0}
CLASS_TOKEN: dict[str, Any] = {"no_embed_class": True}
GAP: dict[str, Any] = {"global_pool": "avg", "class_token": False, "fc_norm": False}


def big_vision_arrays(state: dict[str, Tensor], heads: int, depth: int, scan: bool) -> dict[str, Any]:
    """The weights as big_vision's flax modules keep them, written down from its source, with blocks stacked or not."""
    numbers = {name: tensor.numpy() for name, tensor in state.items()}
    width = state["norm.weight"].shape[0]

    def layer_norm(path: str, name: str) -> dict[str, Any]:
        return {f"{path}/scale": numbers[f"{name}.weight"], f"{path}/bias": numbers[f"{name}.bias"]}

    def dense(path: str, name: str) -> dict[str, Any]:
        return {f"{path}/kernel": numbers[f"{name}.weight"].T, f"{path}/bias": numbers[f"{name}.bias"]}

    def attention(path: str, parts: dict[str, tuple[str, int]], out: str) -> dict[str, Any]:
        """parts: for each flax name the tensor that holds it and the row at which it begins there."""
        arrays: dict[str, Any] = {}
        for part, (name, row) in parts.items():
            weight, bias = (numbers[f"{name}.{leaf}"][row : row + width] for leaf in ("weight", "bias"))
            kernel = weight.reshape(heads, width // heads, width)
            arrays[f"{path}/{part}/kernel"] = np.transpose(kernel, (2, 0, 1))
            arrays[f"{path}/{part}/bias"] = bias.reshape(heads, width // heads)
        kernel = numbers[f"{out}.weight"].reshape(width, heads, width // heads)
        arrays[f"{path}/out/kernel"] = np.transpose(kernel, (1, 2, 0))
        arrays[f"{path}/out/bias"] = numbers[f"{out}.bias"]
        return arrays

    def mlp(path: str, name: str) -> dict[str, Any]:
        return {**dense(f"{path}/Dense_0", f"{name}.fc1"), **dense(f"{path}/Dense_1", f"{name}.fc2")}

    arrays: dict[str, Any] = {
        "embedding/kernel": np.transpose(numbers["patch_embed.proj.weight"], (2, 3, 1, 0)),
        "embedding/bias": numbers["patch_embed.proj.bias"],
        "pos_embedding": numbers["pos_embed"],
        **layer_norm("Transformer/encoder_norm", "norm"),
    }
    if "cls_token" in numbers:
        arrays["cls"] = numbers["cls_token"]
    if "head.weight" in numbers:
        arrays |= dense("head", "head")
    if "attn_pool.latent" in numbers:
        arrays["MAPHead_0/probe"] = numbers["attn_pool.latent"]
        parts = {"query": ("attn_pool.q", 0), "key": ("attn_pool.kv", 0), "value": ("attn_pool.kv", width)}
        arrays |= attention("MAPHead_0/MultiHeadDotProductAttention_0", parts, "attn_pool.proj")
        arrays |= layer_norm("MAPHead_0/LayerNorm_0", "attn_pool.norm") | mlp("MAPHead_0/MlpBlock_0", "attn_pool.mlp")
    blocks: list[dict[str, Any]] = []
    for i in range(depth):
        qkv = f"blocks.{i}.attn.qkv"
        parts = {"query": (qkv, 0), "key": (qkv, width), "value": (qkv, 2 * width)}
        blocks.append(
            attention("MultiHeadDotProductAttention_0", parts, f"blocks.{i}.attn.proj")
            | layer_norm("LayerNorm_0", f"blocks.{i}.norm1")
            | layer_norm("LayerNorm_1", f"blocks.{i}.norm2")
            | mlp("MlpBlock_0", f"blocks.{i}.mlp")
        )
    if scan:
        return arrays | {f"Transformer/encoderblock/{k}": np.stack([block[k] for block in blocks]) for k in blocks[0]}
    return arrays | {f"Transformer/encoderblock_{i}/{k}": v for i, block in enumerate(blocks) for k, v in block.items()}


def arrays_of(model: torch.nn.Module, scan: bool, root: str = "", heads: int = 3) -> dict[str, Any]:
    arrays = big_vision_arrays(model.state_dict(), heads, len(model.blocks), scan)  # type: ignore[arg-type]
    return {root + name: array for name, array in arrays.items()}


@pytest.mark.parametrize("root", ["", "params/", "params/img/"])
@pytest.mark.parametrize("scan", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("variant", [SIGLIP, CLASS_TOKEN, GAP], ids=["MAP", "class token", "mean"])
@torch.no_grad()
def test_timms_model_through_a_big_vision_file(tmp_path: Path, variant: dict, scan: bool, root: str) -> None:
    config = ViTConfig(**{**SMALL, **variant})
    theirs = timm_model(config, seed=5).double()
    arrays = arrays_of(theirs, scan, root)
    if root:
        arrays["opt/0/count"] = np.array(7)
    if root == "params/img/":
        arrays |= {"params/t": np.zeros(1), "params/txt/pos_embedding": np.zeros((1, 64, 48))}
    np.savez(tmp_path / "big_vision.npz", **arrays)
    ours = blank(**variant)
    assert load_checkpoint(ours, tmp_path / "big_vision.npz") == ((), (), ())
    assert equal(ours, theirs)
    x = images(2, 3, 32, 32)
    assert relative(ours(x), theirs(x)) < 1e-10


@pytest.mark.parametrize("scan", [False, True], ids=["apart", "stacked"])
def test_timm_reads_the_same_file_alike(tmp_path: Path, scan: bool) -> None:
    """timm's loader for the layout is a second opinion on every transposition and on the writer above."""
    source = small_vit(**SIGLIP)
    np.savez(tmp_path / "siglip.npz", **arrays_of(source, scan, "params/img/"))
    theirs = timm_model(source.config, seed=5).double()
    theirs.load_pretrained(str(tmp_path / "siglip.npz"))
    assert equal(theirs, source)
    ours = blank(**SIGLIP)
    load_checkpoint(ours, tmp_path / "siglip.npz")
    assert equal(ours, theirs)


def test_positions_are_resized_bilinearly(tmp_path: Path) -> None:
    source = small_vit(**SIGLIP, image_size=48)
    np.savez(tmp_path / "siglip.npz", **arrays_of(source, True))
    model = blank(**SIGLIP, image_size=(16, 40))
    assert load_checkpoint(model, tmp_path / "siglip.npz").resized == ("pos_embed",)
    assert torch.equal(model.pos_embed, resample_position(source.pos_embed, (2, 5), (6, 6), method="bilinear"))


def test_bfloat16(tmp_path: Path) -> None:
    source = small_vit(**SIGLIP).bfloat16()
    arrays = arrays_of(source.float(), True)
    opaque = {name: (array.view(np.uint32) >> 16).astype(np.uint16).view("V2") for name, array in arrays.items()}
    np.savez(tmp_path / "bf16.npz", **opaque)
    model = blank(**SIGLIP).float()
    load_checkpoint(model, tmp_path / "bf16.npz")
    assert equal(model, source)
    assert all(tensor.dtype == torch.bfloat16 for tensor in google_to_timm(opaque).values())


def test_file_that_does_not_fit(tmp_path: Path) -> None:
    arrays = arrays_of(small_vit(**SIGLIP), True, "params/img/")
    stack = "params/img/Transformer/encoderblock/"
    arrays[f"{stack}LayerNorm_0/scale"] = arrays[f"{stack}LayerNorm_0/scale"][:1]
    del arrays[f"{stack}MultiHeadDotProductAttention_0/key/bias"]
    arrays[f"{stack}LayerNorm_7/scale"] = np.zeros((2, 48))
    arrays["params/img/MAPHead_1/probe"] = np.zeros((1, 1, 48))
    # Already flattened: of the right shape for the model, but with the inputs in front.
    flattened = "params/img/MAPHead_0/MultiHeadDotProductAttention_0/out/kernel"
    arrays[flattened] = np.zeros((48, 48))
    np.savez(tmp_path / "bad.npz", **arrays)
    model = blank(**SIGLIP)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, tmp_path / "bad.npz")
    missing = [f"blocks.{i}.attn.qkv.bias" for i in (0, 1)]
    missing = ["attn_pool.proj.weight", *missing, "blocks.1.norm1.weight"]
    attention = f"{stack}MultiHeadDotProductAttention_0/"
    assert str(error.value).splitlines()[1:] == [f"  missing from the file: {name}" for name in missing] + [
        f"  unexpected in the file: {flattened} (it should have 3 axes, not the shape [48, 48])",
        "  unexpected in the file: params/img/MAPHead_1/probe",
        f"  unexpected in the file: {stack}LayerNorm_7/scale",
        f"  unexpected in the file: {attention}query/bias (blocks.1.attn.qkv.bias needs 3 such tensors of one shape)",
        f"  unexpected in the file: {attention}value/bias (blocks.1.attn.qkv.bias needs 3 such tensors of one shape)",
    ]
    assert equal(model, blank(**SIGLIP))


def test_file_with_other_heads(tmp_path: Path) -> None:
    np.savez(tmp_path / "heads.npz", **arrays_of(small_vit(**SIGLIP, num_heads=6), True, heads=6))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(blank(**SIGLIP), tmp_path / "heads.npz")
    assert str(error.value).splitlines()[1:] == ["  contradiction: attention has 6 heads in the file, 3 in the model"]


# --- the plain functions --------------------------------------------------------------------------


def same_arrays(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize("scan", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("variant", [SIGLIP, CLASS_TOKEN], ids=["MAP", "class token"])
def test_both_ways(variant: dict, scan: bool) -> None:
    model = small_vit(**variant)
    arrays = arrays_of(model, scan, "params/")
    state = google_to_timm(arrays)
    blank(**variant).load_state_dict(state, strict=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    assert same_arrays(timm_to_google(state, 3, "big_vision", scan, "params/"), arrays)


def test_both_ways_in_the_first_layout() -> None:
    model = small_vit(head="pretrain", representation_size=20)
    arrays = google_arrays(model)
    state = google_to_timm(arrays)
    assert equal(model, redrawn_with(state, model.config))
    assert same_arrays(timm_to_google(state, 3), arrays)
    assert same_arrays(timm_to_google(google_to_timm({"opt/target/" + n: a for n, a in arrays.items()}), 3), arrays)


def redrawn_with(state: dict[str, Tensor], config: ViTConfig) -> ViT:
    model = ViT(config).double()
    model.load_state_dict(state, strict=True)
    return model


def test_timm_to_google_keeps_dtypes() -> None:
    state = {name: tensor.bfloat16() for name, tensor in small_vit(**SIGLIP).state_dict().items()}
    arrays = timm_to_google(state, 3, "big_vision", scan=True)
    assert {array.dtype for array in arrays.values()} == {np.dtype("V2")}
    back = google_to_timm(arrays)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    half = timm_to_google({"norm.bias": torch.ones(4, dtype=torch.float16)}, 1)
    assert half["Transformer/encoder_norm/bias"].dtype == np.float16


def test_google_to_timm_names_what_has_no_place() -> None:
    arrays = arrays_of(small_vit(), scan=False)
    del arrays["Transformer/encoderblock_1/MultiHeadDotProductAttention_0/value/bias"]
    arrays["Transformer/encoderblock_0/LayerNorm_2/scale"] = np.zeros(48)
    arrays["Transformer/posembed_input/pos_embedding"] = arrays["pos_embedding"]
    arrays["gamma"] = np.zeros(48)
    arrays["head/kernel"] = np.zeros(48)
    with pytest.raises(ValueError) as error:
        google_to_timm(arrays)
    attention = "  Transformer/encoderblock_1/MultiHeadDotProductAttention_0/"
    why = "(blocks.1.attn.qkv.bias needs 3 such tensors of one shape)"
    assert str(error.value).splitlines() == [
        "google_to_timm: 6 of the tensors have no place in timm's layout:",
        "  Transformer/encoderblock_0/LayerNorm_2/scale (Transformer/encoderblock_0/LayerNorm_1/scale is in its place)",
        f"{attention}key/bias {why}",
        f"{attention}query/bias {why}",
        "  Transformer/posembed_input/pos_embedding (pos_embedding is in its place)",
        "  gamma",
        "  head/kernel (it should have 2 axes, not the shape [48])",
    ]
    with pytest.raises(TypeError, match="cls must be an array of numbers, got one of <U5"):
        google_to_timm({"cls": np.array("token")})
    with pytest.raises(ValueError, match=r"Transformer/encoderblock/LayerNorm_0/scale$"):
        google_to_timm({"Transformer/encoderblock/LayerNorm_0/scale": np.array(1.0)})


@pytest.mark.parametrize("given", [None, torch.nn.Identity(), ["cls"], {0: np.zeros(1)}], ids=str)
def test_what_is_no_tree_of_arrays_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="google_to_timm: arrays must map paths to arrays"):
        google_to_timm(given)


@pytest.mark.filterwarnings("error")
def test_arrays_of_another_byte_order_and_of_memory_that_must_not_be_written() -> None:
    state = small_vit(**SIGLIP).float().state_dict()
    arrays = timm_to_google(state, 3, "big_vision", scan=True)

    def same(found: dict[str, Tensor]) -> bool:
        return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)

    assert same(google_to_timm({name: array.astype(array.dtype.newbyteorder()) for name, array in arrays.items()}))
    for array in arrays.values():
        array.flags.writeable = False
    found = google_to_timm(arrays)
    assert same(found)
    for tensor in found.values():
        tensor.zero_()
    assert same(google_to_timm(arrays)), "the arrays are not what was written to"


def test_a_stack_does_not_take_the_place_of_a_block_on_its_own() -> None:
    name = "Transformer/encoderblock/LayerNorm_0/scale"
    arrays = arrays_of(small_vit(**CLASS_TOKEN).float(), scan=False)
    for given in ({name: np.zeros((2, 48), np.float32), **arrays}, {**arrays, name: np.zeros((2, 48), np.float32)}):
        with pytest.raises(ValueError, match="1 of the tensors have no place in timm's layout") as error:
            google_to_timm(given)
        assert name in str(error.value)


def test_timm_to_google_names_what_has_no_place() -> None:
    state = small_vit(num_register_tokens=1, layer_scale=0.1, depth=1, global_pool="map").state_dict()
    with pytest.raises(ValueError) as error:
        timm_to_google(state, 3)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == sorted(
        name for name in state if name == "reg_token" or ".ls" in name or name.startswith("attn_pool.")
    )
    state = small_vit(**SIGLIP, depth=1).state_dict()
    with pytest.raises(ValueError) as error:
        timm_to_google(state, 5, "big_vision")
    split = ("qkv.weight", "qkv.bias", "q.weight", "q.bias", "kv.weight", "kv.bias", "proj.weight")
    among = {name: f" (its shape {list(t.shape)} does not divide among 5 heads)" for name, t in state.items()}
    attention = sorted(name for name in state if name.endswith(split) and name != "patch_embed.proj.weight")
    assert str(error.value).splitlines()[1:] == [f"  {name}{among[name]}" for name in attention]
    odd = small_vit(**SIGLIP).state_dict()
    del odd["blocks.0.norm1.bias"]
    odd["blocks.1.mlp.fc1.bias"] = torch.ones(5)
    odd["head.weight"] = torch.ones(5)
    odd["blocks.0.attn.qkv.bias"] = torch.ones(12)  # divides by the heads, but query, key and value do not
    with pytest.raises(ValueError) as error:
        timm_to_google(odd, 3, "big_vision", scan=True)
    assert str(error.value).splitlines()[1:] == [
        "  blocks.*.attn.qkv.bias (to be stacked, all 2 blocks need it in one shape)",
        "  blocks.*.mlp.fc1.bias (to be stacked, all 2 blocks need it in one shape)",
        "  blocks.*.norm1.bias (to be stacked, all 2 blocks need it in one shape)",
        "  blocks.0.attn.qkv.bias (its shape [12] does not divide among 3 heads)",
        "  head.weight (its shape [5] does not divide among 3 heads)",
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_heads": 0}, "num_heads must be a positive int, got 0"),
        ({"num_heads": True}, "num_heads must be a positive int, got True"),
        ({"num_heads": 2.0}, "num_heads must be a positive int, got 2.0"),
        ({"num_heads": 3, "layout": "flax"}, "layout must be one of 'vision_transformer', 'big_vision', got 'flax'"),
        ({"num_heads": 3, "scan": True}, "scan must be False for layout 'vision_transformer'"),
    ],
)
def test_arguments_are_named(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"timm_to_google: {text}"):
        timm_to_google({}, **arguments)
