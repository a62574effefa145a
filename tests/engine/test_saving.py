"""What save_checkpoint() writes can be loaded, or it says why not, and nothing else is left behind."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from tests.engine.redraw import equal, images, small_vit
from vit_engine import ViT, load_model, save_checkpoint


@pytest.mark.parametrize("head", [nn.Linear(48, 11).double(), nn.Identity()], ids=["another size", "none"])
def test_a_replaced_head_comes_back(tmp_path: Path, head: nn.Module) -> None:
    model = small_vit()
    setattr(model, "head", head)  # noqa: B010 (of another class than the model's own)
    save_checkpoint(model, tmp_path / "m.safetensors")
    back = load_model(tmp_path / "m.safetensors")
    assert equal(back, model)
    pixels = images(2, 3, 32, 32)
    assert torch.equal(back(pixels), model(pixels))
    assert back.config.num_classes == (11 if isinstance(head, nn.Linear) else 0)
    # The model itself is left alone.
    assert model.config.num_classes == 7


def _without_bias(model: ViT) -> None:
    model.head = nn.Linear(48, 7, bias=False)


def _another_part(model: ViT) -> None:
    model.teacher = nn.Linear(2, 3)


def _fewer_blocks(model: ViT) -> None:
    model.blocks = model.blocks[:1]


def _other_positions(model: ViT) -> None:
    model.pos_embed = nn.Parameter(torch.zeros(1, 26, 48))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_without_bias, r"; head\.bias is missing\. Set model\.config"),
        (_another_part, r"; teacher\.weight is not among them; teacher\.bias is not among them\."),
        (_fewer_blocks, r"; blocks\.1\.norm1\.weight is missing; .* and \d more\."),
        (_other_positions, r"; pos_embed is \[1, 26, 48\], expected \[1, 17, 48\]\."),
    ],
)
def test_a_model_that_its_config_does_not_describe_is_refused(
    tmp_path: Path, change: Callable[[ViT], None], text: str
) -> None:
    model = copy.deepcopy(small_vit())
    change(model)
    with pytest.raises(ValueError, match=r"model must have the tensors of ViT\(model\.config\).*" + text):
        save_checkpoint(model, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path must be in a folder that is there, got '.*none/m\.safetensors'"):
        save_checkpoint(small_vit(), tmp_path / "none" / "m.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"path must be a file, got the folder '.*folder\.safetensors'"):
        save_checkpoint(small_vit(), tmp_path / "folder.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


def test_what_the_disk_refuses_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(tensors, path, metadata):
        raise SafetensorError("I/O error: Permission denied")

    monkeypatch.setattr("vit_engine.saving.save_file", denied)
    with pytest.raises(OSError, match=r"m\.safetensors cannot be written: I/O error: Permission denied"):
        save_checkpoint(small_vit(), tmp_path / "m.safetensors")


@pytest.mark.parametrize("metadata", ["labels", ["labels"], 3], ids=str)
def test_metadata_that_maps_nothing_is_named(tmp_path: Path, metadata: object) -> None:
    text = f"metadata must map str to str, got {type(metadata).__name__}"
    with pytest.raises(TypeError, match=text):
        save_checkpoint(small_vit(), tmp_path / "m.safetensors", metadata)  # type: ignore[arg-type]


def test_parameters_that_share_memory_are_written_one_by_one(tmp_path: Path) -> None:
    model = small_vit()
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight  # type: ignore[union-attr]
    model.blocks[1].mlp.fc1.bias.data = model.blocks[0].mlp.fc1.bias.data[:]  # type: ignore[union-attr]
    save_checkpoint(model, tmp_path / "tied.safetensors")
    assert equal(load_model(tmp_path / "tied.safetensors"), model)
