"""Reads Google's ViT checkpoints: flax parameter trees, flattened into an .npz archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .layouts.google import from_google

__all__ = ["GoogleFile", "read_google_npz"]


class GoogleFile(NamedTuple):
    """tensors: under timm's names; left: why other arrays have no place in a ViT, by their paths in the file;
    conflicts: what contradicts the number of heads asked for."""

    tensors: dict[str, Tensor]
    left: dict[str, str]
    conflicts: list[str]


def read_google_npz(path: str | Path, num_heads: int) -> GoogleFile:
    """What an archive of google-research/vision_transformer or big_vision holds, in the layout of ViT's state_dict.

    vit_engine.google_to_timm has the table of names and shapes. Nothing is unpickled. Raises ValueError if the file is
    no such archive, or holds Python objects.
    """
    try:
        # Opened here, for numpy leaves a file open in which it finds no archive.
        with open(path, "rb") as file:
            archive: Any = np.load(file, allow_pickle=False)
            if not hasattr(archive, "files"):
                raise ValueError("it is a single array")
            with archive:
                tensors, left, heads = from_google({name: archive[name] for name in archive.files})
    except OSError:
        raise
    # numpy raises whatever its zip, zlib and header parsers come upon.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an .npz archive of plain arrays: {error}") from error
    wrong = sorted(heads - {num_heads})
    return GoogleFile(
        tensors, left, [f"attention has {count} heads in the file, {num_heads} in the model" for count in wrong]
    )
