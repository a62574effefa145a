"""A command in a process of its own: its output comes as it is printed, and what ends this process ends it in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.rung import child_environment
from vit_engine.cli import in_child


def started(tmp_path: Path, on_signal: str) -> subprocess.Popen[str]:
    """A process that waits for a child, once the child has begun; the child does that when it is interrupted."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ntrap '{on_signal}' INT TERM\necho begun\nwhile :; do sleep 0.05; done\n")
    script.chmod(0o755)
    code = f"""
        import sys
        from vit_engine.cli.in_child import compile_in_child

        sys.executable = {str(script)!r}
        sys.exit(compile_in_child(["bench"]))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_the_child_keeps_what_was_done_before_this_process_ends(how, tmp_path):
    with started(tmp_path, "sleep 0.6; echo kept; exit 130") as process:
        if how == "Ctrl-C":  # as a terminal sends it
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("kept\n", 130)


def test_a_second_interrupt_ends_a_child_that_was_not_reached(tmp_path):
    with started(tmp_path, "exit 3") as process:
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 3


def test_a_signal_that_comes_while_the_child_begins_reaches_it():
    def start() -> subprocess.Popen[bytes]:
        os.kill(os.getpid(), signal.SIGTERM)
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    with in_child._signals_for_child(start) as process:
        assert process.wait(timeout=20) == -signal.SIGTERM


def test_a_child_ended_by_a_signal_gives_the_status_of_a_shell(tmp_path):
    with started(tmp_path, "kill -KILL $$") as process:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
