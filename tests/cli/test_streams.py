"""What a command does where its output cannot be written: quiet for a reader that has left, one line for the rest."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from tests.rung import child_environment
from vit_engine.cli.app import main

# Written by typer, by rich and by print().
COMMANDS = (["--version"], ["--help"], ["info", "--json"])


def started(words: list[str], redirected: str, **streams: int) -> subprocess.Popen[str]:
    command = ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-m", "vit_engine.cli", *words]
    return subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True, **streams)  # type: ignore[call-overload]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_reader_that_has_left_ends_it_quietly(words: list[str]) -> None:
    reads, writes = os.pipe()
    process = started(words, "", stdout=writes)
    os.close(writes)
    os.close(reads)
    assert (process.communicate(timeout=120)[1], process.returncode) == ("", 128 + signal.SIGPIPE)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    ("redirected", "why"),
    [
        ("> /dev/full", "the output could not be written: No space left on device"),
        (">&-", "standard output is closed: send it to a file, or to /dev/null"),
    ],
)
def test_what_cannot_be_written_is_said_in_a_line(words: list[str], redirected: str, why: str) -> None:
    process = started(words, redirected)
    assert (process.communicate(timeout=120)[1], process.returncode) == (f"vit-engine: {why}\n", 1)


def test_a_closed_standard_error_is_no_part_of_the_output() -> None:
    process = started(["run", "--device", "abacus"], "2>&-", stdout=subprocess.PIPE)
    assert process.communicate(timeout=120)[0] == ""
    assert process.returncode == 2


def test_a_full_disk_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def saving() -> None:
        raise OSError(error, os.strerror(error), "results.json")

    monkeypatch.setattr("vit_engine.cli.app.app", saving)
    error = errno.ENOSPC
    with pytest.raises(SystemExit, match=r"^1$"):
        main()
    assert capsys.readouterr().err == "vit-engine: results.json could not be written: No space left on device\n"
    error = errno.ENOENT
    with pytest.raises(FileNotFoundError):
        main()
