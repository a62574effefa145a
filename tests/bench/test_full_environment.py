"""What the machine is: asked in a child process, whatever that child does."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vit_bench.full import environment as environment_module
from vit_bench.full.checks import all_checks
from vit_bench.full.environment import examine, find_sanitizer, git_state
from vit_bench.full.page import page
from vit_bench.full.report import build
from vit_bench.records import KERNELS

GPU = {
    "index": 0,
    "name": "NVIDIA <H100>",
    "capability": "9.0",
    "multiprocessors": 132,
    "memory_gib": 79.1,
    "refused": None,
}


def asked(monkeypatch: pytest.MonkeyPatch, output: str, ended: tuple[str, str] | None = None) -> Any:
    monkeypatch.setattr(environment_module, "run_program", lambda check, command: (ended, output))
    return examine()


def info(*gpus: dict[str, Any]) -> str:
    return json.dumps({"versions": {"torch": "2.14.1"}, "cuda": {"driver": "580.1"}, "gpus": list(gpus)})


def test_a_gpu_that_the_kernels_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, environment, outcome = asked(monkeypatch, f"a warning\n{info(GPU)}\nanother")
    assert (facts.gpu, facts.no_gpu, outcome.status) == ("NVIDIA <H100>", "", "passed")
    assert environment["gpu"] == GPU and environment["cuda"] == {"driver": "580.1"}
    assert environment["versions"]["torch"] == "2.14.1" and environment["versions"]["timm"]
    assert set(environment["kernel_sources"]) == set(KERNELS)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in environment["kernel_sources"].values())


@pytest.mark.parametrize(
    ("output", "ended", "status", "words"),
    [
        (info(), None, "not run", "no NVIDIA GPU that PyTorch can use"),
        (info({**GPU, "refused": "needs compute capability 8.0"}), None, "not run", "needs compute capability 8.0"),
        (
            "Segmentation fault",
            ("crashed", "ended by signal 11"),
            "crashed",
            "could not be asked for: ended by signal 11",
        ),
        ("", ("timed out", "stopped after 180 s"), "timed out", "could not be asked for: stopped after 180 s"),
        ("[3]\n3", None, "crashed", "no answer"),
    ],
    ids=["none", "too old", "crash", "hang", "no answer"],
)
def test_a_gpu_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, output: str, ended: tuple[str, str] | None, status: str, words: str
) -> None:
    facts, environment, outcome = asked(monkeypatch, output, ended)
    assert facts.gpu is None and words in facts.no_gpu
    assert outcome.status == status and words in outcome.reason
    executed = [check for check in all_checks(facts) if check.rung == "executed"]
    assert executed and all(words in check.not_run for check in executed)
    page(build(environment, [], [outcome], started="a", ended="b"))


def test_compute_sanitizer_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert find_sanitizer() is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert find_sanitizer() == str(tool)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tool.parent))
    assert find_sanitizer() == str(tool)


def test_a_checkout_is_the_kernels_own(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "device.py").write_text("one")
    (tmp_path / "README").write_text("another project")
    git("add", "README")
    git("commit", "-m", "x")
    assert git_state(package) is None  # an installed copy inside somebody's checkout
    git("add", "site-packages")
    git("commit", "-m", "y")
    state = git_state(package)
    assert state is not None and re.fullmatch(r"[0-9a-f]{40}", state["commit"]) and state["changed"] is False
    (package / "device.py").write_text("two")
    assert git_state(package) == {**state, "changed": True}
    assert git_state(tmp_path / "nowhere") is None
