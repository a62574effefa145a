"""The launches of a whole forward pass, recorded without a GPU: what the engine does, not what it was meant to do.

    plan = forward_plan(ViTConfig.preset("vit_base_patch16_224"), batch=64, dtype=torch.float16, device=H100)
    print([launch.kernel for launch in plan.launches], plan.other_work)

An ordinary `ViT` runs under the recording driver, so its launches are specialised and compiled for that GPU, and
nothing is executed. Its parameters and images are memory that nobody writes and hardly anybody reads, so that a batch
of 4096 through ViT-H costs address space and little else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from vit_bench.recording import Launch, recording
from vit_engine import ViT, ViTConfig
from vit_kernels.device import Device

# What PyTorch itself may do in a forward pass: look at memory in another shape, and reserve some.
_NO_WORK = ("aten.empty.memory_format", "aten.empty_strided.default", "aten.detach.default")


class OtherWork(TorchDispatchMode):
    """Notes operators that would do work on the device beside the kernels: copies, permutes, arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "vit_engine" and not func.is_view and str(func) not in _NO_WORK:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """Names of the kernels that Triton compiles (or takes from its disk cache) in this block, one per compilation."""
    names: list[str] = []

    def note(*, fn: Any, **_: Any) -> None:
        names.append(fn.name)

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before


@dataclass(frozen=True)
class Plan:
    """Two forward passes of one shape. launches, other_work: of the first, once parameters are folded; repeated: of the
    second, made again from the tape; compiled: kernels compiled for the first pass, recompiled: for the others."""

    launches: list[Launch]
    other_work: list[str]
    repeated: list[Launch]
    compiled: list[str]
    recompiled: list[str]


def in_unwritten_memory(model: nn.Module) -> Any:
    """A library's model moved from the meta device to the CPU, its values those of memory that nobody wrote. Only
    indices are set: positions in order, by which CLIP and SigLIP are recognised as plain, others to 0."""
    model = model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]))
        elif not buffer.is_floating_point():
            buffer.zero_()
    return model


def blank_model(config: ViTConfig, dtype: torch.dtype) -> ViT:
    """A ViT for the kernels on the CPU whose parameters are memory that was never written."""
    with torch.device("meta"):
        model = ViT(config, backend="torch").eval().to(dtype)
    return model.to_empty(device="cpu").set_backend("triton")


def blank_images(config: ViTConfig, batch: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(batch, config.in_channels, *config.image_hw, dtype=dtype)


@torch.no_grad()
def forward_plan(config: ViTConfig, batch: int, dtype: torch.dtype, device: Device) -> Plan:
    """What `ViT(config)` launches for `batch` images on `device`."""
    model, images = blank_model(config, dtype), blank_images(config, batch, dtype)
    with recording(device) as recorder:
        with counted_compilations() as compiled:
            model(images)
        recorder.launches.clear()
        with counted_compilations() as recompiled:
            model.replays.clear()
            with OtherWork() as other:
                model(images)
            launches = list(recorder.launches)
            for _ in range(2):
                model(images)
            recorder.launches.clear()
            model(images)
        return Plan(launches, other.seen, list(recorder.launches), compiled, recompiled)
