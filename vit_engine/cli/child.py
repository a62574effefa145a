"""Run a model through the kernels in Triton's interpreter, in a process of its own.

Triton decides at its import whether kernels are compiled or interpreted, so a process that uses PyTorch's compiler, a
GPU, or a library that imported triton already cannot interpret any more. The parent calls :func:`interpret`; the child
is ``python -m vit_engine.cli.child FOLDER`` with TRITON_INTERPRET=1. They exchange files in a temporary folder:
``model.safetensors`` and ``request.safetensors`` ({"images"}) go in, ``reply.safetensors`` ({"logits"}) and
``reply.json`` ({"seconds", "backend"} or {"error"}) come out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from ..vit import ViT


class ChildError(RuntimeError):
    """The interpreting process failed; the message says how, in one line."""


class Interpreted(NamedTuple):
    """``logits`` fp32 [B, classes], ``backend`` as the child's model reports it, ``seconds`` of its forward passes."""

    logits: torch.Tensor
    backend: str
    seconds: float


def interpret(model: ViT, images: torch.Tensor, *, dtype: torch.dtype, batch_size: int = 8) -> Interpreted:
    """Logits of ``model`` for uint8 ``images`` [B, C, H, W], from the kernels in Triton's interpreter.

    ``dtype``: fp32 or fp16, of the weights in the child (the interpreter computes bfloat16 wrongly, so it is refused).
    Raises ChildError when the child fails, ValueError for another dtype.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from ..checkpoint import save_checkpoint

    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"Triton's interpreter serves fp32 and fp16, not {dtype}")
    with tempfile.TemporaryDirectory(prefix="vit-engine-") as name:
        folder = Path(name)
        save_checkpoint(model, folder / "model.safetensors")
        save_file({"images": images.cpu().contiguous()}, folder / "request.safetensors")
        order = {"dtype": str(dtype).removeprefix("torch."), "batch_size": batch_size}
        (folder / "request.json").write_text(json.dumps(order), encoding="utf-8")
        process = _start(folder)
        reply = _reply(folder)
        if process.returncode or "error" in reply:
            raise ChildError(reply.get("error") or _last_words(process))
        return Interpreted(load_file(folder / "reply.safetensors")["logits"], reply["backend"], float(reply["seconds"]))


def _start(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        # The child finds the modules that the parent found, and none that lies in the current folder by accident.
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
        "PYTHONSAFEPATH": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    command = [sys.executable, "-m", "vit_engine.cli.child", str(folder)]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", check=False
    )


def _reply(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "reply.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _last_words(process: subprocess.CompletedProcess[str]) -> str:
    if process.returncode < 0:
        return f"the interpreting process was ended by signal {-process.returncode}"
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    return f"the interpreting process ended with code {process.returncode}: {lines[-1] if lines else 'no message'}"


def serve(folder: Path) -> None:
    """The child's part: read the request in ``folder``, compute, write the reply."""
    import torch
    from safetensors.torch import load_file, save_file

    from ..checkpoint import load_model

    order = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    images = load_file(folder / "request.safetensors")["images"]
    dtype = getattr(torch, order["dtype"])
    model = load_model(folder / "model.safetensors", backend="interpret", dtype=dtype)
    started = time.perf_counter()
    with torch.inference_mode():
        logits = [model(batch).float() for batch in images.split(order["batch_size"])]
    seconds = time.perf_counter() - started
    save_file({"logits": torch.cat(logits)}, folder / "reply.safetensors")
    (folder / "reply.json").write_text(json.dumps({"seconds": seconds, "backend": model.backend}), encoding="utf-8")


def main() -> int:
    """Entry point of the child process."""
    folder = Path(sys.argv[1])
    try:
        serve(folder)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        (folder / "reply.json").write_text(json.dumps({"error": reason}), encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
