"""Kernels compiled ahead of time, in a folder that another machine loads without compiling anything.

`vit-engine warmup` writes such a folder, with or without the GPU at hand; `load_kernels(folder)` reads it. It holds

    manifest.json       what the kernels are: see `Manifest`
    kernels/KEY/NAME    machine code and its description, as Triton keeps them

and counts for the same GPU, Triton, PyTorch and kernel source, and for nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .triton_needed import triton_needed

__all__ = ["ArtefactError", "Manifest", "load_kernels", "save_kernels", "versions_here"]

FORMAT = 1
MANIFEST = "manifest.json"
KERNELS = "kernels"
# A key of Triton's and a file in its folder: no path that leads out of the cache.
_FILE = re.compile(r"[A-Z0-9]+/[\w.-]+\.(cubin|json)")


class ArtefactError(RuntimeError):
    """A folder of kernels that cannot be used here; the message names what is wrong or differs."""


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    model: as `vit-engine warmup` was given it; dtype; shapes: of the images that it was compiled for. gpu: capability
    (90 is sm_90), sm_count and shared_memory, all that the tile choice depends on; versions: of Triton, its compiler,
    ptxas, PyTorch, this package and the source of its kernels. files: "KEY/NAME" to the SHA-256 of the content.
    """

    model: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    gpu: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str]

    @property
    def kernels(self) -> int:
        """How many kernels there are."""
        return len({name.partition("/")[0] for name in self.files})


def versions_here(capability: int) -> dict[str, str]:
    """Versions of everything that compiled kernels for this capability depend on, on this machine."""
    import torch

    from vit_engine import __version__
    from vit_kernels.kernel_cache import compiler_versions

    # Builds of one release for other versions of CUDA choose and launch kernels alike.
    release = torch.__version__.partition("+")[0]
    return {"vit_engine": __version__, "torch": release, **compiler_versions(capability)}


def save_kernels(
    folder: str | Path, files: Mapping[str, bytes], *, model: str, dtype: str, shapes: Sequence[Sequence[int]],
    gpu: Mapping[str, Any],
) -> Manifest:  # fmt: skip
    """Writes kernels, as `vit_kernels.kernel_cache.collected` returns them, with their manifest into a folder.

    gpu: capability, sm_count, shared_memory. Raises ValueError for a folder that has something in it, or no kernels.
    """
    folder = Path(folder)
    check_empty(folder)
    if not files:
        raise ValueError("save_kernels: files is empty: there are no kernels to write")
    for name, content in files.items():
        path = folder / KERNELS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    sizes = tuple(tuple(shape) for shape in shapes)
    manifest = Manifest(model, dtype, sizes, dict(gpu), versions_here(gpu["capability"]), hashes)
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def check_empty(folder: Path) -> None:
    """ValueError unless this is an empty folder or none yet."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} must be an empty folder, or not there yet")


def load_kernels(folder: str | Path) -> Manifest:
    """Puts the kernels of a folder that `vit-engine warmup` wrote where Triton finds them; returns its manifest.

    Call it once, before the first forward pass, with the GPU current that will run it. Everything is checked before
    anything is put: every file against its SHA-256, and GPU and versions against this machine's. The kernels go into
    Triton's cache (TRITON_CACHE_DIR, ~/.triton/cache by default), so loading again does no harm. Whatever the folder
    has no kernels for (other shapes and dtypes, tiles of a tuned file) is compiled when it is first met, as ever.
    Triton's own launcher, a C extension that it builds once per machine, is not in the folder.

    Raises ArtefactError for a folder that is incomplete, was changed, or was made for another GPU or by other versions
    than are here, naming what differs; vit_kernels.UnsupportedDeviceError where no GPU runs the kernels.
    """
    with triton_needed("load_kernels"):
        from vit_kernels import interpreting
        from vit_kernels.kernel_cache import gpu_here, put

    folder = Path(folder)
    manifest = _read(folder / MANIFEST)
    if interpreting():
        raise ArtefactError(
            f"{folder} holds machine code, and the kernels are interpreted here: unset TRITON_INTERPRET and start again"
        )
    here = gpu_here()
    problems = _differences(manifest.gpu, here)
    problems += _differences(manifest.versions, versions_here(here["capability"]))
    if problems:
        there = f"warmup --gpu sm_{here['capability']}:{here['sm_count']}"
        raise ArtefactError(f"{folder} was made for something else: {'; '.join(problems)}. Make it anew with {there}")
    put({name: _content(folder / KERNELS / name, expected) for name, expected in manifest.files.items()})
    return manifest


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    names = [*there, *(name for name in here if name not in there)]
    return [
        f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
        for name in names
        if there.get(name) != here.get(name)
    ]


def _read(path: Path) -> Manifest:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{path} is missing: {path.parent} was not written by `vit-engine warmup`") from None
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is no JSON file: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ArtefactError(f"{path} must have format {FORMAT}, which this version of the package reads")
    try:
        manifest = Manifest(**{name: value for name, value in found.items() if name != "format"})
        for name in ("gpu", "versions", "files"):
            if not isinstance(getattr(manifest, name), dict):
                raise TypeError(f"{name} must be an object, got {getattr(manifest, name)!r:.80}")
        strange = [name for name in manifest.files if not _FILE.fullmatch(name)]
    except (TypeError, AttributeError) as error:
        raise ArtefactError(f"{path} does not have the fields of a manifest: {error}") from None
    if strange or not manifest.files:
        raise ArtefactError(f"{path} must list files KEY/NAME.cubin and KEY/NAME.json, got {strange or 'none'}")
    return manifest


def _content(path: Path, expected: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"{path} is in the manifest and cannot be read: {error.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ArtefactError(f"{path} was changed: its SHA-256 is {found}, the manifest says {expected}")
    return content
