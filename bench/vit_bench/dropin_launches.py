"""What an accelerated model launches, beside what eager PyTorch would: recorded and counted, nothing executed.

Full-size models without values in half precision, one image. Ours are launches through the recording
driver, compiled for one GPU, and the operators of PyTorch that are left. Eager's are operators that compute: views and
allocations are left out, scaled_dot_product_attention counts once (a fused backend is one kernel, and two with a layout
change). A matrix product of cuBLAS may be more than one kernel, so eager's figure is a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vit_engine
from vit_bench.dropin_families import Family, inputs
from vit_bench.launch_plan import OtherWork, in_unwritten_memory
from vit_bench.recording import Launch, gpu, recording
from vit_engine.dropin.api import attached_to

__all__ = ["Compiled", "Launches", "OneAttention", "count_launches", "eager_operators", "forget_replays"]

# Neither computes anything: a view by another name, and memory.
_FREE = ("aten._unsafe_view.default", "aten.new_empty.default", "aten.lift_fresh.default", "aten.alias.default")


@dataclass(frozen=True)
class Launches:
    """Of one forward pass: kernels of ours, operators left to PyTorch beside them, and operators of eager PyTorch."""

    ours: int
    left: int
    eager: int


@dataclass(frozen=True)
class Compiled:
    """A model's kernels for one GPU. kernels: how many different ones; problems: spills, too much shared memory."""

    kernels: int
    problems: tuple[str, ...]


class OneAttention(TorchFunctionMode):
    """Counts scaled_dot_product_attention and takes its place: on meta tensors it would fall into its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        names = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, value = names["query"], names["value"]
        batch, heads, tokens, _ = query.shape
        # As fused backends lay out their result: heads beside each other, so that putting them together moves nothing.
        return torch.empty(
            batch, tokens, heads, value.shape[-1], dtype=query.dtype, device=query.device
        ).transpose(1, 2)  # fmt: skip


def eager_operators(model: nn.Module, given: dict[str, Tensor]) -> list[str]:
    """Names of the operators that compute in one forward pass."""
    with OneAttention() as attention, OtherWork() as work:
        _call(model, given)
    return [name for name in work.seen if name not in _FREE] + ["scaled_dot_product_attention"] * attention.calls


def _call(model: nn.Module, given: dict[str, Tensor]) -> None:
    model(given["images"], **{name: value for name, value in given.items() if name != "images"})


def forget_replays(model: nn.Module) -> None:
    """So that the next pass of an accelerated model runs as written."""
    for attached in attached_to(model):
        attached.replays.clear()


@torch.no_grad()
def count_launches(family: Family, gpu_names: Sequence[str] = ("sm_90",)) -> tuple[Launches, dict[str, Compiled]]:
    """The family's full-size model, eager and accelerated: its launches on the first GPU, its kernels for each."""
    with torch.device("meta"):
        model = family.full().eval().half()
    given = {k: v.half() if v.is_floating_point() else v for k, v in inputs(family, model, batch=1).items()}
    eager = None if family.patches else eager_operators(model, {k: v.to("meta") for k, v in given.items()})
    # Launches are made for tensors that have memory.
    model = in_unwritten_memory(model)
    if eager is None:  # Python code reads shapes and padding, so they need values
        eager = eager_operators(model, given)
    vit_engine.accelerate(model)
    launches, compiled = None, {}
    for name in gpu_names:
        with recording(gpu(name)) as recorder:
            if launches is None:
                _call(model, given)  # folds
                recorder.launches.clear()
            forget_replays(model)
            left = eager_operators(model, given)
            launches = launches or Launches(len(recorder.launches), len(left), len(eager))
            compiled[name] = _compiled(recorder.launches, gpu(name).shared_memory)
    assert launches is not None
    return launches, compiled


def _compiled(launches: Sequence[Launch], limit: int) -> Compiled:
    different = {id(launch.binary): launch for launch in launches}
    problems = []
    for launch in different.values():
        resources = launch.binary.resources
        if resources.spilled_bytes:
            problems.append(f"{launch.kernel}: {resources.spilled_bytes} bytes spilled per thread")
        if launch.shared > limit:
            problems.append(f"{launch.kernel}: {launch.shared} bytes of shared memory, {limit} allowed")
    return Compiled(len(different), tuple(problems))
