"""Files that a command is to write at its end: refused at its beginning where they could not be written."""

from __future__ import annotations

from pathlib import Path

import typer


def check_file(option: str, path: Path | None) -> None:
    """Raises typer.BadParameter for a file in a folder that is not there, and for a path that is a folder itself."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path}: its folder does not exist", param_hint=option)
    if path.is_dir():
        raise typer.BadParameter(f"{path}: is a folder, and a file is to be written", param_hint=option)
