"""What this machine is: asked in child processes, so that a broken driver cannot take the verification down."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from vit_bench import records
from vit_bench.full.checks import EXECUTED, Check, Facts
from vit_bench.full.runner import CRASHED, NOT_RUN, PASSED, Outcome, part, run_program

GPU_CHECK = "gpu"
SECONDS = 180  # a driver may take long to start, but not this long


def examine() -> tuple[Facts, dict[str, Any], Outcome]:
    """What the checks depend on, what the report says about this machine, and how asking for the GPU ended."""
    check = Check(GPU_CHECK, EXECUTED, SECONDS)
    ended, output = run_program(check, [sys.executable, "-m", "vit_engine.cli", "info", "--json"])
    info = _last_object(output) if ended is None else None
    outcome = _outcome(check, ended, info, output)
    gpu = _gpu(info)
    usable = gpu is not None and gpu["refused"] is None
    facts = Facts(
        gpu=gpu["name"] if gpu is not None and usable else None,
        no_gpu="" if usable else outcome.reason,
        triton=records.version("triton") is not None,
        timm=records.version("timm") is not None,
        sanitizer=find_sanitizer(),
    )
    return facts, _environment(info or {}, facts), outcome


def _last_object(output: str) -> dict[str, Any] | None:
    """The JSON object in the last line that holds one; warnings of libraries may stand around it."""
    for line in reversed(output.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None


def _gpu(info: dict[str, Any] | None) -> dict[str, Any] | None:
    """The GPU that PyTorch uses unless told otherwise, the first one."""
    gpus = (info or {}).get("gpus") or []
    return gpus[0] if gpus else None


def _outcome(check: Check, ended: tuple[str, str] | None, info: dict[str, Any] | None, output: str) -> Outcome:
    if ended is not None:
        status, reason = ended
        return Outcome(check.name, check.rung, status, f"the GPU could not be asked for: {reason}", output=output)
    if info is None:
        return Outcome(check.name, check.rung, CRASHED, "the GPU could not be asked for: no answer", output=output)
    gpu = _gpu(info)
    if gpu is None:
        return Outcome(check.name, check.rung, NOT_RUN, "no NVIDIA GPU that PyTorch can use")
    if gpu["refused"] is not None:
        return Outcome(check.name, check.rung, NOT_RUN, f"{gpu['name']}: {gpu['refused']}")
    found = f"{gpu['name']}, compute capability {gpu['capability']}"
    return Outcome(check.name, check.rung, PASSED, parts=[part(found, PASSED)])


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or in the bin folder of $CUDA_HOME; None without it."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("compute-sanitizer") or (
        shutil.which("compute-sanitizer", path=str(Path(home) / "bin")) if home else None
    )


def _environment(info: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {
        "gpu": _gpu(info),
        "gpus": info.get("gpus", []),
        "cuda": info.get("cuda", {}),
        "versions": {**info.get("versions", {}), "timm": records.version("timm")},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "compute_sanitizer": facts.sanitizer,
        "kernel_sources": {kernel: records.source_hash(kernel) for kernel in records.KERNELS},
        "git": git_state(records.kernel_folder()),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that the kernels lie in, and whether its tracked files were changed since.

    None where git is missing or does not track them: an environment inside another project's checkout does not count.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "device.py")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
