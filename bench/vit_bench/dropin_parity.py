"""An accelerated model beside itself untouched: logits and all hidden states, in float32 and by the tolerance rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vit_engine
from vit_bench import tolerance
from vit_bench.dropin_families import Family, inputs, small_model
from vit_engine.dropin.describe import class_name
from vit_engine.dropin.parts import BLOCKS

__all__ = ["Outputs", "compare_half", "relative_error", "require_the_same", "run"]

Outputs = dict[str, Tensor]


@contextmanager
def _hidden_states(model: nn.Module) -> Iterator[Outputs]:
    """What every encoder block returns, by the block's name, while the context lasts."""
    seen: Outputs = {}
    handles = []
    for name, part in model.named_modules():
        if class_name(part) in BLOCKS:

            def note(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
                seen[name] = output

            handles.append(part.register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _results(output: Any) -> Outputs:
    """The floating-point tensors of a model's output by name."""
    if isinstance(output, Tensor):
        return {"logits": output}
    return {k: v for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point() and k != "mask"}


@torch.no_grad()
def run(model: nn.Module, given: dict[str, Tensor], like: Tensor | None = None) -> Outputs:
    """The model's results for these inputs, once as it is and once more with hooks on its blocks.

    like: the dtype of what is floating point, and the device; None leaves both. On a GPU passes are repeated from the
    third on; AssertionError if that gives other bits.
    """
    if like is not None:
        given = {k: v.to(like.device, like.dtype if v.is_floating_point() else v.dtype) for k, v in given.items()}
    images = given["images"]
    more = {name: value for name, value in given.items() if name != "images"}
    # Convolutions that stay PyTorch's round fp32 to tf32 on a GPU unless told otherwise.
    with torch.backends.cudnn.flags(allow_tf32=False):
        results = _results(model(images, **more))
        if images.is_cuda:
            require_the_same(results, lambda: _results(model(images, **more)))
        with _hidden_states(model) as seen:
            model(images, **more)
    return {name: value.cpu() for name, value in (results | seen).items()}


def require_the_same(results: Outputs, again: Callable[[], Outputs], passes: int = 3) -> None:
    """AssertionError unless more passes give these results bit for bit."""
    for number in range(2, 2 + passes):
        for name, value in again().items():
            if not torch.equal(value, results[name]):
                raise AssertionError(f"{name} of pass {number} is not that of the first pass, bit for bit")


def relative_error(ours: Outputs, truth: Outputs) -> float:
    """The largest difference of any result over the largest magnitude of that result."""
    if ours.keys() != truth.keys():
        raise AssertionError(f"results differ: {sorted(ours)} and {sorted(truth)}")
    return max(
        float((ours[name].double() - value.double()).abs().max() / value.double().abs().max())
        for name, value in truth.items()
    )


@dataclass(frozen=True)
class Half:
    """Worst relative L2 error of a row over all results, against float64: ours, the library's own, what is allowed."""

    ours: float
    eager: float
    allowed: float


def compare_half(family: Family, dtype: torch.dtype = torch.float16, device: str | torch.device = "cpu") -> Half:
    """Accelerated and eager in a 16-bit dtype against the same rounded weights in float64; AssertionError beyond twice
    the library's own error (see `vit_bench.tolerance`)."""
    eager_model = small_model(family).to(dtype)
    truth_model = copy.deepcopy(eager_model).double()
    ours_model = vit_engine.accelerate(copy.deepcopy(eager_model).to(device))
    given = inputs(family, eager_model)
    rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    ours = run(ours_model, rounded, torch.empty(0, dtype=dtype, device=device))
    eager, truth = run(eager_model, rounded), run(truth_model, rounded, torch.empty(0, dtype=torch.float64))
    _require_kernels(family, ours_model)
    if not ours.keys() == eager.keys() == truth.keys():
        raise AssertionError(f"results differ: {sorted(ours)}, {sorted(eager)} and {sorted(truth)}")
    errors = [tolerance.check(ours[n], eager[n], truth[n], name=f"{family}, {n}") for n in truth]
    return Half(max(e.row for e in errors), max(e.row_eager for e in errors), max(e.row_allowed for e in errors))


def compare_float32(family: Family, device: str | torch.device = "cpu") -> float:
    """Relative error of an accelerated model's results in float32 against the untouched model's; AssertionError if a
    block did not run on the kernels."""
    model = small_model(family)
    given = inputs(family, model)
    truth = run(model, given)
    vit_engine.accelerate(model.to(device))
    ours = run(model, given, torch.empty(0, device=device))
    _require_kernels(family, model)
    return relative_error(ours, truth)


def _require_kernels(family: Family, model: nn.Module) -> None:
    """AssertionError unless every block runs on the kernels."""
    for row in _rows(model):
        if row.kernels == "PyTorch":
            raise AssertionError(f"{family}: {row.module} did not run on the kernels: {row.why}")


def _rows(model: nn.Module) -> list[Any]:
    from vit_engine.dropin.api import attached_to
    from vit_engine.dropin.explain import explanation_of

    names = {name for name, part in model.named_modules() if class_name(part) in BLOCKS}
    return [row for row in explanation_of(model, list(attached_to(model))).rows if row.module in names]
