"""Every case once without a GPU and without a compiler: what would be launched, bound and specialised by Triton."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from vit_bench.launch_plan import blank_images, blank_model
from vit_bench.plan import DTYPES
from vit_bench.recording import Launch, recording
from vit_bench.timed.shapes import Case
from vit_engine import ViT, ViTConfig
from vit_kernels.device import Device

BLOCKS = 2  # of a model: the last, and one in front of it, whose launches the others make again


@functools.lru_cache(maxsize=1)
def _shallow(config: ViTConfig, dtype: torch.dtype) -> ViT:
    """Kept for the other batches of a model, which come next: to fold its weights takes longer than all the rest."""
    return blank_model(config, dtype)


@torch.no_grad()
def launches(case: Case, dtype: str, gpu: Device) -> list[Launch]:
    """The launches of one case on this GPU. Nothing is executed; their kernels are not compiled.

    Of a model they are the engine's own, of two blocks, in memory that nobody wrote. Everything else is on
    the meta device.
    """
    kind = DTYPES[dtype]
    if case.suite != "model":
        with recording(gpu, torch_device="meta", compiles=False) as recorder:
            for call in case.calls(kind):
                call.run()
        return recorder.launches
    assert case.config is not None
    config = replace(case.config, depth=BLOCKS)
    model = _shallow(config, kind)
    with recording(gpu, compiles=False) as recorder:
        model(blank_images(config, case.batch, kind))
    return recorder.launches
