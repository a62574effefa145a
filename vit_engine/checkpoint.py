"""Weights from and to files, without ever running code that a file brings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import ViTConfig
from .google_npz import read_google_npz
from .layouts.dinov2 import from_dinov2, is_dinov2
from .position import resample_position, square_grid
from .saving import CONFIG_KEY, save_checkpoint
from .vit import ViT

__all__ = ["CheckpointError", "LoadReport", "load_checkpoint", "load_model", "read_metadata", "save_checkpoint"]

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")

# Fields that change what a model computes without changing the shape of any tensor.
_SHAPELESS = ("num_heads", "activation", "norm_eps")
_STEM = "patch_embed.proj.weight"
# What only the names of these have in them.
_OTHERS = {"embeddings.patch_embeddings.projection.": "transformers", "conv_proj.": "torchvision"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is refused, or does not fit the model."""


class LoadReport(NamedTuple):
    """What load_checkpoint did beyond plain copying. Names are those of the model's state_dict, but of tensors for
    which it has none.

    missing: tensors of the model that the file lacks, left as they were (only with strict=False).
    unexpected: tensors of the file that the model lacks, left out (only with strict=False).
    resized: tensors that were interpolated to the model's grid of patches.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: tuple[str, ...]


class _Source(NamedTuple):
    """A file's tensors under timm's names. left: its other tensors, by their names in it, and why they have no place;
    conflicts: what contradicts the model; config: the file's description of its model."""

    tensors: dict[str, Tensor]
    left: dict[str, str]
    conflicts: list[str]
    config: ViTConfig | None
    interpolation: str


def load_checkpoint(
    model: ViT,
    path: str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    strict: bool = True,
    skip: Sequence[str] = (),
) -> LoadReport:
    """Copies weights from a file into the model, in the model's dtype and on its device.

    path: *.safetensors with timm's names, or *.npz in a layout of google-research/vision_transformer or big_vision
        (SigLIP; blocks apart or stacked). Position embeddings for another grid of patches are interpolated: bicubic (as
        timm) from PyTorch's files, bilinear (as Google's code) from npz. The old grid is read from the file's metadata
        (save_checkpoint writes it). Without, it is taken as the model's own where that has as many patches, and as
        square where it has not. Files with the names of other libraries go through vit_engine.convert first.
    allow_pickle: also read PyTorch pickles (.pth, .pt, .bin, .ckpt, ...), with torch.load(weights_only=True) and
        nothing laxer; weights may lie below a "state_dict" or "model" key.
    The names of facebookresearch/dinov2 are recognised by their mask_token or register_tokens and read as
        vit_engine.dinov2_to_timm says; mask_token is not used.
    strict: with False, tensors missing from the file keep their values, those the model lacks are left out, and a
        description in the file that contradicts the model (head count, activation, norm_eps) is overlooked. A tensor of
        the wrong shape is an error either way.
    skip: prefixes of tensor names to leave alone in model and file, such as ("head.",) to fine-tune on other classes.

    Raises CheckpointError (a ValueError) that names every missing, unexpected, mis-shaped and contradicting tensor at
    once, or says why the file is refused; the model is then unchanged. FileNotFoundError if there is no such file,
    TypeError for a model that is no ViT and a skip that is no prefixes.
    """
    if not isinstance(model, ViT):
        raise TypeError(f"load_checkpoint: model must be a vit_engine.ViT, got {type(model).__name__}")
    prefixes = (skip,) if isinstance(skip, str) else tuple(skip) if isinstance(skip, Iterable) else (skip,)
    if not all(isinstance(prefix, str) for prefix in prefixes):
        raise TypeError(f"load_checkpoint: skip must be prefixes of tensor names, got {skip!r}")
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}
    if any(tensor.is_meta for tensor in wanted.values()):
        raise CheckpointError("load_checkpoint: the model is on the meta device; call model.to_empty(device=...) first")

    source = _read(Path(path), model.config, allow_pickle)
    given, report = _fitting(path, source, model.config, wanted, strict, prefixes)
    model.load_state_dict(given, strict=False)
    return report


def _fitting(
    path: str | os.PathLike[str], source: _Source, config: ViTConfig, wanted: Mapping[str, Tensor], strict: bool = True,
    prefixes: tuple[str, ...] = (),
) -> tuple[dict[str, Tensor], LoadReport]:  # fmt: skip
    """The tensors of a file that a model of this config takes, which wants these, if need be on the meta device.

    Everything that could stop the copying half way is asked for here. Raises CheckpointError that names all of it.
    """
    given = {name: tensor for name, tensor in source.tensors.items() if not name.startswith(prefixes)}
    problems = [f"not usable: {name} ({why})" for name in wanted if name in given and (why := _unusable(given[name]))]
    usable = {name: tensor for name, tensor in given.items() if _unusable(tensor) is None}
    resized: list[str] = []
    if "pos_embed" in wanted and "pos_embed" in usable:
        position = _fit_position(usable["pos_embed"], config, source)
        if position is not usable["pos_embed"]:
            usable["pos_embed"] = position
            resized.append("pos_embed")

    left = {name: why for name, why in source.left.items() if not name.startswith(prefixes)}
    missing = sorted(set(wanted) - set(given))
    unexpected = sorted((set(given) - set(wanted)) | set(left))
    shared = [name for name in wanted if name in usable]
    problems += [
        f"mis-shaped {name}: {list(usable[name].shape)} in the file, {list(wanted[name].shape)} in the model"
        for name in shared
        if usable[name].shape != wanted[name].shape
    ]
    problems += [
        f"not floating point: {name} ({usable[name].dtype})" for name in shared if not usable[name].is_floating_point()
    ]
    if strict:
        problems = [f"missing from the file: {name}" for name in missing] + problems
        reasons = {name: f" ({why})" for name, why in left.items() if why}
        problems += [f"unexpected in the file: {name}{reasons.get(name, '')}" for name in unexpected]
        problems += [f"contradiction: {text}" for text in source.conflicts]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{path} does not fit the model, which is left unchanged{_whose(given)}:\n{lines}")
    return {name: usable[name] for name in shared}, LoadReport(tuple(missing), tuple(unexpected), tuple(resized))


def _whose(names: Iterable[str]) -> str:
    """Of which library's layout these names are and what to do about it; nothing if they are of none that is known."""
    found = next((theirs for name in names for part, theirs in _OTHERS.items() if part in name), None)
    if found is None:
        return ""
    return (
        f"; its names are those of {found}: load what safetensors.torch.save_file writes of "
        f"vit_engine.convert(tensors, {found!r}, 'timm')"
    )


def _unusable(tensor: Tensor) -> str | None:
    """Why values cannot be copied from this tensor, None if they can."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}, expected a plain tensor"
    if tensor.is_meta:
        return "on the meta device: it has no values"
    return None if tensor.layout is torch.strided and not tensor.is_nested else "sparse or nested, expected dense"


def load_model(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> ViT:
    """The model that save_checkpoint() wrote, in eval mode.

    backend: as ViT takes it. device: where the model goes. dtype: of the parameters; None keeps the file's.

    Raises CheckpointError if the file cannot be read, does not describe its model (build ViT(config) and call
    load_checkpoint() for such files), or describes another one than its tensors are of; FileNotFoundError if there is
    no such file, TypeError for a dtype that is none, ValueError for an unknown backend.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"load_model: dtype must be a floating point torch.dtype or None, got {dtype!r}")
    path = Path(path)
    if path.is_file() and path.suffix.lower() != ".safetensors":
        raise CheckpointError(
            f"{path} does not describe its model, as *.safetensors of save_checkpoint() do: build ViT(config) and "
            "use load_checkpoint(model, path)"
        )
    _, config = _description(path)
    if config is None:
        raise CheckpointError(
            f"{path} holds no model description ({CONFIG_KEY} in its metadata): build ViT(ViTConfig...) and use "
            "load_checkpoint(model, path)"
        )
    source = _read(path, config, allow_pickle=False)
    blocks = len({name.split(".")[1] for name in source.tensors if name.startswith("blocks.")})
    if config.depth > blocks:
        raise CheckpointError(
            f"{path}: its model description ({CONFIG_KEY}) says depth {config.depth}, its tensors are of {blocks} "
            "blocks"
        )
    # Built without memory: nothing is initialised only to be overwritten, and none is asked for that the file's own
    # tensors do not fill, whatever its description says.
    try:
        with torch.device("meta"):
            model = ViT(config, backend=backend)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: no model can be built as its description ({CONFIG_KEY}) says: {reason}"
        ) from error
    given, _ = _fitting(path, source, config, model.state_dict())
    model = model.to(dtype or given["pos_embed"].dtype).to_empty(device="cpu")
    model.load_state_dict(given)
    return model.to(device).eval()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings in the header of a *.safetensors file that save_checkpoint(metadata=...) put there.

    Raises CheckpointError for a file that cannot be read as that, FileNotFoundError if there is none.
    """
    metadata, _ = _description(Path(path))
    return {key: value for key, value in metadata.items() if key not in (CONFIG_KEY, "format")}


def describes_itself(path: Path) -> bool:
    """Whether load_model() is told by the file which model it is of. Raises as that does for a damaged file."""
    return path.suffix.lower() == ".safetensors" and _description(path)[1] is not None


def _read(path: Path, config: ViTConfig, allow_pickle: bool) -> _Source:
    _require_file(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        _, described = _description(path)
        conflicts = []
        if described is not None:
            pairs = [(name, getattr(described, name), getattr(config, name)) for name in _SHAPELESS]
            conflicts = [
                f"{name} is {theirs!r} in the file, {ours!r} in the model"
                for name, theirs, ours in pairs
                if theirs != ours
            ]
        with _open_safetensors(path) as file:
            names = file.keys()
            tensors, left = _under_timms_names({name: file.get_tensor(name) for name in names})
            return _Source(tensors, left, conflicts, described, "bicubic")
    if suffix == ".npz":
        try:
            return _Source(*read_google_npz(path, config.num_heads), None, "bilinear")
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if suffix in PICKLES:
        if not allow_pickle:
            raise CheckpointError(
                f"{path} is refused: {suffix} files are pickles, which can run code when they are read. Convert it to "
                "safetensors, or read it in Python, with torch.load(weights_only=True): load_checkpoint(model, path, "
                "allow_pickle=True)"
            )
        return _Source(*_under_timms_names(_read_pickle(path)), [], None, "bicubic")
    raise CheckpointError(f"{path}: unknown format {suffix!r}; a checkpoint is *.safetensors or *.npz")


def _under_timms_names(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    return from_dinov2(tensors) if is_dinov2(tensors) else (tensors, {})


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}{' is a folder' if path.is_dir() else ''}")


def _open_safetensors(path: Path) -> Any:
    _require_file(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def _description(path: Path) -> tuple[dict[str, str], ViTConfig | None]:
    with _open_safetensors(path) as file:
        metadata = dict(file.metadata() or {})
        names = list(file.keys())
        stem = file.get_slice(_STEM).get_shape() if _STEM in names else []
    text = metadata.get(CONFIG_KEY)
    if text is None:
        return metadata, None
    try:
        values = json.loads(text)
        # A constant per channel is made of one for all.
        if len(stem) == 4 and isinstance(values, dict) and values.get("in_channels", stem[1]) != stem[1]:
            raise ValueError(f"in_channels is {values['in_channels']!r}, and {_STEM} has {stem[1]}")
        return metadata, ViTConfig.from_dict(values)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path}: its model description ({CONFIG_KEY}) is not usable: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # A damaged file makes the unpickler raise nearly anything.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read with torch.load(weights_only=True): {_gist(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        mapping = isinstance(content, dict)
        found = f"keys {', '.join(map(repr, list(content)[:6]))}" if mapping else type(content).__name__
        raise CheckpointError(
            f"{path} holds no mapping of names to tensors, at top level or below 'state_dict' or 'model': got {found}"
        )
    if is_dinov2(content):
        # These are computed with to get timm's.
        unusable = [f"{name} ({why})" for name, value in content.items() if (why := _unusable(value))]
        if unusable:
            raise CheckpointError(f"{path} holds tensors that are not usable: {', '.join(unusable)}")
    return content


def _gist(error: Exception) -> str:
    """What torch.load says is wrong, without its advice to read the file in a way that may run code."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return text.partition("\n")[0] or f"{type(error).__name__}, as of a file that ends too early"


def _fit_position(position: Tensor, config: ViTConfig, source: _Source) -> Tensor:
    """Position embeddings for the model's grid; unchanged if they are for it already, or their grid cannot be told."""
    prefix = config.num_position_prefix
    if position.dim() != 3 or position.shape[0] != 1 or position.shape[2] != config.embed_dim:
        return position
    if not position.is_floating_point():
        return position
    rows = position.shape[1] - prefix
    if source.config is not None:
        old_grid = source.config.grid if source.config.num_patches == rows else None
    elif rows == config.num_patches:
        return position
    else:
        old_grid = square_grid(rows)
    if old_grid is None:
        return position
    return resample_position(position, config.grid, old_grid, num_prefix=prefix, method=source.interpolation)
