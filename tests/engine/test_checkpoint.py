import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.redraw import SMALL, blank, equal, images, relative, small_vit, timm_model
from vit_engine import ViT, ViTConfig, convert, load_checkpoint, load_model, save_checkpoint
from vit_engine.checkpoint import CheckpointError, read_metadata
from vit_engine.position import resample_position

# --- safetensors ----------------------------------------------------------------------------------

WHOLE = [
    {},
    {
        "head": "pretrain",
        "representation_size": 20,
        "layer_scale": 1e-5,
        "num_register_tokens": 2,
        "image_size": (16, 40),
    },
    {"class_token": False, "global_pool": "avg", "activation": "swiglu", "mean": (0.1, 0.2, 0.3), "std": 0.5},
]


@pytest.mark.parametrize("variant", WHOLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_comes_back(tmp_path: Path, variant: dict, dtype: torch.dtype) -> None:
    model = small_vit(**variant).to(dtype)
    save_checkpoint(model, tmp_path / "model.safetensors", {"labels": json.dumps(["zero", "one"])})
    back = load_model(str(tmp_path / "model.safetensors"))
    assert (back.config, back.training, back.backend) == (model.config, False, "torch")
    assert back.pos_embed.dtype == dtype
    assert equal(back, model)
    pixels = torch.arange(2 * 3 * 32 * 64).reshape(2, 3, 32, 64).to(torch.uint8)
    assert torch.equal(back(pixels), model(pixels))
    assert read_metadata(tmp_path / "model.safetensors") == {"labels": '["zero", "one"]'}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_load_model_options(tmp_path: Path) -> None:
    save_checkpoint(small_vit(), tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors", backend="interpret", dtype=torch.float16)
    assert (model.backend, model.pos_embed.dtype, model.head.weight.dtype) == (
        "interpret",
        torch.float16,
        torch.float16,
    )


def test_timms_file_loads(tmp_path: Path) -> None:
    theirs = timm_model(ViTConfig(**SMALL)).double()
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours = blank()
    assert load_checkpoint(ours, tmp_path / "timm.safetensors") == ((), (), ())
    x = images(2, 3, 32, 32)
    assert relative(ours(x), theirs(x)) < 1e-10


def test_one_error_names_everything_and_nothing_is_loaded(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in small_vit().state_dict().items()}
    del tensors["cls_token"], tensors["blocks.1.mlp.fc2.bias"]
    tensors["norm_pre.weight"] = torch.ones(48)
    tensors["blocks.2.norm1.weight"] = torch.ones(48)
    tensors["head.weight"] = torch.zeros(1000, 48)
    tensors["pos_embed"] = torch.zeros(1, 16, 48)
    tensors["norm.bias"] = torch.zeros(48, dtype=torch.int64)
    save_file(tensors, tmp_path / "bad.safetensors")
    model = blank()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, tmp_path / "bad.safetensors")
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'bad.safetensors'} does not fit the model, which is left unchanged:",
        "  missing from the file: blocks.1.mlp.fc2.bias",
        "  missing from the file: cls_token",
        "  mis-shaped pos_embed: [1, 16, 48] in the file, [1, 17, 48] in the model",
        "  mis-shaped head.weight: [1000, 48] in the file, [7, 48] in the model",
        "  not floating point: norm.bias (torch.int64)",
        "  unexpected in the file: blocks.2.norm1.weight",
        "  unexpected in the file: norm_pre.weight",
    ]
    assert equal(model, blank())
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, tmp_path / "bad.safetensors", strict=False)
    assert "missing" not in str(error.value)
    assert "unexpected" not in str(error.value)
    assert str(error.value).count("mis-shaped") == 2
    assert equal(model, blank())


@pytest.mark.parametrize("library", ["torchvision", "transformers"])
def test_names_of_another_library_are_told_and_how_to_load_them(tmp_path: Path, library: str) -> None:
    theirs = convert(small_vit().state_dict(), "timm", library)
    save_file(theirs, tmp_path / "theirs.safetensors")
    said = rf"names are those of {library}: .*vit_engine\.convert\(tensors, '{library}', 'timm'\):\n  missing"
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(blank(), tmp_path / "theirs.safetensors")
    model = blank()
    save_file(convert(theirs, library, "timm"), tmp_path / "timms.safetensors")
    load_checkpoint(model, tmp_path / "timms.safetensors")
    assert equal(model, small_vit())


def test_not_strict_reports_what_it_left(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in small_vit().state_dict().items()}
    del tensors["cls_token"]
    tensors["extra"] = torch.ones(1)
    save_file(tensors, tmp_path / "part.safetensors")
    model = blank()
    report = load_checkpoint(model, tmp_path / "part.safetensors", strict=False)
    assert (report.missing, report.unexpected, report.resized) == (("cls_token",), ("extra",), ())
    state, kept, new = model.state_dict(), blank().state_dict(), small_vit().state_dict()
    assert all(torch.equal(state[name], (kept if name == "cls_token" else new)[name]) for name in state)


def test_skip_keeps_the_head(tmp_path: Path) -> None:
    save_checkpoint(small_vit(num_classes=1000, head="pretrain"), tmp_path / "m.safetensors")
    model = blank()
    report = load_checkpoint(model, tmp_path / "m.safetensors", skip=("head.", "pre_logits."))
    assert report == ((), (), ())
    assert torch.equal(model.head.weight, blank().head.weight)  # type: ignore[arg-type]
    assert torch.equal(model.cls_token, small_vit().cls_token)  # type: ignore[arg-type]
    for skip in (None, 3, (3,)):
        with pytest.raises(TypeError, match=r"skip must be prefixes of tensor names, got (None|3|\(3,\))$"):
            load_checkpoint(model, tmp_path / "m.safetensors", skip=skip)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_heads": 6}, "num_heads is 3 in the file, 6 in the model"),
        ({"activation": "quick_gelu"}, "activation is 'gelu' in the file, 'quick_gelu' in the model"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-06 in the file, 1e-05 in the model"),
    ],
)
def test_contradictions_that_no_shape_shows(tmp_path: Path, change: dict, text: str) -> None:
    save_checkpoint(small_vit(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(blank(**change), tmp_path / "m.safetensors")
    assert f"contradiction: {text}" in str(error.value)
    load_checkpoint(blank(**change), tmp_path / "m.safetensors", strict=False)


def test_position_embeddings_are_resized(tmp_path: Path) -> None:
    source = small_vit(image_size=48)
    save_checkpoint(source, tmp_path / "described.safetensors")
    save_file(source.state_dict(), tmp_path / "plain.safetensors")
    expected = resample_position(source.pos_embed, (2, 5), (6, 6), num_prefix=1)
    for name in ("described", "plain"):
        model = blank(image_size=(16, 40))
        assert load_checkpoint(model, tmp_path / f"{name}.safetensors").resized == ("pos_embed",)
        assert torch.equal(model.pos_embed, expected)


def test_oblong_grid_is_read_from_the_description(tmp_path: Path) -> None:
    source = small_vit(image_size=(16, 64))  # 2 x 8 patches: as many as 4 x 4
    save_checkpoint(source, tmp_path / "described.safetensors")
    model = blank()
    assert load_checkpoint(model, tmp_path / "described.safetensors").resized == ("pos_embed",)
    assert torch.equal(model.pos_embed, resample_position(source.pos_embed, (4, 4), (2, 8), num_prefix=1))
    save_file(small_vit(image_size=(16, 40)).state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"mis-shaped pos_embed: \[1, 11, 48\] in the file, \[1, 17, 48\]"):
        load_checkpoint(model, tmp_path / "plain.safetensors")
    # As many patches as the model has are taken for its own.
    save_file(source.state_dict(), tmp_path / "plain.safetensors")
    assert load_checkpoint(model, tmp_path / "plain.safetensors").resized == ()
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_model_on_meta_is_refused(tmp_path: Path) -> None:
    save_checkpoint(small_vit(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="meta device"):
        load_checkpoint(blank().to("meta"), tmp_path / "m.safetensors")
    with pytest.raises(TypeError, match=r"model must be a vit_engine\.ViT, got Linear"):
        load_checkpoint(torch.nn.Linear(1, 1), tmp_path / "m.safetensors")  # type: ignore[arg-type]


def test_save_refuses(tmp_path: Path) -> None:
    model = small_vit()
    with pytest.raises(TypeError, match=r"model must be a vit_engine\.ViT, got OrderedDict"):
        save_checkpoint(small_vit().state_dict(), tmp_path / "m.safetensors")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no values to save: cls_token, .* on the meta device"):
        save_checkpoint(small_vit().to("meta"), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got 'm\.pth'"):
        save_checkpoint(model, tmp_path / "m.pth")
    with pytest.raises(TypeError, match="metadata must map str to str, got 'epoch': int"):
        save_checkpoint(model, tmp_path / "m.safetensors", {"epoch": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"metadata key 'vit_engine\.config' is reserved"):
        save_checkpoint(model, tmp_path / "m.safetensors", {"vit_engine.config": "{}"})
    assert list(tmp_path.iterdir()) == []


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(small_vit(), tmp_path / "m.safetensors")

    def disk_full(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr("vit_engine.saving.save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(blank(), tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    assert equal(load_model(tmp_path / "m.safetensors"), small_vit())


def test_unreadable_files(tmp_path: Path) -> None:
    save_checkpoint(small_vit(), tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    model = blank()
    for damaged in (content[:-7], b"", b"\x80\x04junk"):
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged\.safetensors cannot be read as safetensors"):
            load_checkpoint(model, tmp_path / "damaged.safetensors")
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged\.npz cannot be read as an \.npz archive"):
            load_checkpoint(model, tmp_path / "damaged.npz")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_checkpoint(model, tmp_path / "none.safetensors")
    # Of a file that is not there, its kind is not what is wrong.
    for suffix in ("npz", "pth", "h5"):
        with pytest.raises(FileNotFoundError, match=rf"no such checkpoint: .*none\.{suffix}"):
            load_checkpoint(model, tmp_path / f"none.{suffix}")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: .*folder\.npz is a folder"):
        load_checkpoint(model, tmp_path / "folder.npz")
    (tmp_path / "model.h5").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"unknown format '\.h5'; a checkpoint is \*\.safetensors or \*\.npz"):
        load_checkpoint(model, tmp_path / "model.h5")
    assert equal(model, blank())


def test_file_without_usable_description(tmp_path: Path) -> None:
    tensors = load_file_of(small_vit(), tmp_path)
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="holds no model description"):
        load_model(tmp_path / "plain.safetensors")
    for text in ("not json", "[1]", '{"colour": 1}', '{"depth": 0}', "[" * 200_000):
        save_file(tensors, tmp_path / "odd.safetensors", metadata={"vit_engine.config": text})
        with pytest.raises(CheckpointError, match=r"its model description .* is not usable"):
            load_model(tmp_path / "odd.safetensors")


HOSTILE: dict[str, tuple[dict[str, object], str]] = {
    "depth": ({"depth": 200_000}, "says depth 200000, its tensors are of 2 blocks"),
    "width": ({"embed_dim": 3_000_000}, r"mis-shaped pos_embed: \[1, 17, 48\] in the file, \[1, 17, 3000000\]"),
    "image": (
        {"image_size": 8 * 10**7},
        r"pos_embed: \[1, 17, 48\] in the file, \[1, 100000000000001, 48\]",
    ),
    "image beyond 64 bits": ({"image_size": 8 * 10**12}, "no model can be built as its description .* says: "),
    "classes beyond 64 bits": ({"num_classes": 10**30}, "no model can be built as its description .* says: "),
    "classes": ({"num_classes": 10**15}, r"mis-shaped head\.weight: \[7, 48\] in the file"),
    "channels": ({"in_channels": 10**12}, r"in_channels is 1000000000000, and patch_embed\.proj\.weight has 3"),
    "a tensor that the file lacks": ({"num_register_tokens": 10**12}, "missing from the file: reg_token"),
    "ratio": ({"mlp_ratio": 1e308}, "mlp_ratio must be such that embed_dim 48 times it is finite, got 1e\\+308"),
    "hidden": ({"hidden_dim": 10**400}, "no model can be built as its description .* says: "),
    "eps": ({"norm_eps": 10**400}, "norm_eps must be a positive number in float32, got 1000"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_description_of_another_model_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    change, text = HOSTILE[kind]
    values = {**small_vit().config.to_dict(), "mean": 0.5, "std": 0.5, **change}
    tensors = load_file_of(small_vit(), tmp_path)
    save_file(tensors, tmp_path / "odd.safetensors", metadata={"vit_engine.config": json.dumps(values)})

    def allocate(*_: object, **__: object) -> None:
        raise AssertionError("memory was asked for")

    monkeypatch.setattr(ViT, "to_empty", allocate)
    with pytest.raises(CheckpointError, match=text):
        load_model(tmp_path / "odd.safetensors")


def load_file_of(model: ViT, folder: Path) -> dict[str, Tensor]:
    save_checkpoint(model, folder / "source.safetensors")
    return load_file(folder / "source.safetensors")


# --- pickles --------------------------------------------------------------------------------------


class Exploit:
    """Unpickling it makes a file: what a hostile checkpoint could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_pickles_are_refused_unless_asked_for(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save({"state_dict": small_vit().state_dict()}, path)
    model = blank()
    with pytest.raises(CheckpointError, match=f"is refused: {suffix} files are pickles.*allow_pickle=True"):
        load_checkpoint(model, path)
    assert equal(model, blank())
    load_checkpoint(model, path, allow_pickle=True)
    assert equal(model, small_vit())


def test_pickles_never_run_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    payload = {"state_dict": small_vit().state_dict(), "extra": Exploit(mark)}
    torch.save(payload, tmp_path / "zip.pth")
    torch.save(payload, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Exploit(mark), protocol=2))
    (tmp_path / "empty.pt").touch()
    for name, why in (
        ("zip.pth", "Unsupported global"),
        ("legacy.pth", "Unsupported global"),
        ("plain.pkl", "[A-Z]"),
        ("empty.pt", "EOFError, as of a file that ends too early"),
    ):
        said = rf"cannot be read with torch\.load\(weights_only=True\): {why}.*$"
        with pytest.raises(CheckpointError, match=said) as error:
            load_checkpoint(blank(), tmp_path / name, allow_pickle=True)
        assert "set to `False`" not in str(error.value) and "\n" not in str(error.value)
    np.savez(tmp_path / "objects.npz", cls=np.array([Exploit(mark)], dtype=object))
    with pytest.raises(CheckpointError, match=r"objects\.npz cannot be read as an \.npz archive of plain arrays"):
        load_checkpoint(blank(), tmp_path / "objects.npz", allow_pickle=True)
    assert not mark.exists()
    # The payload is live: an unsafe load would have run it.
    torch.load(tmp_path / "zip.pth", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1, 2], "list"),
        ({0: torch.ones(1)}, "keys 0"),
        ({"epoch": 3, "model_ema": {}}, "keys 'epoch', 'model_ema'"),
        ({"model": {1: torch.ones(1)}}, "keys 1"),
    ],
)
def test_pickle_of_something_else(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=f"holds no mapping of names to tensors, .*: got {found}$"):
        load_checkpoint(blank(), tmp_path / "odd.pth", allow_pickle=True)


UNUSABLE = {
    "meta": (lambda t: t.to("meta"), "on the meta device: it has no values"),
    "sparse": (lambda t: t.to_sparse(), "sparse or nested, expected dense"),
    "uninitialised": (lambda t: torch.nn.UninitializedParameter(), "a UninitializedParameter, expected a plain tensor"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("name", ["head.weight", "pos_embed"])
def test_tensors_that_cannot_be_copied_leave_the_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    change, reason = UNUSABLE[kind]
    tensors = small_vit().state_dict()
    (tmp_path / "m.pth").touch()
    monkeypatch.setattr(torch, "load", lambda *_, **__: {**tensors, name: change(tensors[name])})
    model = blank()
    for strict in (True, False):
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(model, tmp_path / "m.pth", allow_pickle=True, strict=strict)
        assert str(error.value).splitlines()[1:] == [f"  not usable: {name} ({reason})"]
        assert equal(model, blank())
    # What is to be left alone does not matter.
    load_checkpoint(model, tmp_path / "m.pth", allow_pickle=True, skip=(name,))
    tensors["mask_token"] = torch.zeros(1, 48)  # DINOv2's names
    with pytest.raises(CheckpointError, match="holds tensors that are not usable"):
        load_checkpoint(model, tmp_path / "m.pth", allow_pickle=True)
