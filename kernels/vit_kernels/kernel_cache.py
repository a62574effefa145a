"""Compiled kernels as files: taken out of Triton's cache, and put into another one.

Triton keeps a kernel under a key of everything that went into it: the source, the arguments' types and what is known of
them, the options, the GPU's capability, and Triton itself. Put under the same key elsewhere, it is found there and
nothing is compiled. Only what a launch needs is taken along: the machine code and its description.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.cache import FileCacheManager, triton_key

from .device import Device, device_of
from .tuned import source_of_kernels

__all__ = ["collected", "compilations", "compiler_versions", "compiling_into", "gpu_facts", "gpu_here", "put"]

_TAKEN = (".cubin", ".json")
_GROUP = "__grp__"  # Triton's list of a kernel's files: it holds the paths of one machine


@contextmanager
def compiling_into(folder: Path) -> Iterator[None]:
    """In this block Triton's cache is that folder."""
    with knobs.cache.scope():
        knobs.cache.dir = str(folder)
        yield


def collected(folder: Path) -> dict[str, bytes]:
    """The kernels in a folder that Triton compiled into: "KEY/NAME" -> content of the file."""
    found = (path for path in sorted(folder.glob("*/*")) if path.suffix in _TAKEN)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in found if not path.name.startswith(_GROUP)
    }


def put(files: Mapping[str, bytes]) -> None:
    """Puts kernels, as `collected` returns them, into Triton's cache, by Triton's own means."""
    manager_class = knobs.cache.manager_class or FileCacheManager
    kernels: dict[str, dict[str, bytes]] = {}
    for name, content in files.items():
        key, _, file = name.partition("/")
        kernels.setdefault(key, {})[file] = content
    for key, content_of in kernels.items():
        manager: Any = manager_class(key)
        paths = {file: manager.put(content, file) for file, content in content_of.items()}
        # The list comes last: a kernel is there once it is.
        for file in paths:
            if file.endswith(".json"):
                manager.put_group(file, paths)


def compiler_versions(capability: int) -> dict[str, str]:
    """What makes the machine code of the same kernel and arguments: versions of Triton, its compiler as a whole, ptxas,
    and the source of the kernels."""
    ptxas = str(make_backend(GPUTarget("cuda", capability, 32)).hash())
    release = re.search(r"V\d[\d.]*", ptxas)
    return {
        "triton": triton.__version__,
        "triton's compiler": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
        "ptxas": release.group() if release else ptxas,
        "vit_kernels": source_of_kernels(),
    }


def gpu_here() -> dict[str, int]:
    """The GPU that launches go to, as the tile choice knows it; UnsupportedDeviceError where there is none for them."""
    try:
        where = triton.runtime.driver.active.get_active_torch_device()
    except RuntimeError:
        where = torch.device("cpu")  # device_of says that there is no GPU, and the way out
    return gpu_facts(device_of(torch.empty(0, device=where)))


def gpu_facts(device: Device) -> dict[str, int]:
    """What of a GPU compiled kernels and the choice among them depend on."""
    return {name: getattr(device, name) for name in ("capability", "sm_count", "shared_memory")}


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the kernels that Triton compiles in this block; those it finds in its cache are not among them."""
    names: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            names.append(src.name)

    before = knobs.compilation.listener
    knobs.compilation.listener = listen
    try:
        yield names
    finally:
        knobs.compilation.listener = before
