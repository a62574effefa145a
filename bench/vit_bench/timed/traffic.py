"""What a forward pass moves through the GPU's memory and holds there, and in how many launches: counted, not modelled.

Activations are counted in elements per token, in units of the model's width D. An operand counts once per launch that
reads or writes it, whatever the caches may spare; weights are kept apart, because a batch shares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vit_bench.dropin_launches import OneAttention
from vit_bench.inspection import tensors_of
from vit_bench.launch_plan import OtherWork, blank_images, blank_model
from vit_bench.memory import Forgotten, peak_of
from vit_bench.plan import DTYPES
from vit_bench.recording import Launch, recording
from vit_bench.roofline import operand_bytes
from vit_engine import ViT, ViTConfig
from vit_kernels.device import Device

# What grows with the number of tokens among the arguments of our kernels. Everything else is a weight.
_ACTIVATIONS = (
    *("x", "x_ptr", "x_desc", "wide_desc", "sums_ptr", "residual_ptr", "residual_desc", "y_ptr", "y_desc"),
    *("stats_ptr", "y_stats_ptr"),
    *("q_ptr", "k_ptr", "v_ptr", "o_ptr", "lse_ptr", "q_desc", "k_desc", "v_desc", "o_desc"),
)

# Counted elsewhere, once, from the code that torch.compile generated; quoted, not counted here.
QUOTED = {
    "torch.compile": {
        "launches": 8,
        "activations": 36.0,
        "quoted for": "timm's ViT-B/16 with PyTorch 2.14: from this project's design, not counted in this run",
    }
}


def _activations(launch: Launch) -> list[Tensor]:
    named = zip(launch.names, launch.values, strict=True)
    return tensors_of(tuple(value for name, value in named if name in _ACTIVATIONS))


@torch.no_grad()
def _recorded(config: ViTConfig, depth: int, batch: int, dtype: torch.dtype, gpu: Device) -> list[Launch]:
    """The launches of a forward pass of the engine itself, with its weights folded before."""
    shallow = replace(config, depth=depth)
    model, images = blank_model(shallow, dtype), blank_images(shallow, batch, dtype)
    with recording(gpu, compiles=False) as recorder:
        model(images)
        recorder.launches.clear()
        model.replays.clear()
        model(images)
        return recorder.launches


@torch.no_grad()
def forward_peak(config: ViTConfig, batch: int, dtype: torch.dtype, gpu: Device) -> int:
    """Most bytes of tensors that a repeated forward pass of the engine holds beyond images and weights.

    From recorded allocations (`vit_bench.memory`), of two blocks: the peak lies inside one.
    """
    shallow = replace(config, depth=2)
    model, images = blank_model(shallow, dtype), blank_images(shallow, batch, dtype)
    with recording(gpu, compiles=False) as recorder:
        recorder.launches = Forgotten()
        for _ in range(4):
            model(images)
        return peak_of(lambda: model(images), operators=False).nbytes


def block_launches(config: ViTConfig, batch: int, dtype: torch.dtype, gpu: Device) -> list[Launch]:
    """The launches of one encoder block: those by which two blocks are more than one, behind the stem's launch."""
    one, two = (_recorded(config, depth, batch, dtype, gpu) for depth in (1, 2))
    return two[1 : 1 + len(two) - len(one)]


def launches_traffic(launches: Sequence[Launch], tokens: int, width: int, element: int) -> dict[str, Any]:
    """activations: elements read and written per token over D; weight_bytes: read once per call.

    tokens: of all images; element: bytes of an element. Row statistics count by their bytes.
    """
    moved = weights = 0
    for launch in launches:
        activations = _activations(launch)
        known = {id(tensor) for tensor in activations}
        moved += operand_bytes(activations)
        weights += operand_bytes(t for t in tensors_of(launch.values) if id(t) not in known)
    return {
        "launches": len(launches),
        "activations": moved / (tokens * width * element),
        "weight_bytes": weights,
    }


class _Moved(OtherWork):
    """Bytes of the tensors that eager operators read and write, parameters apart; attention counts as one operator."""

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self.nbytes = 0
        self._parameters = parameters

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.seen)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.seen) > before:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.nbytes += operand_bytes(t for t in tensors if t.untyped_storage()._cdata not in self._parameters)
        return result


@torch.no_grad()
def eager_traffic(config: ViTConfig, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """The same of one block of the torch backend, whose operators are those of timm's block, on the meta device."""
    with torch.device("meta"):
        model = ViT(replace(config, depth=1), backend="torch").eval().to(dtype)
    block, tokens, width = model.blocks[0], batch * config.num_tokens, config.embed_dim
    x = torch.empty(batch, config.num_tokens, width, dtype=dtype, device="meta")
    parameters = {p.untyped_storage()._cdata for p in block.parameters()}
    with OneAttention() as attention, _Moved(parameters) as moved:
        block(x)
    # q, k, v are read and o is written; OneAttention stands in front of the operators and counts no bytes.
    nbytes = moved.nbytes + attention.calls * 4 * tokens * width * dtype.itemsize
    return {
        "operators": len(moved.seen) + attention.calls,
        "activations": nbytes / (tokens * width * dtype.itemsize),
        "weight_bytes": operand_bytes(block.parameters()),
    }


def block_traffic(config: ViTConfig, batch: int, dtype: str, gpu: Device) -> dict[str, Any]:
    """One encoder block by ours (recorded launches), by eager PyTorch (operators on meta tensors), and as quoted."""
    kind = DTYPES[dtype]
    launches = block_launches(config, batch, kind, gpu)
    ours = launches_traffic(launches, batch * config.num_tokens, config.embed_dim, kind.itemsize)
    ours["kernels"] = [launch.kernel for launch in launches]
    return {"ours": ours, "eager": eager_traffic(config, batch, kind), "quoted": QUOTED}
