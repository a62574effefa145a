"""Runs a snippet in a Python process whose Triton compiles: this one's may have been told to interpret."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

from tests.rung import child_environment


def run(code: str) -> Any:
    """The JSON value that the snippet prints on its last line. Fails with its output when it fails."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=child_environment(),
        timeout=300,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.strip().splitlines()[-1])
