"""What the tests of the command line share."""

from __future__ import annotations

import signal

import pytest
from typer.testing import CliRunner

from tests.cli.support import fake_interpret
from vit_engine import digits
from vit_engine.cli import classify
from vit_engine.cli.app import app


@pytest.fixture
def interruptible():
    """SIGINT interrupts, also where these tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run(monkeypatch):
    """Run ``vit-engine run`` on the CPU in this process, with a child that answers at once."""
    monkeypatch.setattr(classify, "interpret", fake_interpret())

    def invoke(*arguments, code=0, device="cpu"):
        result = CliRunner().invoke(app, ["run", *map(str, arguments), "--device", device])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.stdout + result.stderr
        return result

    return invoke


@pytest.fixture
def some(tmp_path):
    """A folder with six held-out digits under their own names."""
    folder = tmp_path / "some"
    folder.mkdir()
    for path in list(digits.heldout())[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
