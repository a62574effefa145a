"""Reads the checkpoints of google-research/vision_transformer: flax parameter trees, flattened into an .npz archive."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["read_google_npz"]

# Training checkpoints of the same code hold the parameters beside the optimizer's state, below this name.
_TARGET = "opt/target/"

_TENSORS = {
    "cls": "cls_token",
    "embedding/kernel": "patch_embed.proj.weight",
    "embedding/bias": "patch_embed.proj.bias",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "Transformer/encoder_norm/scale": "norm.weight",
    "Transformer/encoder_norm/bias": "norm.bias",
    "pre_logits/kernel": "pre_logits.fc.weight",
    "pre_logits/bias": "pre_logits.fc.bias",
    "head/kernel": "head.weight",
    "head/bias": "head.bias",
}
_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(.+)")
_BLOCK_TENSORS = {
    "LayerNorm_0/scale": "norm1.weight",
    "LayerNorm_0/bias": "norm1.bias",
    "MultiHeadDotProductAttention_1/out/kernel": "attn.proj.weight",
    "MultiHeadDotProductAttention_1/out/bias": "attn.proj.bias",
    "LayerNorm_2/scale": "norm2.weight",
    "LayerNorm_2/bias": "norm2.bias",
    "MlpBlock_3/Dense_0/kernel": "mlp.fc1.weight",
    "MlpBlock_3/Dense_0/bias": "mlp.fc1.bias",
    "MlpBlock_3/Dense_1/kernel": "mlp.fc2.weight",
    "MlpBlock_3/Dense_1/bias": "mlp.fc2.bias",
}
_QKV = re.compile(r"(Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_1/)(query|key|value)/(kernel|bias)")
_PARTS = ("query", "key", "value")


def read_google_npz(path: str | Path, num_heads: int) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of the archive under the names and in the layouts of ViT's state_dict, and what contradicts num_heads.

    Kernels are stored input first, convolutions as [Ph, Pw, C, D], query, key and value apart and head by head
    ([D, heads, head_dim]). An array that has no place in the model keeps its own name, and one whose rank does not fit
    is left as it is: the caller compares names and shapes. Nothing is unpickled.

    Raises ValueError if the file is no such archive, or holds Python objects.
    """
    arrays = _read_arrays(path)
    prefix = _TARGET if any(name.startswith(_TARGET) for name in arrays) else ""
    if prefix:
        arrays = {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}

    tensors: dict[str, Tensor] = {}
    heads: set[int] = set()
    for name, array in arrays.items():
        block = _BLOCK.fullmatch(name)
        if name in _TENSORS:
            tensors[_TENSORS[name]] = _output_first(name, array)
        elif block and block[2] in _BLOCK_TENSORS:
            tensors[f"blocks.{block[1]}.{_BLOCK_TENSORS[block[2]]}"] = _output_first(name, array)
        elif qkv := _QKV.fullmatch(name):
            folder, index, _, leaf = qkv.groups()
            parts = [arrays.get(f"{folder}{part}/{leaf}") for part in _PARTS]
            whole = _packed(parts, leaf)
            if whole is None:
                tensors[name] = array
            else:
                tensors[f"blocks.{index}.attn.qkv.{'weight' if leaf == 'kernel' else 'bias'}"] = whole
            if array.dim() >= 2 and array.shape[-2] != num_heads:
                heads.add(array.shape[-2])
        else:
            tensors[name] = array
    return tensors, [f"attention has {count} heads in the file, {num_heads} in the model" for count in sorted(heads)]


def _read_arrays(path: str | Path) -> dict[str, Tensor]:
    try:
        archive: Any = np.load(path, allow_pickle=False)
        if not hasattr(archive, "files"):
            raise ValueError("it is a single array")
        with archive:
            return {name: _tensor(archive[name]) for name in archive.files}
    except OSError:
        raise
    # numpy raises whatever its zip, zlib and header parsers come upon.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an .npz archive of plain arrays: {error}") from error


def _tensor(array: np.ndarray) -> Tensor:
    # numpy knows no bfloat16: flax writes it as two opaque bytes.
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


def _output_first(name: str, array: Tensor) -> Tensor:
    if not name.endswith("/kernel"):
        return array
    if array.dim() == 2:
        return array.t()
    if array.dim() == 3:  # attention output: [heads, head_dim, D]
        return array.flatten(0, 1).t()
    if array.dim() == 4:
        return array.permute(3, 2, 0, 1)
    return array


def _packed(parts: list[Tensor | None], leaf: str) -> Tensor | None:
    """Query, key and value as rows of one matrix (kernel) or one vector (bias); None unless all three are alike."""
    given = [part for part in parts if part is not None and part.dim() == (3 if leaf == "kernel" else 2)]
    if len(given) < 3 or len({part.shape for part in given}) > 1:
        return None
    if leaf == "kernel":
        return torch.cat([part.flatten(1).t() for part in given])
    return torch.cat([part.flatten() for part in given])
