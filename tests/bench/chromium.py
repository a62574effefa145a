"""A headless Chromium, where the machine has one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FOUND = next((path for name in _NAMES if (path := shutil.which(name))), None)

needs_chromium = pytest.mark.skipif(FOUND is None, reason="no Chromium or Chrome on PATH to open the page in")


@dataclass(frozen=True)
class Opened:
    """dom: the document after its scripts have run; console: what it said there, errors of the page among it."""

    dom: str
    console: list[str]


def opened(page: Path, width: int, dark: bool) -> Opened:
    """The page in a window of that width."""
    assert FOUND is not None
    command = [
        FOUND, "--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={page.parent / 'profile'}",
        "--no-first-run", "--virtual-time-budget=2000", "--enable-logging=stderr", "--v=0",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},900",
        *(["--no-sandbox"] if os.geteuid() == 0 else []), "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "</html>" in done.stdout, done.stderr[-2000:]
    return Opened(done.stdout, re.findall(r"CONSOLE[^\n]*", done.stderr))
