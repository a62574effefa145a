"""The whole command on a GPU, on a few of its checks: executed, captured, timed, and reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.rung import child_environment

pytestmark = pytest.mark.gpu


@pytest.mark.slow
def test_the_command_checks_and_then_times(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    command = [sys.executable, "-m", "vit_engine.cli", "verify", "--full", "--report", str(path)]
    for pattern in ("cases/layer_norm/*", "graph/vit_tiny_*", "throughput/vit_tiny_*/b8"):
        command += ["--only", pattern]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=child_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert report["complete"] and report["summary"]["passed"] == len(report["checks"])
    assert report["environment"]["gpu"]["name"] == torch.cuda.get_device_name(0)
    assert report["environment"]["cuda"]["driver"] is None or "." in report["environment"]["cuda"]["driver"]
    assert {check["rung"] for check in report["checks"]} == {"executed"}
    (timed,) = (check for check in report["checks"] if check["name"].startswith("throughput/"))
    rates = timed["parts"][0]["figures"]["throughput"]
    assert set(rates) == {"vit-engine", "timm, eager"}
    assert all(rate["images_per_second"] > 0 and rate["timings"] >= 5 for rate in rates.values())
    assert torch.cuda.get_device_name(0) in path.with_suffix(".html").read_text()
