"""What a command is to write at its end is refused at its beginning."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer

from vit_engine.cli import outputs


def test_what_there_is_no_permission_for_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As for somebody who may write neither: tests may run as root, who may everything."""
    new, there = tmp_path / "new", tmp_path / "there"
    there.touch()
    locked = {tmp_path, there}
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) in locked))
    with pytest.raises(typer.BadParameter, match="there: no permission to write it"):
        outputs.check_file("--out", there)
    with pytest.raises(typer.BadParameter, match="new: no permission to write in its folder"):
        outputs.check_file("--out", new)
    locked.remove(there)
    outputs.check_file("--out", there)
    with pytest.raises(typer.BadParameter, match="there: no permission to write in its folder"):
        outputs.check_file("--out", there, replaced=True)


def test_streams_and_links(tmp_path: Path) -> None:
    outputs.check_file("--csv", Path("/dev/stdout"))
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(typer.BadParameter, match="is the file of --out, too"):
        outputs.check_apart({"--out": tmp_path / "file", "--csv": tmp_path / "link"})
    outputs.check_apart({"--out": Path("/dev/null"), "--csv": Path("/dev/null")})
    outputs.check_apart({"--out": None, "--csv": None, "--trace": tmp_path / "file"})
