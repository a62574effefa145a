"""Which tiles the preset models get on a GPU, and a way to run a chosen tile on a small problem.

The tile choice picks large tiles only for problems that are too large to interpret or emulate. To run them all the
same, a small case is run with the choice replaced by that tile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
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
# Whose tiles count under a kernel, where that is not the launcher of its name alone.
_LAUNCHERS = {"linear": ("linear", "mlp")}
# Where the chooser takes the width that is compiled into the kernel.
_WIDTH_ARGUMENT = {"attention": 3, "mlp": 1, "qk_rope": 3}


@dataclass(frozen=True)
class Choice:
    """A tile that some model gets. width, gated: what else shapes the kernel that it is compiled into."""

    tile: Any
    width: int
    gated: bool

    def __str__(self) -> str:
        shape = " ".join(str(value) for value in vars(self.tile).values())
        return f"tile {shape}{f', width {self.width}' if self.width else ''}{', gated' if self.gated else ''}"


def all_choices(
    dtype: torch.dtype,
    device: Device,
    models: Sequence[str],
    kernels: Sequence[str] = tuple(CHOOSERS),
    batches: Sequence[int] = BATCHES,
) -> dict[str, list[Choice]]:
    """The distinct tiles of these launchers on `device`, over these models and batches and the families without a
    preset.

    The MLP's two GEMMs count under linear, whose kernel they are. Nothing is compiled or launched.
    """
    found: dict[str, dict[Choice, None]] = {kernel: {} for kernel in kernels}
    launchers = {kernel: _LAUNCHERS.get(kernel, (kernel,)) for kernel in kernels}
    calling = ""

    def noting(chosen_for: Sequence[str], original: Callable[..., Any]) -> Callable[..., Any]:
        def note(*arguments: Any, **options: Any) -> Any:
            tile = original(*arguments, **options)
            for kernel in chosen_for:
                if tile is not None and calling in launchers[kernel]:
                    width = arguments[_WIDTH_ARGUMENT[kernel]] if kernel in _WIDTH_ARGUMENT else 0
                    found[kernel][Choice(tile, width, bool(options.get("gated", False)))] = None
            return tile

        return note

    with contextlib.ExitStack() as stack:
        stack.enter_context(recording(device, torch_device="meta"))
        stack.enter_context(mock.patch.object(JITFunction, "run", return_value=None))
        for chooser in {CHOOSERS[kernel] for kernel in kernels}:
            chosen_for = [kernel for kernel in kernels if CHOOSERS[kernel] == chooser]
            stack.enter_context(mock.patch.object(*chooser, noting(chosen_for, getattr(*chooser))))
        for _, _, call in all_calls(models, batches, dtype):
            calling = call.kernel
            if any(calling in names for names in launchers.values()):
                call.run()
    return {kernel: list(choices) for kernel, choices in found.items()}


def shipped_choices(kernel: str, dtype: torch.dtype, device: Device, models: Sequence[str]) -> list[Choice]:
    """The same of one launcher, over all batches of the plan."""
    return all_choices(dtype, device, models, [kernel])[kernel]


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
