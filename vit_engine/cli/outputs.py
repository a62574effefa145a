"""Files that a command is to write at its end: refused at its beginning where they could not be written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import typer


def check_file(option: str, path: Path | None, *, replaced: bool = False) -> None:
    """Raises typer.BadParameter for a file in a folder that is not there, a path that is a folder itself, and where
    there is no permission to write.

    replaced: a file that is there is not written into but replaced by another, which takes a folder that can be
    written.
    """
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise typer.BadParameter(f"{path}: its folder does not exist", param_hint=option)
    if path.is_dir():
        raise typer.BadParameter(f"{path}: is a folder, and a file is to be written", param_hint=option)
    if path.exists() and not os.access(path, os.W_OK):
        raise typer.BadParameter(f"{path}: no permission to write it", param_hint=option)
    if (replaced or not path.exists()) and not os.access(folder, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{path}: no permission to write in its folder", param_hint=option)


def check_apart(written: Mapping[str, Path | None], read: Iterable[Path] = ()) -> None:
    """Raises typer.BadParameter where a file that is to be written would take the place of another, or of one that is
    read. written: by option."""
    taken = {path.resolve(): "a file that is read" for path in read}
    for option, path in written.items():
        if path is None or (path.exists() and not path.is_file()):  # a device or a pipe takes what several write
            continue
        if path.resolve() in taken:
            what = taken[path.resolve()]
            raise typer.BadParameter(f"{path}: is {what}, too; name another file", param_hint=option)
        taken[path.resolve()] = f"the file of {option}"
