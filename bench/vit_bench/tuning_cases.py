"""A case with the shapes, strides and options of a launcher call, its values drawn so that every parameter matters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vit_bench.case_inputs import Inputs
from vit_bench.cases import Case
from vit_bench.draw import Draw

_NORMED = ("linear", "mlp")
_RESULTS_ONLY = ("emit_stats", "return_lse", "tf32", "fused")
# What the launcher takes in a form that `cases.launcher_call` makes from the reference's inputs.
_DERIVED = ("stats", "column_sum")


def _same_layout(drawn: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if drawn.stride() == like.stride():
        return drawn
    placed = torch.empty_strided(like.shape, like.stride(), dtype=drawn.dtype, device=drawn.device)
    return placed.copy_(drawn)


def _drawn(kernel: str, name: str, like: torch.Tensor, draw: Draw, normed: bool) -> torch.Tensor:
    """A tensor of this shape, as one of this name should be."""
    shape = tuple(like.shape)
    if like.dtype == torch.bool:
        mask = draw.chance(0.7, *shape)
        mask[..., 0] = True  # a query that may attend to nothing is a case of its own
        return mask
    if like.dtype == torch.uint8:
        return draw.integers(0, 256, *shape, dtype=torch.uint8)
    if not like.is_floating_point():
        return draw.integers(1, 2**15, *shape, dtype=like.dtype)
    if name in ("mean", "std"):
        return torch.linspace(0.2, 0.5, shape[0], device=draw.device)
    if name in ("cos", "sin"):
        angles = 3 * Draw(torch.float32, draw.device, seed=1).normal(*shape)
        return (angles.cos() if name == "cos" else angles.sin()).to(like.dtype)
    if kernel in ("layer_norm", "qk_rope") and "weight" in name:
        return draw.gamma(shape[0])
    if name == "layer_scale":
        return draw.layer_scale(shape[0])
    if name == "residual" or (name == "x" and (normed or kernel in ("row_stats", "layer_norm"))):
        return draw.rows(*shape)
    if "bias" in name:
        return draw.bias(shape[0])
    return draw.weight(*shape) if "weight" in name else draw.normal(*shape)


def _layout_matters(kernel: str, name: str) -> bool:
    """Folding gives weights of its own layout; everything else is passed on as it is drawn."""
    return not (kernel in _NORMED and name in ("weight", "fc1_weight"))


def case_of(kernel: str, arguments: Mapping[str, Any], name: str) -> Case:
    """The case of a launcher call. arguments: all of them by name, tensors of any device for their shapes."""
    norm = arguments.get("norm", "none") if kernel in _NORMED else "none"
    tensors = {n: v for n, v in arguments.items() if isinstance(v, torch.Tensor) and n not in _DERIVED}

    def inputs(draw: Draw) -> Inputs:
        made: Inputs = {}
        for argument, like in tensors.items():
            value = _drawn(kernel, argument, like, draw, norm != "none")
            made[argument] = _same_layout(value, like) if _layout_matters(kernel, argument) else value
        if norm != "none":
            made["norm_weight"] = draw.gamma(made["x"].shape[1])
        if norm == "layer":
            made["norm_bias"] = draw.bias(made["x"].shape[1])
        return made

    values = {n: v for n, v in arguments.items() if not isinstance(v, torch.Tensor) and n not in _DERIVED}
    launch_options = {n: v for n, v in values.items() if n in _RESULTS_ONLY and v not in (None, False)}
    stats = arguments.get("stats")
    if kernel in _NORMED and stats is not None and stats.shape[1] > 1:
        launch_options["partial_stats"] = True
    # What is None is the default of the reference, too.
    options = {n: v for n, v in values.items() if n not in _RESULTS_ONLY and v is not None}
    return Case(kernel, name, inputs, options, launch_options)
