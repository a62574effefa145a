"""Linear layer with everything around it fused in: y = residual + layer_scale * act(norm(x) W^T + b).

The normalisation in front is folded (see folding.py): the K loop is a plain matrix product of x and W', and

    norm(x) W^T + b = rstd (x W'^T - mean c) + d

is finished per row in the epilogue, from the row statistics that the producer of x left behind. (In fp32 the mean is
subtracted from x on its way into the product instead, which is exact to the last bits and costs little there.)
"""

from __future__ import annotations

import torch
import triton

from . import gemm_tiles, tiles, with_torch
from .ahead import fetchable
from .checks import (
    check_choice,
    check_eps,
    check_flag,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_tf32,
    check_vector,
)
from .device import device_of
from .launch import allocate, describable, describe, describe_in_gluon, launch
from .linear_columns import SHARED_SM_REGISTERS, linear_columns_kernel
from .linear_kernels import linear_kernel, linear_tma_kernel
from .linear_parts import linear_parts_kernel, linear_sum_kernel
from .linear_roles import linear_roles_kernel
from .linear_roles_ring import NARROW, ROWS
from .linear_staying import linear_staying_kernel
from .norm import emitted_stats
from .primitives import MANY_PARTIALS, STATS_COLUMNS

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu")
NORMS = ("none", "layer", "rms")


def stats_partials(columns: int) -> int:
    """Partials of the statistics that a GEMM emits for rows of this many columns: one per 64."""
    return tiles.cdiv(columns, STATS_COLUMNS.value)


def kernel_norm(norm: str, column_sum: torch.Tensor | None, dtype: torch.dtype) -> str:
    """"centred" for a LayerNorm whose weights leave nothing of a row's mean: rows are scaled alone. (Those of fp32 are
    centred in front of the product.)"""
    return "centred" if norm == "layer" and column_sum is None and dtype != torch.float32 else norm


def check_norm(
    norm: str,
    stats: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    rows: int,
    columns: int,
    outputs: int,
    *,
    stats_optional: bool = False,
) -> None:
    """The arguments of a folded normalisation: row statistics of x [rows, columns] and the folded weights' sums."""
    check_choice("norm", norm, NORMS)
    if norm == "none":
        for name, value in (("stats", stats), ("column_sum", column_sum)):
            if value is not None:
                raise ValueError(f"{name} belongs to norm='layer' or 'rms'; got it with norm='none'")
        return
    if stats is None and not stats_optional:
        raise ValueError(f"stats is needed for norm={norm!r}: pass row_stats(x) or what the producer of x emitted")
    if stats is not None:
        check_tensor("stats", stats)
        allowed = {1, stats_partials(columns)}
        if stats.dtype != torch.float32 or stats.ndim != 3 or not stats.is_contiguous():
            raise ValueError(
                f"stats must be contiguous fp32 [2, partials, {rows}]; got {stats.dtype} {tuple(stats.shape)}"
            )
        if stats.shape[0] != 2 or stats.shape[1] not in allowed or stats.shape[2] != rows:
            partials = " or ".join(str(t) for t in sorted(allowed))
            raise ValueError(f"stats must have shape (2, {partials}, {rows}); got {tuple(stats.shape)}")
    if column_sum is None:
        return
    check_vector("column_sum", column_sum, outputs, "the rows of the folded weight")
    if column_sum.dtype != torch.float32 or not column_sum.is_contiguous():
        raise ValueError(f"column_sum must be contiguous fp32, as fold_norm returns it; got {column_sum.dtype}")


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: str = "none",
    stats: torch.Tensor | None = None,
    column_sum: torch.Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    layer_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    emit_stats: bool = False,
    tf32: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = residual + layer_scale * act(norm(x) W^T + b), accumulated in fp32 and rounded once.

    (In large products of 16 bits on sm_90 the product itself, x W^T or rstd x W'^T with a norm, is rounded as well, as
    PyTorch's products are; all behind it is computed in fp32.)

    x [M, K], weight [N, K] of one dtype (fp32, fp16, bf16), any strides; bias, layer_scale [N] of any supported dtype;
    residual [M, N] in the dtype of x. Returns y [M, N] contiguous, or (y, stats) with emit_stats.

    norm "layer" or "rms" normalises the rows of x first: weight, column_sum and bias must come from `fold_norm`, stats
    [2, T, M] from `row_stats(x)` or from the `linear` or `patch_embed` that produced x, and eps is the norm's own.
    column_sum=None says that the rows of weight sum to nothing, as they do from `fold_norm(sums=False)`.
    activation: "none", "gelu" (erf), "gelu_tanh", "quick_gelu" (x sigmoid(1.702 x)), "silu", or "swiglu", for which
    weight is [2N, K] and the result silu(first N) * (last N). In fp16 and bf16 the activations use the hardware's tanh.
    emit_stats: also returns the row statistics of y as stored, [2, ceil(N / 64), M] fp32, for the next norm.
    tf32: lets fp32 products round their operands to tf32; the default is IEEE fp32.

    One launch, or two where few rows meet a long K (linear_parts.py). The same call gives the same bits every time.

    Raises TypeError or ValueError that names the argument, UnsupportedDeviceError for tensors the kernels cannot reach.
    Source: arXiv 2010.11929, equations 2 and 3; the fold is derived in folding.py.
    """
    check_floating("x", x, 2)
    check_floating("weight", weight, 2)
    check_same_dtype("weight", weight, "x", x.dtype)
    check_choice("activation", activation, ACTIVATIONS)
    check_eps(eps)
    check_flag("emit_stats", emit_stats)
    precision = check_tf32(tf32, x.dtype)
    m, k = x.shape
    outputs = weight.shape[0]
    gated = activation == "swiglu"
    if weight.shape[1] != k:
        raise ValueError(f"weight must have K = {k} columns like x; got shape {tuple(weight.shape)}")
    if gated and outputs % 2:
        raise ValueError(f"weight must have an even number of rows for swiglu (gate and value); got {outputs}")
    if k == 0 or outputs == 0:
        raise ValueError(f"weight must have at least one row and one column; got shape {tuple(weight.shape)}")
    n = outputs // 2 if gated else outputs
    check_vector("bias", bias, outputs, "the rows of weight")
    check_vector("layer_scale", layer_scale, n, "the columns of y")
    if residual is not None:
        check_floating("residual", residual, 2)
        check_same_dtype("residual", residual, "x", x.dtype)
        check_shape("residual", residual, (m, n), "the shape of y")
    check_norm(norm, stats, column_sum, m, k, outputs)
    others = {"weight": weight, "bias": bias, "stats": stats, "column_sum": column_sum, "layer_scale": layer_scale}
    check_same_device("x", x, others | {"residual": residual})

    tile, partials = None, 1 if stats is None else stats.shape[1]
    if m > 0:
        call = tiles.described(
            "linear", x.dtype, norm=norm, partials=partials, activation=activation, bias=bias, layer_scale=layer_scale,
            residual=residual, emit_stats=emit_stats, row_stride=x.stride(0),
        )  # fmt: skip
        described = describable(x) and describable(weight) and (residual is None or describable(residual))
        described = described and all(v is None or v.stride(0) == 1 for v in (bias, layer_scale))
        tile = gemm_tiles.choose_gemm(
            m, n, k, x.element_size(), device_of(x), gated=gated, tf32=tf32, described=described,
            activation=activation, residual=residual is not None, call=call,
        )  # fmt: skip
    if tile is tiles.TORCH:
        y = with_torch.linear(
            x, weight, bias, norm=norm, eps=eps, activation=activation, layer_scale=layer_scale, residual=residual
        )
        return (y, emitted_stats(y)) if emit_stats else y
    y = allocate(x, (m, n))
    y_stats = allocate(x, (2, stats_partials(n), m), torch.float32) if emit_stats else None
    if tile is not None:
        if emit_stats:
            gemm_tiles.check_statistics(tile)
        programs = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
        ahead, tensors = fetchable(weight), (bias, stats, column_sum, layer_scale, residual, y, y_stats)
        strides = (
            0 if bias is None else bias.stride(0), 0 if layer_scale is None else layer_scale.stride(0),
            *((0, 0) if residual is None else residual.stride()),
        )  # fmt: skip
        constants: dict[str, object] = {
            "NORM": kernel_norm(norm, column_sum, x.dtype), "PARTIALS": partials,
            "ACTIVATION": activation, "FAST": x.dtype != torch.float32,
            "HAS_BIAS": bias is not None, "HAS_SCALE": layer_scale is not None, "HAS_RESIDUAL": residual is not None,
            "EMIT_STATS": emit_stats, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m, "CHUNK": tile.chunk, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        }  # fmt: skip
        if tile.parts > 1:
            fits = gemm_tiles.may_share(tile, m, n, k, x.element_size(), device_of(x), gated=gated, described=described)
            if not fits:
                raise ValueError(f"a tile that shares out K does not fit this problem: {tile}, {m} x {n} x {k}")
            sums = _launch_parts(tile, x, weight, ahead)
            del constants["FAST"], constants["BLOCK_K"], constants["GROUP_M"], constants["CHUNK"]
            rows, columns = gemm_tiles.SUM_ROWS, gemm_tiles.SUM_COLUMNS
            constants |= {"PARTS": tile.parts, "BLOCK_M": rows, "BLOCK_N": columns, "num_warps": 4, "num_stages": 1}
            launch(
                x, linear_sum_kernel, triton.cdiv(m, rows) * triton.cdiv(n, columns), sums, *tensors, m, n, k, *strides,
                eps, **constants,
            )  # fmt: skip
        elif tile.roles:
            slots = gemm_tiles.ring_slots(tile, k)
            fits = gemm_tiles.may_have_roles(n, x.element_size(), device_of(x), gated=gated, described=described)
            if not fits or slots < 2:
                raise ValueError(f"a tile whose warps have roles does not fit this problem: {tile}, {m} x {n} x {k}")
            x_blocks, *weights = (
                describe_in_gluon(t, rows, tile.block_k)
                for t, rows in ((x, ROWS.value), (weight, tile.block_n), (weight, NARROW.value))
            )
            del constants["FAST"], constants["CHUNK"]
            if k > n:
                # The launch before wrote more than L2 holds, and what it wrote last is there still.
                constants["GROUP_M"] = -tile.group_m
            launch(
                x, linear_roles_kernel, min(programs, device_of(x).sm_count), x_blocks, *weights, ahead, *tensors,
                m, n, k, gemm_tiles.split_tiles(tile, m, n, device_of(x).sm_count), strides[2], eps,
                STAGES=slots, **constants,
            )  # fmt: skip
        elif tile.staying:
            steps, slots = gemm_tiles.staying_slots(tile, k)
            fits = gemm_tiles.may_have_roles(n, x.element_size(), device_of(x), gated=gated, described=described)
            if not fits or not steps:
                raise ValueError(f"a tile whose weights stay does not fit this problem: {tile}, {m} x {n} x {k}")
            for name in ("FAST", "CHUNK", "GROUP_M"):
                del constants[name]
            programs, left = gemm_tiles.staying_programs(tile, m, n, device_of(x).sm_count)
            launch(
                x, linear_staying_kernel, programs, describe_in_gluon(x, ROWS.value, tile.block_k),
                describe_in_gluon(weight, tile.block_n, tile.block_k), ahead, *tensors, m, n, k, left, strides[2], eps,
                STAGES=slots, STEPS=steps, **constants,
            )  # fmt: skip
        elif tile.columns:
            fits = gemm_tiles.may_have_roles(n, x.element_size(), device_of(x), gated=gated, described=described)
            if not fits or n % tile.block_n:
                raise ValueError(f"a tile whose rows are columns does not fit this problem: {tile}, {m} x {n} x {k}")
            for name in ("FAST", "CHUNK", "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_stages"):
                del constants[name]
            if tile.tma > 1:
                constants["maxnreg"] = SHARED_SM_REGISTERS
            launch(
                x, linear_columns_kernel, programs, describe_in_gluon(weight, tile.block_n, tile.block_k),
                *(describe_in_gluon(x, rows, tile.block_k) for rows in gemm_tiles.wide_and_tail(tile)), ahead,
                *tensors, m, n, k, strides[2], eps, STAGES=tile.num_stages, **constants,
            )  # fmt: skip
        elif tile.tma:
            # Code for both, and for a loop over many partials, is more than the registers hold.
            halves = gemm_tiles.may_halve(tile) and partials <= MANY_PARTIALS.value
            halved = gemm_tiles.halved_tiles(tile, m, n, device_of(x).sm_count) if halves else 0
            x_halves = describe(x, tile.block_m // 2, tile.block_k) if halves else None
            x_blocks, w_blocks = describe(x, tile.block_m, tile.block_k), describe(weight, tile.block_n, tile.block_k)
            launch(
                x, linear_tma_kernel, min(programs + halved, tile.tma * device_of(x).sm_count),
                x_blocks, x_halves, w_blocks, ahead, *tensors, m, n, k, halved, *strides, eps,
                EARLY=gemm_tiles.loads_early(tile, gated=gated), HALVES=halves, **constants,
            )  # fmt: skip
        else:
            launch(
                x, linear_kernel, programs, x, weight, ahead, *tensors, m, n, k, *x.stride(), *weight.stride(),
                *strides, eps, EVEN_K=k % tile.block_k == 0, PRECISION=precision, **constants,
            )  # fmt: skip
    return y if y_stats is None else (y, y_stats)


def _launch_parts(
    tile: gemm_tiles.GemmTile, x: torch.Tensor, weight: torch.Tensor, ahead: torch.Tensor | None
) -> torch.Tensor:
    """Launches what sums x W^T over the parts of K; returns the sums [parts, M, N], fp32."""
    m, k = x.shape
    n = weight.shape[0]
    sums = allocate(x, (tile.parts, m, n), torch.float32)
    programs = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n) * tile.parts
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    operands = x, weight
    if tile.tma:
        operands = describe(x, tile.block_m, tile.block_k), describe(weight, tile.block_n, tile.block_k)
    launch(
        x, linear_parts_kernel, programs, *operands, ahead, sums, m, n, k, tile.parts, *x.stride(), *weight.stride(),
        DESCRIBED=tile.tma > 0, num_warps=tile.num_warps, num_stages=tile.num_stages, **blocks,
    )  # fmt: skip
    return sums
