"""The kernel of `linear` for large products on sm_90, in Gluon: its warps have roles.

One warp loads operands, two load the vectors that finish a tile, and two or three warpgroups multiply, 64 rows of a
tile each. They go through the ring of operands one behind the other, so that one multiplies while another finishes its
rows. Behind the last step of a tile each of the first two gets a slot of the ring for itself: its residual arrives
there, and its results leave from there. The third has a place of its own for these, because slots must be left to load.

In tiles of 256 columns, two warpgroups go together, as one role of eight warps: the code that ends 64 rows is 22 KB,
and an SM that runs a copy for each warpgroup waits for instructions a third of that time (sampled on an H100; fc1 of
ViT-B at batch 64 took 113 us with two copies, 105 with one). Each of their two slots has half of the columns.

A barrier's n-th use is waited for by its parity, n & 1. Nobody fills a slot before everybody has let go of it:

    full[slot]   operands of a step, or a residual, have arrived     empty[slot]  who uses them has used them
    ready[turn]  vectors of a tile have been written                 spent[turn]  all warpgroups have read them
    third        full and empty, of the third warpgroup's place

A step is BLOCK_K = 64 columns: only then is a slot's place for weights that of the results of 64 rows. Numbers of
elements are powers of two, so a tile of 192 columns is one of 128 and a tail of 64, with sums and weights of its own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .ahead import fetch_ahead
from .linear_roles_load import VECTOR_WARPS, load_operands, load_vectors
from .linear_roles_multiply import multiply
from .linear_roles_ring import NARROW, ROWS, TURNS, barriers

# Registers a thread of the second multiplying warpgroup, of the loading warps; the first has what is left, as many as
# the second, as have two that go together.
_MULTIPLYING = gl.constexpr(224)
_MULTIPLYING_OF_THREE = gl.constexpr(152)
_LOADING = gl.constexpr(56)


# One compiled kernel for every number of rows, as `linear_kernel`.
@gluon.jit(do_not_specialize=["M", "split"])
def linear_roles_kernel(
    x_desc,  # [M, K] in blocks of [TOGETHER, BLOCK_K]
    w_desc,  # [N, K] in blocks of [WIDTH, BLOCK_K]
    narrow_w_desc,  # [N, K] in blocks of [NARROW, BLOCK_K]
    residual_desc,  # [M, N] in blocks of [64, WIDTH], or of [128, WIDTH / 2]
    narrow_residual_desc,  # [M, N] in blocks of [TOGETHER, NARROW]
    y_desc,  # as residual_desc
    narrow_y_desc,  # as narrow_residual_desc
    ahead_ptr,  # [N, K]: the weights, if they can be asked for ahead
    bias_ptr,  # [N]
    stats_ptr,  # [2, partials, M]: row statistics of x
    column_sum_ptr,  # [N], fp32
    scale_ptr,  # [N]: LayerScale
    y_stats_ptr,  # [2, N / 64, M]: row statistics of y
    M,
    N,
    K,
    split,
    stride_bias,
    stride_scale,
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
    """This program computes every so-manieth tile of y, as `linear_kernel` would, and of the last `split` tiles its
    share in pieces of NARROW columns. Operands are of 16 bits, and N is a multiple of NARROW. WIDTH is BLOCK_N without
    the tail; BLOCK_M is 128 or 192; TOGETHER rows are multiplied together, by TOGETHER / 16 warps: 64, or 128.
    """
    if ahead_ptr is not None:
        fetch_ahead(ahead_ptr, N, K, OVERLAP)
    # The loading roles wait for the launch before; what the others do, they do with what those have loaded.
    # Activations are fed half their input: see `activate_fast`.
    TIMES: gl.constexpr = 1.0 if ACTIVATION == "none" else 0.5  # type: ignore[reportAssignmentType]
    FLOATS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])  # type: ignore[reportAssignmentType]
    TOGETHER: gl.constexpr = x_desc.block_shape[0]
    GROUPS: gl.constexpr = BLOCK_M // TOGETHER
    WIDTH: gl.constexpr = w_desc.block_shape[0]
    COLUMNS: gl.constexpr = WIDTH if BLOCK_N == WIDTH else 2 * WIDTH  # type: ignore[reportAssignmentType]
    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES * GROUPS, TOGETHER, BLOCK_K], x_desc.layout)
    w_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, WIDTH, BLOCK_K], w_desc.layout)
    bars = barriers(STAGES, 1), barriers(STAGES, GROUPS)
    # Without a tail, and without a third warpgroup, their places are never used.
    tail_s = w_s
    if BLOCK_N > WIDTH:
        tail_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, NARROW, BLOCK_K], narrow_w_desc.layout)
    ring = (x_s, w_s, tail_s, bars[0], bars[1])
    third = (x_s.index(0), x_s.index(0), bars[0].index(0), bars[0].index(0))
    if GROUPS == 3:
        third_s = gl.allocate_shared_memory(y_desc.dtype, [1, ROWS, WIDTH], y_desc.layout)
        third_tail_s = gl.allocate_shared_memory(y_desc.dtype, [1, ROWS, NARROW], narrow_y_desc.layout)
        third_bars = barriers(2, 1)
        third = (third_s.index(0), third_tail_s.index(0), third_bars.index(0), third_bars.index(1))
    vectors = (
        gl.allocate_shared_memory(gl.float32, [TURNS * GROUPS, TOGETHER], FLOATS),
        gl.allocate_shared_memory(gl.float32, [TURNS * GROUPS, TOGETHER], FLOATS),
        gl.allocate_shared_memory(gl.float32, [TURNS, COLUMNS], FLOATS),
        gl.allocate_shared_memory(gl.float32, [TURNS, COLUMNS], FLOATS),
        gl.allocate_shared_memory(gl.float32, [TURNS, COLUMNS], FLOATS),
    )
    vector_bars = (barriers(TURNS, 1), barriers(TURNS, GROUPS))
    fence_async_shared()
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (
                    multiply,
                    (
                        0, y_desc, narrow_y_desc, y_stats_ptr, ring, third, vectors, vector_bars, M, N, K, split,
                        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE,
                        HAS_RESIDUAL, EMIT_STATS,
                    ),
                ),
                (
                    load_operands,
                    (
                        x_desc, w_desc, narrow_w_desc, residual_desc, narrow_residual_desc, ring, third, M, N, K, split,
                        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, HAS_RESIDUAL, OVERLAP,
                    ),
                ),
                (
                    load_vectors,
                    (
                        (bias_ptr, stats_ptr, column_sum_ptr, scale_ptr), vectors, vector_bars, M, N, K, split,
                        stride_bias, stride_scale, eps, BLOCK_M, BLOCK_N, GROUP_M, NORM, PARTIALS, TIMES, HAS_BIAS,
                        HAS_SCALE, OVERLAP,
                    ),
                ),
            ],
            [1, VECTOR_WARPS],
            [_LOADING, _LOADING],
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (
                    multiply,
                    (
                        0, y_desc, narrow_y_desc, y_stats_ptr, ring, third, vectors, vector_bars, M, N, K, split,
                        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE,
                        HAS_RESIDUAL, EMIT_STATS,
                    ),
                ),
                (
                    multiply,
                    (
                        1, y_desc, narrow_y_desc, y_stats_ptr, ring, third, vectors, vector_bars, M, N, K, split,
                        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE,
                        HAS_RESIDUAL, EMIT_STATS,
                    ),
                ),
                (
                    load_operands,
                    (
                        x_desc, w_desc, narrow_w_desc, residual_desc, narrow_residual_desc, ring, third, M, N, K, split,
                        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, HAS_RESIDUAL, OVERLAP,
                    ),
                ),
                (
                    load_vectors,
                    (
                        (bias_ptr, stats_ptr, column_sum_ptr, scale_ptr), vectors, vector_bars, M, N, K, split,
                        stride_bias, stride_scale, eps, BLOCK_M, BLOCK_N, GROUP_M, NORM, PARTIALS, TIMES, HAS_BIAS,
                        HAS_SCALE, OVERLAP,
                    ),
                ),
            ],
            [4, 1, VECTOR_WARPS],
            [_MULTIPLYING, _LOADING, _LOADING],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    multiply,
                    (
                        0, y_desc, narrow_y_desc, y_stats_ptr, ring, third, vectors, vector_bars, M, N, K, split,
                        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE,
                        HAS_RESIDUAL, EMIT_STATS,
                    ),
                ),
                (
                    multiply,
                    (
                        1, y_desc, narrow_y_desc, y_stats_ptr, ring, third, vectors, vector_bars, M, N, K, split,
                        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE,
                        HAS_RESIDUAL, EMIT_STATS,
                    ),
                ),
                (
                    multiply,
                    (
                        2, y_desc, narrow_y_desc, y_stats_ptr, ring, third, vectors, vector_bars, M, N, K, split,
                        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE,
                        HAS_RESIDUAL, EMIT_STATS,
                    ),
                ),
                (
                    load_operands,
                    (
                        x_desc, w_desc, narrow_w_desc, residual_desc, narrow_residual_desc, ring, third, M, N, K, split,
                        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, HAS_RESIDUAL, OVERLAP,
                    ),
                ),
                (
                    load_vectors,
                    (
                        (bias_ptr, stats_ptr, column_sum_ptr, scale_ptr), vectors, vector_bars, M, N, K, split,
                        stride_bias, stride_scale, eps, BLOCK_M, BLOCK_N, GROUP_M, NORM, PARTIALS, TIMES, HAS_BIAS,
                        HAS_SCALE, OVERLAP,
                    ),
                ),
            ],
            [4, 4, 1, VECTOR_WARPS],
            [_MULTIPLYING_OF_THREE, _MULTIPLYING_OF_THREE, _LOADING, _LOADING],
        )  # fmt: skip
