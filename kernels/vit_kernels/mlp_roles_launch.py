"""The launch of `mlp_roles_kernel`."""

from __future__ import annotations

import torch
import triton

from . import mlp_tiles
from .device import device_of
from .launch import describable, describe_in_gluon, launch
from .linear_roles_ring import NARROW
from .mlp_roles import mlp_roles_kernel


def all_describable(*tensors: torch.Tensor | None) -> bool:
    """Whether `describe` has all that are given."""
    return all(tensor is None or describable(tensor) for tensor in tensors)


def launch_mlp_roles(
    tile: mlp_tiles.MlpTile,
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    norm: str,
    stats: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    eps: float,
    activation: str,
    layer_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    y_stats: torch.Tensor | None,
) -> None:
    """Writes y and its row statistics; arguments as in `mlp`, checked, with statistics of x given if there is a norm,
    and that by `kernel_norm`.

    Raises ValueError for a tile that does not fit the problem.
    """
    m, width = x.shape
    hidden = fc2_weight.shape[1]
    described = all_describable(x, fc1_weight, fc2_weight, residual)
    if activation == "swiglu" or not mlp_tiles.may_have_roles(
        tile, width, hidden, x.element_size(), device_of(x), described=described
    ):
        raise ValueError(f"a tile whose warps have roles does not fit this problem: {tile}, {m} x {width} x {hidden}")
    narrow = NARROW.value
    main = min(width, 128)
    rows, w1, w2, tail, behind, result = (
        None if tensor is None else describe_in_gluon(tensor, block, narrow)
        for tensor, block in (
            (x, narrow), (fc1_weight, narrow), (fc2_weight, main),
            (fc2_weight if width > main else None, narrow), (residual, narrow), (y, narrow),
        )
    )  # fmt: skip
    launch(
        x, mlp_roles_kernel, triton.cdiv(m, tile.block_m), rows, w1, w2, tail, behind, result,
        fc1_bias, stats, column_sum, fc2_bias, layer_scale, y_stats, m,
        *(0 if vector is None else vector.stride(0) for vector in (fc1_bias, fc2_bias, layer_scale)), eps,
        NORM=norm, PARTIALS=1 if stats is None else stats.shape[1], ACTIVATION=activation,
        HAS_BIAS1=fc1_bias is not None, HAS_BIAS2=fc2_bias is not None, HAS_SCALE=layer_scale is not None,
        HAS_RESIDUAL=residual is not None, EMIT_STATS=y_stats is not None, WIDTH=width, HIDDEN=hidden,
        BLOCK_M=tile.block_m, KEPT=tile.kept, STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
