"""What there is to tune in a model: the distinct questions that its launchers put to the tile choice, each as a case.

A call of a launcher is taken apart into its arguments' shapes, strides and options. From these come the problem, as it
will stand in a tuned file, and a `Case` with the same shapes and options whose values are drawn so that every parameter
matters, with its float64 reference.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import vit_kernels
from vit_bench.plan import model_calls
from vit_bench.recording import recording
from vit_bench.records import KERNELS
from vit_bench.tile_choices import CHOOSERS
from vit_bench.tuning_cases import case_of
from vit_bench.warmup import blank_images
from vit_engine import ViTConfig
from vit_kernels.device import Device
from vit_kernels.tiles import problem_of
from vit_kernels.tuned import key_of


@dataclass(frozen=True)
class LauncherCall:
    """One call of a launcher: its arguments by name, tensors on the meta device with their own strides."""

    kernel: str
    label: str
    arguments: dict[str, Any]


@dataclass
class Problem:
    """One question to a tile choice. fields: as in tuned files; call: a launcher call that asks it, case: the same with
    drawn values; default: what the tile choice models; device: the GPU it is asked for; labels: where it came up."""

    fields: dict[str, Any]
    call: LauncherCall
    default: Any
    device: Device
    labels: list[str] = field(default_factory=list)

    @property
    def kernel(self) -> str:
        return self.call.kernel

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.fields["dtype"])

    def __str__(self) -> str:
        shape = " ".join(f"{k}={v}" for k, v in self.fields.items() if type(v) is int)
        return f"{self.kernel} ({self.labels[0]}): {shape}" if self.labels else f"{self.kernel}: {shape}"

    def case(self) -> Any:
        return case_of(self.kernel, self.call.arguments, str(self))


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def taken_apart(kernel: str, label: str, arguments: Sequence[Any], options: dict[str, Any]) -> LauncherCall:
    """A call of the launcher of this name, from how it was called."""
    bound = inspect.signature(getattr(vit_kernels, kernel)).bind(*arguments, **options)
    bound.apply_defaults()
    return LauncherCall(kernel, label, {name: _on_meta(value) for name, value in bound.arguments.items()})


def flattened(run: Callable[[], object]) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments and options with which a `plan.Call` calls its launcher."""
    assert isinstance(run, partial)  # `plan` puts calls together so
    return run.args, run.keywords


def preset_calls(config: ViTConfig, batches: Sequence[int], dtype: torch.dtype) -> Iterator[LauncherCall]:
    """The launcher calls of `ViT(config)` and, with the same blocks, of accelerated models of other libraries."""
    for batch in batches:
        for call in model_calls(config, batch, dtype):
            yield taken_apart(call.kernel, f"{call.label}, batch {batch}", *flattened(call.run))


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Launchers do all but launch; what they return was never written."""
    with (
        mock.patch.object(JITFunction, "run", return_value=None),
        mock.patch.object(InterpretedFunction, "run", return_value=None),
    ):
        yield


@contextmanager
def noted_calls(label: str) -> Iterator[list[LauncherCall]]:
    """The launcher calls that the operators of `vit_engine` make in this block; nothing is launched."""
    calls: list[LauncherCall] = []

    def noting(kernel: str) -> Callable[..., Any]:
        original = getattr(vit_kernels, kernel)

        def note(*arguments: Any, **options: Any) -> Any:
            calls.append(taken_apart(kernel, label, arguments, options))
            return original(*arguments, **options)

        # `inspect.signature` follows it, and so do the calls that are taken apart meanwhile.
        note.__wrapped__ = original  # type: ignore[attr-defined]
        return note

    with ExitStack() as stack:
        stack.enter_context(nothing_launched())
        for kernel in KERNELS:
            stack.enter_context(mock.patch.object(vit_kernels, kernel, noting(kernel)))
        yield calls


@torch.no_grad()
def accelerated_calls(
    run: Callable[[torch.Tensor], object],
    size: tuple[int, int, int],
    batches: Sequence[int],
    dtype: torch.dtype,
    device: Device,
) -> Iterator[LauncherCall]:
    """The launcher calls of an accelerated model on the CPU, for a GPU like `device`.

    run: the model, or another entry point of it; size: channels, height and width of its images. Raises BatchError
    for more images than memory holds.
    """
    for batch in batches:
        images = blank_images(batch, size, dtype)
        with recording(device), noted_calls(f"batch {batch}") as calls:
            run(images)
        yield from calls


def _products_of(call: LauncherCall) -> list[LauncherCall]:
    """The two `linear` calls of an `mlp` of two launches."""
    module, found = importlib.import_module("vit_kernels.mlp"), []
    original = module.linear

    def note(*arguments: Any, **options: Any) -> Any:
        label = f"{call.label}, {('fc1', 'fc2')[len(found)]}"
        found.append(taken_apart("linear", label, arguments, options))
        return original(*arguments, **options)

    with mock.patch.object(module, "linear", note), mock.patch.object(*CHOOSERS["mlp"], return_value=None):
        vit_kernels.mlp(**call.arguments)
    return found


def _asked(call: LauncherCall, device: Device) -> list[Problem]:
    """What a launcher call asks its tile choice: one problem, or none where it has nothing to choose."""
    module, name = CHOOSERS[call.kernel]
    chooser, noted = getattr(module, name), call
    found: list[Problem] = []
    signature = inspect.signature(chooser)

    def note(*arguments: Any, call: Any = (), **options: Any) -> Any:
        default = chooser(*arguments, **options)  # without `call`: what is modelled, whatever is in use
        if call:
            fields = problem_of(signature, arguments, options, call)
            found.append(Problem(fields, noted, default, device, [noted.label]))
        return default

    with mock.patch.object(module, name, note):
        getattr(vit_kernels, call.kernel)(**call.arguments)
    # A norm may call row_stats, which asks the same tile choice.
    return [problem for problem in found if problem.fields["kernel"] == call.kernel]


def problems_of(calls: Sequence[LauncherCall], device: Device) -> list[Problem]:
    """The distinct problems of these calls for a GPU like `device`.

    One-kernel MLPs come last: what they are compared with, two products, should have been tuned by then.
    """
    found: dict[Any, Problem] = {}
    with recording(device, torch_device="meta"), nothing_launched():
        products = [product for call in calls if call.kernel == "mlp" for product in _products_of(call)]
        for call in (*calls, *products):
            for problem in _asked(call, device):
                known = found.setdefault(key_of(problem.fields), problem)
                if known is not problem:
                    known.labels.append(call.label)
    return sorted(found.values(), key=lambda problem: problem.kernel == "mlp")
