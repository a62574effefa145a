"""The machine that a run is on: what to call it, its versions, and its datasheet where it is known."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from vit_bench.records import KERNELS, kernel_folder, source_hash, version
from vit_bench.roofline import PEAKS
from vit_kernels.device import KNOWN_DEVICES, Device

PACKAGES = (
    "vit-engine",
    "torch",
    "triton",
    "numpy",
    "timm",
    "torchvision",
    "transformers",
    "flash-attn",
    "xformers",
    "onnxruntime-gpu",
    "onnxruntime",
    "torch-tensorrt",
)


def processor() -> str:
    """The CPU's name as Linux has it, or what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def cpu_label() -> str:
    """Threads are part of it: times of other numbers of threads are times of something else."""
    threads = torch.get_num_threads()
    return f"cpu ({processor()}, {threads} thread{'s' * (threads != 1)})"


# Variants of a model with other clocks or other memory than the one whose datasheet is known.
_OTHERS = {"PCIE", "NVL", "LAPTOP", "D", "TI", "SUPER", "40GB", "64GB", "MIG"}


def known_gpu(name: str) -> Device | None:
    """The GPU of the datasheets that PyTorch calls by this name, such as "NVIDIA H100 80GB HBM3"."""
    words = name.upper().replace("-", " ").split()
    if _OTHERS.intersection(words):
        return None
    models = ((device, device.name.removesuffix(" SXM").split()) for device in KNOWN_DEVICES)
    return next((device for device, model in models if all(word in words for word in model)), None)


def gpu_label(name: str) -> str:
    known = known_gpu(name)
    return known.name if known else name


def datasheet(device: Device | None) -> dict[str, float] | None:
    """Peaks as `results.Run` has them; None for a GPU whose datasheet is not known here."""
    if device not in PEAKS:
        return None
    peaks = PEAKS[device]
    return {"bandwidth": peaks.bandwidth, "half": peaks.half, "single": peaks.single}


def environment(where: str) -> dict[str, Any]:
    """where: the label of the device that rows are about. Asked of this process; nothing is set."""
    from vit_bench.full.environment import git_state

    found: dict[str, Any] = {
        "device": where,
        "versions": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernel_sources": {kernel: source_hash(kernel) for kernel in KERNELS},
        "git": git_state(kernel_folder()),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found
