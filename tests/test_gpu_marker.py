"""`pytest -m gpu` without a GPU: every test is skipped with the reason, and none passes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .rung import child_environment

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.interpreted_only
def test_without_a_gpu_they_skip_with_a_reason() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    skipped = sum(int(count) for line in lines for count in re.findall(r"^SKIPPED \[(\d+)\]", line))
    reasons = [line for line in lines if line.startswith("SKIPPED")]
    assert skipped >= 50 and all("needs an NVIDIA GPU; kernels are interpreted here" in line for line in reasons)
    assert re.fullmatch(rf"{skipped} skipped in .*", lines[-1]), lines[-1]


def test_every_test_in_the_folder_is_marked() -> None:
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    assert len(files) >= 5
    for path in files:
        assert "\npytestmark = pytest.mark.gpu\n" in path.read_text(), path.name
