"""What a GPU is to the tile choice: a handful of numbers, passed in as a value.

The tile choice never asks the machine. It takes a `Device`, so that the same code picks tiles for the GPU at hand, for
one that is only compiled for, and in tests.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from .tuned import Tuned


class UnsupportedDeviceError(RuntimeError):
    """The tensors live on a device that the kernels do not run on."""


@dataclass(frozen=True)
class Device:
    """One GPU model.

    capability: compute capability as an integer (80 is sm_80); sm_count: streaming multiprocessors;
    shared_memory: bytes one CTA may use (opt-in limit); tuned: what was measured on it (`use_tuned`), None for nothing.
    """

    name: str
    capability: int
    sm_count: int
    shared_memory: int
    tuned: Tuned | None = None


A100 = Device("A100", 80, 108, 166_912)
RTX_3090 = Device("RTX 3090", 86, 82, 101_376)
RTX_4090 = Device("RTX 4090", 89, 128, 101_376)
H100 = Device("H100 SXM", 90, 132, 232_448)
H200 = Device("H200", 90, 132, 232_448)
B200 = Device("B200", 100, 148, 232_448)
RTX_5090 = Device("RTX 5090", 120, 170, 101_376)

# The first of a capability stands for all of it.
KNOWN_DEVICES = (A100, RTX_3090, RTX_4090, H100, H200, B200, RTX_5090)

# Where kernels run as numpy code. The tile choice knows it by name: the interpreter pays for every program it starts.
INTERPRETED = Device("Triton interpreter", 80, 1, 1 << 30)

MIN_CAPABILITY = 80
# Products of these generations read shared memory through another proxy than copies write it. Before this version
# Triton left out the fence between them (triton-lang/triton#9610), and results on a B200 changed from run to run
# (pytorch/pytorch#181248). sm_120 multiplies from registers.
_FENCED = range(100, 120)
_FENCED_SINCE = (3, 7, 1)


# Triton decides when a function is decorated: its own library when triton is imported, our kernels after this line.
_INTERPRETING = bool(triton.knobs.runtime.interpret)
if isinstance(tl.sum, triton.JITFunction) == _INTERPRETING:
    raise RuntimeError(
        "TRITON_INTERPRET was changed after triton had been imported (by timm, transformers or torch, perhaps). "
        "Set TRITON_INTERPRET=1 in the environment before Python starts, or not at all."
    )


def interpreting() -> bool:
    """True when Triton was imported with TRITON_INTERPRET=1, so that every kernel runs as numpy code on the CPU."""
    return _INTERPRETING


# A GPU of this process: Triton's driver and the GPU's index, or None, the interpreter.
Where = tuple[object, int] | None

# What was measured, by GPU. It belongs to what a GPU is known to be, so it reaches the tile choice inside `Device`.
_tables: dict[Where, Tuned | None] = {}


def attach(tables: dict[Where, Tuned | None]) -> None:
    """From now on these GPUs have these tables, or none; `use_tuned` and `forget_tuned` are the ways to call this."""
    _tables.update(tables)
    _describe.cache_clear()
    _interpreter.cache_clear()


@functools.lru_cache(maxsize=1)
def _interpreter() -> Device:
    return replace(INTERPRETED, tuned=_tables.get(None))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


@functools.lru_cache(maxsize=64)
def _describe(driver: object, index: int) -> Device:
    target = driver.get_current_target()  # type: ignore[attr-defined]
    if target.backend != "cuda":
        raise UnsupportedDeviceError(
            f"vit_kernels needs an NVIDIA GPU; Triton's active backend is {target.backend!r}. "
            "Use the 'torch' backend of vit_engine here."
        )
    capability = int(target.arch)
    if capability < MIN_CAPABILITY:
        raise UnsupportedDeviceError(
            f"vit_kernels needs compute capability 8.0 or newer; this GPU has {capability // 10}.{capability % 10}. "
            "Use the 'torch' backend of vit_engine here."
        )
    if capability in _FENCED and _version(triton.__version__) < _FENCED_SINCE:
        raise UnsupportedDeviceError(
            f"vit_kernels needs Triton {'.'.join(map(str, _FENCED_SINCE))} or newer on a GPU of compute capability "
            f"{capability // 10}.{capability % 10}; this is {triton.__version__}, which leaves out fences that matter "
            "there. PyTorch 2.12.1 brings it; or use the 'torch' backend of vit_engine."
        )
    properties = driver.utils.get_device_properties(index)  # type: ignore[attr-defined]
    sm_count, shared_memory = properties["multiprocessor_count"], properties["max_shared_mem"]
    return Device(f"sm_{capability}", capability, sm_count, shared_memory, _tables.get((driver, index)))


def device_of(tensor: torch.Tensor) -> Device:
    """The `Device` that a launch on this tensor would run on.

    Raises UnsupportedDeviceError when the tensor is not where Triton's active driver launches.
    """
    if interpreting():
        return _interpreter()
    try:
        driver = triton.runtime.driver.active
    except RuntimeError as error:
        raise UnsupportedDeviceError(
            f"a tensor on {tensor.device} cannot go through the Triton kernels: Triton finds no GPU ({error}). "
            "Use the 'torch' backend, or set TRITON_INTERPRET=1 before Triton is imported to interpret the kernels."
        ) from error
    where = driver.get_active_torch_device()
    if tensor.device.type != where.type and not tensor.is_cuda:
        raise UnsupportedDeviceError(
            f"a tensor on {tensor.device} cannot go through the Triton kernels, which launch on {where.type} here. "
            "Move it there, or use the 'torch' backend."
        )
    index = tensor.device.index
    return _describe(driver, driver.get_current_device() if index is None else index)
