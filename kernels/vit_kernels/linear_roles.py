"""The kernel of `linear` for large products on sm_90, in Gluon: its warps have roles.

Two warpgroups multiply 64 rows of a tile each, and four warps finish what those have summed. Sums are handed over in
shared memory, rounded to 16 bits as a product of PyTorch's would be, so that what stands behind a product (norm, bias,
activation, LayerScale, residual, moments) is computed under the next one. While those that multiplied also finished,
the tensor cores rested for a third of the time (measured on an H100, fc1 of ViT-B at batch 64).

Beside 128 columns two more warps load operands and row statistics. Beside 256 there are no registers for these: with a
fourth warpgroup, 128 would be left at launch, which ptxas refuses for a product of 64 x 256. There those that multiply
load operands, slots ahead, and those that finish load statistics, a tile ahead. (Two finishing warps and two that load
fit, too, but took 119.6 us for that fc1, four and none 97.0, by measurements on an H100.)

A barrier's n-th use is waited for by its parity, n & 1. Nobody fills a place before everybody has let go of it:

    full[slot]   operands of a step have arrived, x and weights     empty[slot]   both warpgroups have multiplied them
    ready[turn]  statistics of a tile's rows have been written      spent[turn]   whoever multiplies or finishes has
    summed[half] sums of 64 rows have been written                  free[half]    they have been read

There is a slot more for x than for weights, because x is far away more often, and shared memory holds no more: 600
bytes are left of it. A step is BLOCK_K = 64 columns.

Sums are multiplied by rstd before they are rounded, so that fp16 holds them whatever the scale of x; `fold_norm`
centres the weights, so that a common offset of a row is not among what is rounded.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .ahead import fetch_ahead
from .linear_roles_finish import finish
from .linear_roles_load import load_operands, load_statistics
from .linear_roles_multiply import multiply
from .linear_roles_ring import HALVES, NARROW, ROWS, TURNS, barriers


# One compiled kernel for every number of rows, as `linear_kernel`.
@gluon.jit(do_not_specialize=["M", "split"])
def linear_roles_kernel(
    x_desc,  # [M, K] in blocks of [ROWS, BLOCK_K]
    w_desc,  # [N, K] in blocks of [BLOCK_N, BLOCK_K]
    narrow_w_desc,  # [N, K] in blocks of [NARROW, BLOCK_K]
    ahead_ptr,  # [N, K]: the weights, if they can be asked for ahead
    bias_ptr,  # [N], contiguous: with a stride that is not known here, Triton 3.6 loads its elements one by one
    stats_ptr,  # [2, partials, M]: row statistics of x
    column_sum_ptr,  # [N], fp32
    scale_ptr,  # [N], contiguous: LayerScale
    residual_ptr,  # [M, N]
    y_ptr,  # [M, N]
    y_stats_ptr,  # [2, N / 64, M]: row statistics of y
    M,
    N,
    K,
    split,
    stride_rm,
    eps,
    NORM: gl.constexpr,
    PARTIALS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    EMIT_STATS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """This program computes every P-th tile of y (of P programs), as `linear_kernel` would, and of the last `split`
    tiles its share in pieces of NARROW columns. Operands are of 16 bits, N is a multiple of NARROW, BLOCK_M is
    HALVES * ROWS.
    """
    if ahead_ptr is not None:
        fetch_ahead(ahead_ptr, N, K, OVERLAP)
    # Whoever loads waits for the launch before; all others work on what has been loaded.
    # Activations are fed half their input: see `activate_fast`.
    TIMES: gl.constexpr = 1.0 if ACTIVATION == "none" else 0.5  # type: ignore[reportAssignmentType]
    FLOATS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])  # type: ignore[reportAssignmentType]
    # Beside 256 columns there are no registers for warps that only load.
    ALONE: gl.constexpr = BLOCK_N == 256  # type: ignore[reportAssignmentType]
    SUMS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, NARROW], x_desc.dtype)  # type: ignore[reportAssignmentType]
    PIECES: gl.constexpr = HALVES * BLOCK_N // NARROW
    x_s = gl.allocate_shared_memory(x_desc.dtype, [(STAGES + 1) * HALVES, ROWS, BLOCK_K], x_desc.layout)
    w_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    sums_s = gl.allocate_shared_memory(x_desc.dtype, [PIECES, ROWS, NARROW], SUMS)
    vectors = (
        gl.allocate_shared_memory(gl.float32, [TURNS * HALVES, ROWS], FLOATS),
        gl.allocate_shared_memory(gl.float32, [TURNS * HALVES, ROWS], FLOATS),
    )
    ring = x_s, w_s, barriers(STAGES + 1, HALVES + 1), barriers(STAGES, HALVES)
    sums = sums_s, barriers(HALVES, 1), barriers(HALVES, 1)
    # Those that finish let go of statistics, too, unless they write them themselves.
    vector_bars = barriers(TURNS, 1), barriers(TURNS, HALVES + (1 if NORM == "layer" and not ALONE else 0))
    behind = bias_ptr, column_sum_ptr, scale_ptr, residual_ptr, stride_rm, y_ptr, y_stats_ptr
    descs = x_desc, w_desc, narrow_w_desc
    fence_async_shared()
    if ALONE:
        gl.warp_specialize(
            [
                (
                    multiply,
                    (
                        0, descs, ring, sums, vectors, vector_bars, M, N, K, split, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                        NORM, ALONE, OVERLAP,
                    ),
                ),
                (
                    multiply,
                    (
                        1, descs, ring, sums, vectors, vector_bars, M, N, K, split, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                        NORM, ALONE, OVERLAP,
                    ),
                ),
                (
                    finish,
                    (
                        behind, stats_ptr, sums, vectors, vector_bars, M, N, K, split, eps, BLOCK_M, BLOCK_N, GROUP_M,
                        NORM, PARTIALS, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, ALONE,
                        OVERLAP,
                    ),
                ),
            ],
            [4, 4],
            [168, 168],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    multiply,
                    (
                        0, descs, ring, sums, vectors, vector_bars, M, N, K, split, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                        NORM, ALONE, OVERLAP,
                    ),
                ),
                (
                    multiply,
                    (
                        1, descs, ring, sums, vectors, vector_bars, M, N, K, split, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                        NORM, ALONE, OVERLAP,
                    ),
                ),
                (
                    finish,
                    (
                        behind, stats_ptr, sums, vectors, vector_bars, M, N, K, split, eps, BLOCK_M, BLOCK_N, GROUP_M,
                        NORM, PARTIALS, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, ALONE,
                        OVERLAP,
                    ),
                ),
                (load_operands, (descs, ring, M, N, K, split, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, OVERLAP)),
                (
                    load_statistics,
                    (
                        stats_ptr, vectors, vector_bars, M, N, K, split, eps, BLOCK_M, BLOCK_N, GROUP_M, NORM, PARTIALS,
                        TIMES, OVERLAP,
                    ),
                ),
            ],
            [4, 4, 1, 1],
            [104, 152, 152, 152],
        )  # fmt: skip
