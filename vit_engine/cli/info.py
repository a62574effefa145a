"""``vit-engine info``: what is installed, which GPUs there are, and what each operation would run on, and why."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Annotated, Any

import typer

_IN_PYTORCH = {
    "patch_embed": "F.conv2d, additions for class token and positions",
    "attention": "F.scaled_dot_product_attention",
    "linear": "F.linear after F.layer_norm, activation and residual on their own",
    "row_stats": "F.layer_norm, which takes its own statistics",
    "layer_norm": "F.layer_norm",
    "mlp": "F.layer_norm, F.linear twice, activation and residual on their own",
    "qk_rope": "F.layer_norm or F.rms_norm, products with cos and sin",
}


def info_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Versions, GPUs, and the backend that each operation would run on here, with the reason."""
    found = collect()
    if as_json:
        print(json.dumps(found))
        return
    for line in lines(found):
        typer.echo(line)


def collect() -> dict[str, Any]:
    """The object that ``--json`` prints: versions, cuda, gpus, interpreter, operations."""
    import torch

    from .report import versions

    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    backend, why = _choice(gpus)
    return {
        "versions": versions(),
        "cuda": {"pytorch_built_for": torch.version.cuda, "driver": _driver()},
        "gpus": gpus,
        "interpreter": _interpreter(),
        "operations": [
            {
                "operation": operation,
                "backend": backend,
                "runs": {"triton": f"vit_kernels.{operation}", "torch": in_pytorch}.get(backend, "raises"),
                "why": why,
            }
            for operation, in_pytorch in _IN_PYTORCH.items()
        ],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    result = [f"{name:<12} {number or 'not installed'}" for name, number in found["versions"].items()]
    cuda = found["cuda"]
    built = (
        f"PyTorch built for CUDA {cuda['pytorch_built_for']}" if cuda["pytorch_built_for"] else "PyTorch without CUDA"
    )
    result.append(f"{'cuda':<12} {built}; driver {cuda['driver'] or 'not found'}")
    for gpu in found["gpus"]:
        kernels = "kernels run here" if gpu["refused"] is None else f"no kernels: {gpu['refused']}"
        result.append(
            f"{'gpu ' + str(gpu['index']):<12} {gpu['name']}, capability {gpu['capability']}, "
            f"{gpu['multiprocessors']} multiprocessors, {gpu['memory_gib']} GiB; {kernels}"
        )
    if not found["gpus"]:
        result.append(f"{'gpu':<12} none that PyTorch can use")
    result += [f"{'interpreter':<12} {found['interpreter']['why']}", ""]
    result += [f"{op['operation']:<12} {op['backend']:<8} {op['runs']}" for op in found["operations"]]
    return [*result, "", found["operations"][0]["why"]]


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "refused": _refusal(index),
    }


def _refusal(index: int) -> str | None:
    """Why the kernels do not run on this GPU, in the words of the launchers; None if they do."""
    import torch

    try:
        from vit_kernels import device_of

        device_of(torch.empty(0, device=f"cuda:{index}"))
    # Whatever a broken driver or a missing triton raises is the answer to the question.
    except Exception as error:
        return " ".join(str(error).split())
    return None


def _interpreter() -> dict[str, Any]:
    """Whether ``--backend interpret`` can work: it needs triton, and starts its own process."""
    from .report import versions

    number = versions()["triton"]
    if number is None:
        return {"usable": False, "why": "not usable: triton is not installed"}
    return {"usable": True, "why": f"of triton {number}: fp32 and fp16 on the CPU, for checking (--backend interpret)"}


def _choice(gpus: list[dict[str, Any]]) -> tuple[str, str]:
    """The backend that "auto" means on the device that ``run`` would choose, and the reason."""
    if not gpus:
        why = "Without a GPU, models live on the CPU, where the backend is 'torch': PyTorch's own operators."
        if _interpreter()["usable"]:
            why += " The kernels can be checked here in Triton's interpreter."
        return "torch", why
    first = gpus[0]
    if first["refused"] is None:
        why = (
            f"GPU 0 has capability {first['capability']} and the kernels need 8.0, so models on it run on the backend "
            "'triton'. Models on the CPU run on 'torch'."
        )
        return "triton", why
    why = (
        f"GPU 0 cannot run the kernels ({first['refused']}), and nothing falls back silently: use --backend torch for "
        "PyTorch's operators on it, or --device cpu."
    )
    return "none", why


def _driver() -> str | None:
    """Version of the NVIDIA driver, None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if line.strip()), None)
