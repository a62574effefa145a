"""A model's weights and its description to one file, which load_model() turns back into the model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import ViTConfig
from .vit import ViT

__all__ = ["CONFIG_KEY", "save_checkpoint"]

CONFIG_KEY = "vit_engine.config"
_SHOWN = 6


def save_checkpoint(model: ViT, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Writes the model's weights and its ViTConfig to one *.safetensors file, which load_model() turns back into the
    model.

    model: as its config describes it, but for the head: where somebody has put another nn.Linear, or nn.Identity, in
        its place, the file says num_classes as it is now.
    path: in a folder that is there. An existing file is replaced once the new one is complete.
    metadata: further strings to keep in the file's header, such as class names as JSON; read_metadata() returns them.

    Raises ValueError or TypeError naming the argument, ValueError for a model with other tensors than ViT(config) has
    (all named), and OSError (FileNotFoundError without the folder) if the file cannot be written.
    """
    if not isinstance(model, ViT):
        raise TypeError(f"save_checkpoint: model must be a vit_engine.ViT, got {type(model).__name__}")
    state = model.state_dict()
    if meta := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"save_checkpoint: model has no values to save: {', '.join(meta)} on the meta device")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_checkpoint: path must end in .safetensors, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_checkpoint: path must be in a folder that is there, got {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"save_checkpoint: path must be a file, got the folder {str(path)!r}")
    header = _header(metadata)
    header[CONFIG_KEY] = json.dumps(_config_of(model, state).to_dict())
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        # A file has no shared memory: of parameters that are one and the same it gets copies.
        tensors[name] = plain.clone() if storage in written else plain
        written.add(storage)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=header)
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"save_checkpoint: {path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _header(metadata: Mapping[str, str] | None) -> dict[str, str]:
    header = {"format": "pt"}
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"save_checkpoint: metadata must map str to str, got {type(metadata).__name__}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"save_checkpoint: metadata must map str to str, got {key!r}: {type(value).__name__}")
        if key in (CONFIG_KEY, "format"):
            raise ValueError(f"save_checkpoint: metadata key {key!r} is reserved")
        header[key] = value
    return header


def _config_of(model: ViT, state: Mapping[str, Tensor]) -> ViTConfig:
    """The config that builds a model with these tensors. Raises ValueError if there is none that differs from the
    model's own by the number of classes at most: the file could not be loaded."""
    config, head = model.config, model.head
    classes = head.weight.shape[0] if isinstance(head, nn.Linear) else 0 if isinstance(head, nn.Identity) else None
    if classes is not None and classes != config.num_classes:
        config = dataclasses.replace(config, num_classes=classes)
    with torch.device("meta"):
        planned = ViT(config).state_dict()
    if found := list(_differences(state, planned)):
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"save_checkpoint: model must have the tensors of ViT(model.config), or load_model() could not build it; "
            f"{'; '.join(found[:_SHOWN])}{more}. Set model.config to what the model is, or write model.state_dict() "
            "with safetensors.torch.save_file, which load_checkpoint() reads"
        )
    return config


def _differences(state: Mapping[str, Tensor], planned: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in planned if name not in state)
    yield from (f"{name} is not among them" for name in state if name not in planned)
    for name, tensor in state.items():
        if name in planned and tensor.shape != planned[name].shape:
            yield f"{name} is {list(tensor.shape)}, expected {list(planned[name].shape)}"
