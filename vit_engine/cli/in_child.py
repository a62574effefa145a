"""Commands of vit-engine in a process of their own, because Triton decides at its import what it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any


def compile_in_child(arguments: Sequence[str]) -> int:
    """Runs a command of vit-engine in a process where Triton compiles; its exit status."""
    return run_in_child(arguments, {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"})


def run_in_child(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command of vit-engine in a process with that environment; its exit status, 128 + N for one that signal N
    ended.

    It ends as the command would have in this process: Ctrl-C, SIGTERM and a closed terminal reach it, and this process
    waits until it has kept what was done.
    """
    command = [sys.executable, "-m", "vit_engine.cli", *arguments]
    out, err = _descriptor(sys.stdout), _descriptor(sys.stderr)
    if out is None or err is None:
        # Something in Python took a stream's place, which a child cannot inherit.
        done = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        return done.returncode
    sys.stdout.flush()
    sys.stderr.flush()
    with _signals_for_child(lambda: subprocess.Popen(command, env=environment, stdout=out, stderr=err)) as process:
        status = process.wait()
    return status if status >= 0 else 128 - status


def _descriptor(stream: Any) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):  # no stream at all, or one that is no file
        return None


@contextmanager
def _signals_for_child(start: Callable[[], subprocess.Popen[bytes]]) -> Iterator[subprocess.Popen[bytes]]:
    """A child, and what ends this process is for it to answer, from before it is there.

    A terminal's Ctrl-C reaches both: passed on, it would interrupt the child while it saves, so the first is left to
    the terminal and only those after it end the child, whatever it does.
    """
    interrupts = 0
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1 and process is not None:
            process.terminate()

    handlers = {signal.SIGTERM: pass_on, signal.SIGHUP: pass_on, signal.SIGINT: interrupt}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with start() as process:
            for number in early:
                process.send_signal(number)
            yield process
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
