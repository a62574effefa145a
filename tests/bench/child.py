"""Runs a snippet in a Python process whose Triton compiles: this one's may have been told to interpret."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from tests.rung import child_environment

SECONDS = 300
ROOT = Path(__file__).parents[2]


@functools.cache
def _forks() -> subprocess.Popen[str]:
    """The process that forks for every snippet; it ends when this one does and its standard input with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.bench.forks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=child_environment(),
        start_new_session=True,
    )


def run(code: str) -> Any:
    """The JSON value that the snippet prints on its last line. Fails with its output when it fails."""
    forks = _forks()
    assert forks.stdin is not None and forks.stdout is not None
    with tempfile.TemporaryDirectory() as into:
        environment = child_environment()
        request = {"code": textwrap.dedent(code), "environment": environment, "cwd": os.getcwd(), "into": into}
        print(json.dumps(request), file=forks.stdin, flush=True)
        if not select.select([forks.stdout], [], [], SECONDS)[0]:
            os.killpg(forks.pid, signal.SIGKILL)
            _forks.cache_clear()
        status = forks.stdout.readline().strip() or f"none after {SECONDS} seconds"
        out, err = (
            path.read_text(errors="replace") if path.exists() else "" for path in (Path(into, "out"), Path(into, "err"))
        )
    assert status == "0", f"exit status {status}\n{out}\n{err}"
    return json.loads(out.strip().splitlines()[-1])
