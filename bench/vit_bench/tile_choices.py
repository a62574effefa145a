"""Which tiles the preset models get on a GPU, and a way to run a chosen tile on a small problem.

The tile choice picks large tiles only for problems that are too large to interpret or emulate. To run them all the
same, a small case is run with the choice replaced by that tile.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from vit_bench.plan import BATCHES, all_calls
from vit_bench.recording import recording
from vit_kernels import attention_tiles, gemm_tiles, mlp_tiles, qk_rope_tiles, tiles
from vit_kernels.device import Device

# `vit_kernels.linear` is the launcher; this is the module it comes from.
linear_module = importlib.import_module("vit_kernels.linear")
attention_module = importlib.import_module("vit_kernels.attention")
patch_embed_module = importlib.import_module("vit_kernels.patch_embed")

CHOOSERS = {
    "patch_embed": (gemm_tiles, "choose_patch_embed"),
    "attention": (attention_tiles, "choose_attention"),
    "linear": (gemm_tiles, "choose_gemm"),
    "row_stats": (tiles, "choose_rows"),
    "layer_norm": (tiles, "choose_rows"),
    "mlp": (mlp_tiles, "choose_mlp"),
    "qk_rope": (qk_rope_tiles, "choose_qk_rope"),
}
# Where the chooser takes the width that is compiled into the kernel.
_WIDTH_ARGUMENT = {"attention": 3, "mlp": 1, "qk_rope": 3}


@dataclass(frozen=True)
class Choice:
    """A tile that some model gets. width, gated: what else shapes the kernel that it is compiled into."""

    tile: Any
    width: int
    gated: bool


def shipped_choices(kernel: str, dtype: torch.dtype, device: Device, models: Sequence[str]) -> list[Choice]:
    """The distinct tiles of one launcher on `device`, over the given models, the families without a preset, and all
    batches of the plan.

    The MLP's two GEMMs count under linear, whose kernel they are. Nothing is compiled or launched.
    """
    found: dict[Choice, None] = {}
    original = getattr(*CHOOSERS[kernel])

    def note(*arguments: Any, **options: Any) -> Any:
        tile = original(*arguments, **options)
        if tile is not None:
            width = arguments[_WIDTH_ARGUMENT[kernel]] if kernel in _WIDTH_ARGUMENT else 0
            found[Choice(tile, width, bool(options.get("gated", False)))] = None
        return tile

    launchers = ("linear", "mlp") if kernel == "linear" else (kernel,)
    with (
        recording(device, torch_device="meta"),
        mock.patch.object(JITFunction, "run", return_value=None),
        mock.patch.object(*CHOOSERS[kernel], note),
    ):
        for _, _, call in all_calls(models, BATCHES, dtype):
            if call.kernel in launchers:
                call.run()
    return list(found)


@contextmanager
def on_few_sms(count: int) -> Iterator[None]:
    """The launchers of `linear`, `attention` and `patch_embed` believe in a GPU with so many SMs, so that a program has
    several tiles of a small problem to walk over."""
    device_of = linear_module.device_of

    def smaller(x: torch.Tensor) -> Device:
        return dataclasses.replace(device_of(x), sm_count=count)

    with (
        mock.patch.object(linear_module, "device_of", smaller),
        mock.patch.object(attention_module, "device_of", smaller),
        mock.patch.object(patch_embed_module, "device_of", smaller),
    ):
        yield


@contextmanager
def forced(kernel: str, tile: Any) -> Iterator[None]:
    """Every launch of `kernel` in this block uses `tile`, whatever the problem."""
    with mock.patch.object(*CHOOSERS[kernel], return_value=tile):
        yield
