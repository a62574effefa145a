"""Copies of the source tree to plant faults in: the working tree itself is never touched."""

from __future__ import annotations

import compileall
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .mutant import Mutant

LEFT_OUT = shutil.ignore_patterns(
    ".git", "__pycache__", "*.egg-info", "out", "build", "dist", ".venv", "venv", ".hypothesis", ".*_cache",
    ".benchmarks", ".triton",
)  # fmt: skip


class Tree:
    def __init__(self, original: Path, copy: Path) -> None:
        self.path = copy
        shutil.copytree(original, copy, ignore=LEFT_OUT)
        # Children do not write caches of compiled modules, but use them.
        for folder in ("kernels", "bench", "vit_engine"):
            if (copy / folder).is_dir():
                compileall.compile_dir(copy / folder, quiet=2)

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """The copy with one fault in it, for as long as the block runs."""
        file = self.path / mutant.file
        content, before = file.read_bytes(), file.stat().st_mtime
        try:
            file.write_bytes(mutant.apply(content))
            # Caches of compiled modules go by the second and the size, and a fault may change neither.
            os.utime(file, (before + 100, before + 100))
            yield
        finally:
            file.write_bytes(content)
            os.utime(file, (before, before))

    def append(self, file: str, text: str) -> None:
        with (self.path / file).open("a") as stream:
            stream.write(text)
