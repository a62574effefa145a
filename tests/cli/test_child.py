"""Real processes: the command itself, and the child that interprets the kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.rung import child_environment
from vit_engine import digits, load_model
from vit_engine.cli import child


def test_a_child_that_dies_is_reported(monkeypatch, tmp_path):
    model = load_model(digits.CHECKPOINT, backend="torch")
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(child.ChildError, match="was ended by signal 9"):
        child.interpret(model, images, dtype=torch.float32)
    program.write_text("#!/bin/sh\necho first >&2; echo last words >&2; exit 3\n")
    with pytest.raises(child.ChildError, match="ended with code 3: last words"):
        child.interpret(model, images, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"fp32 and fp16, not torch\.bfloat16"):
        child.interpret(model, images, dtype=torch.bfloat16)


def test_the_child_says_what_went_wrong(tmp_path, monkeypatch):
    (tmp_path / "request.json").write_text(json.dumps({"dtype": "float32", "batch_size": 8}))
    monkeypatch.setattr(sys, "argv", ["child", str(tmp_path)])
    assert child.main() == 1
    assert "request.safetensors" in json.loads((tmp_path / "reply.json").read_text())["error"]


def environment():
    return {**child_environment(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def test_the_real_command_with_the_real_interpreter(some, tmp_path):
    """In a folder with a module that would break every child that imports from where it stands."""
    if sys.version_info >= (3, 11):  # before, -m puts the current folder first for the parent, too
        (tmp_path / "random.py").write_text("raise RuntimeError('imported from the current folder')")
    command = [
        sys.executable,
        "-m",
        "vit_engine.cli.app",
        "run",
        str(some),
        "--device",
        "cpu",
        "--json",
        "--check",
        "2",
    ]
    (some / "broken.png").write_text("no image")
    done = subprocess.run(
        command, env={**environment(), "PYTHONSAFEPATH": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{some / 'broken.png'}: not an image, damaged, or not one of JPEG, PNG")
    found = json.loads(done.stdout)
    assert len(found) == 9
    assert len(found["predictions"]) == 6
    assert (found["agreement"]["kernels"], found["agreement"]["images"]) == ("interpret", 2)
    assert found["agreement"]["top1"] == 1.0
    assert 0 < found["agreement"]["max_abs_error"] < 1e-4


def test_the_command_line_starts_without_heavy_imports():
    program = (
        "import sys, vit_engine.cli.app as a; "
        "print([m for m in ('torch', 'triton', 'numpy', 'PIL', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
