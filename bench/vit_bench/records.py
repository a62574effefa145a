"""Evidence files: what was shown for a kernel, by which rung, and for exactly which source.

One JSON file per rung (interpreted, sanitized, compiled, emulated, executed), each written by one command. A record
says "this kernel, in this dtype, on this GPU generation, with the source of this hash: passed or failed".
`vit_bench.current` decides which of them still count; a record of older source counts for nothing.
"""

from __future__ import annotations

import ast
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vit_bench.trees import tree_text, without_docstrings, without_refusals

KERNELS = ("patch_embed", "attention", "linear", "row_stats", "layer_norm", "mlp", "qk_rope")
# Launchers beside the one of the same name that run its kernel, and whose cases are among its own.
_ALSO = {"attention": ("attention_packed",)}
# What tiles cost and which GPUs there are: it decides which tile a launch gets, never what the launch computes. No part
# of a kernel's source, therefore; in its place `vit_bench.current` wants every tile that is chosen now among those run.
_CHOOSING = ("attention_costs", "device", "gemm_cycles")
DTYPES = ("float32", "float16", "bfloat16")
CAPABILITIES = (80, 86, 89, 90, 100, 120)
RUNGS = ("interpreted", "compiled", "sanitized", "emulated", "executed")


@dataclass
class Record:
    """One claim. capability: 90 for sm_90, None where the rung knows no GPU; detail: figures, free in form."""

    kernel: str
    dtype: str
    capability: int | None
    source: str
    passed: bool
    versions: dict[str, str]
    date: str
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.kernel, self.dtype, self.capability or 0


def kernel_folder() -> Path:
    """Where vit_kernels lies, found without importing it (and so without importing triton)."""
    spec = importlib.util.find_spec("vit_kernels")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("vit_kernels is not installed: pip install -e .")
    return Path(next(iter(spec.submodule_search_locations)))


def _imported_modules(tree: ast.Module) -> set[str]:
    """Names of sibling modules that a module of vit_kernels imports, at its top level or inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            relative = node.level == 1
            module = node.module or ""
            if module.startswith("vit_kernels."):
                names.add(module.split(".")[1])
            elif relative and module:
                names.add(module.split(".")[0])
            elif relative or module == "vit_kernels":
                names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(a.name.split(".")[1] for a in node.names if a.name.startswith("vit_kernels."))
    return names


def operation_module(kernel: str, folder: Path) -> str:
    """Name of the module whose top level defines the launcher `kernel`."""
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if f"def {kernel}(" not in source:  # parsing every file would take a second
            continue
        if any(isinstance(node, ast.FunctionDef) and node.name == kernel for node in ast.parse(source).body):
            return path.stem
    raise ValueError(f"no module in {folder.name} defines a function {kernel!r}")


@functools.lru_cache(maxsize=256)
def _taken_apart(source: str) -> tuple[set[str], str]:
    """(the siblings that it imports, its code as text) of a module. Kernels share most of theirs."""
    tree = ast.parse(source)
    return _imported_modules(tree), tree_text(without_refusals(without_docstrings(tree)))


def source_hash(kernel: str, folder: Path | None = None) -> str:
    """SHA-256 over the syntax trees of a kernel's launchers' modules and of all that these import, transitively,
    without what only decides among tiles.

    Comments, layout, docstrings and refusals of arguments do not enter: only what can change a result does.
    """
    folder = kernel_folder() if folder is None else folder
    waiting = [operation_module(launcher, folder) for launcher in (kernel, *_ALSO.get(kernel, ()))]
    trees: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        path = folder / f"{name}.py"
        if name in trees or name in _CHOOSING or not path.is_file():
            continue
        imported, trees[name] = _taken_apart(path.read_text(encoding="utf-8"))
        waiting.extend(imported)
    digest = hashlib.sha256()
    for name in sorted(trees):
        digest.update(f"{name}\n{trees[name]}\n".encode())
    return digest.hexdigest()


def version(package: str) -> str | None:
    """Of an installed distribution; None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of what the result of a run depends on."""
    return {name: version(name) or "not installed" for name in ("torch", "triton")}


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def load(path: Path) -> list[Record]:
    """The records of an evidence file; none when the file does not exist. Raises ValueError for one that is damaged."""
    if not path.is_file():
        return []
    try:
        return [Record(**record) for record in json.loads(path.read_text(encoding="utf-8"))["records"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as evidence: {error!r}") from error


def merge(path: Path, rung: str, new: list[Record]) -> None:
    """Write `new` into an evidence file: a record replaces the one of the same kernel, dtype and capability.

    Runs for different GPU generations may write to one file at the same time.
    """
    if rung not in RUNGS:
        raise ValueError(f"rung must be one of {', '.join(RUNGS)}; got {rung!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        records = {record.key: record for record in [*load(path), *new]}
        ordered = [asdict(records[key]) for key in sorted(records)]
        path.write_text(json.dumps({"rung": rung, "records": ordered}, indent=1) + "\n", encoding="utf-8")
    finally:
        os.close(folder)
