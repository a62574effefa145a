"""The kernel of `linear` for large products on sm_90, in Gluon: its warps have roles.

One warp loads operands, one loads the vectors that finish a tile, two warpgroups multiply 64 rows of a tile each, and
two warps finish what those have summed. The multiplying ones hand their sums over in shared memory, rounded to 16 bits
as a product of PyTorch's would be, and go on with the next tile: so what stands behind a product (norm, bias,
activation, LayerScale, residual, moments) is computed under the next one. When the warpgroups that multiply also
finished their rows, the tensor cores rested a third of the time (measured on an H100: fc1 of ViT-B at batch 64).

A barrier's n-th use is waited for by its parity, n & 1. Nobody fills a place before everybody has let go of it:

    full[slot]   operands of a step have arrived        empty[slot]   both warpgroups have multiplied them
    ready[turn]  vectors of a tile have been written    spent[turn]   both warpgroups and those two warps have read them
    summed[half] sums of 64 rows have been written      free[half]    they have been read

Sums are multiplied by rstd before they are rounded, so that fp16 holds them whatever the scale of x; `fold_norm`
centres the weights, so that a common offset of a row is not among what is rounded.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .ahead import fetch_ahead
from .linear_roles_finish import finish
from .linear_roles_load import load_operands, load_vectors
from .linear_roles_multiply import multiply
from .linear_roles_ring import HALVES, NARROW, ROWS, TURNS, as_pieces, barriers



@gluon.constexpr_function
def _helps(block_n, has_residual, emit_stats):
    """Whether warpgroups that multiply so many columns finish the last tile, too: beside the sums of 256 their registers
    do not hold what a residual or statistics take."""
    return not (has_residual or emit_stats)


@gluon.constexpr_function
def _finishing_warps(block_n):
    """Beside two warpgroups that multiply 256 columns there is but one: with a fourth, 128 registers were left at launch,
    which ptxas refuses for a product of 64 x 256."""
    return 2 if block_n == 256 else 4


@gluon.constexpr_function
def _registers(block_n, helps):
    """Registers a thread of a multiplying warpgroup, of the finishing warps, of those that load."""
    if block_n < 256:
        return (120, 120, 152) if helps else (104, 152, 152)
    return (168, 168, 168) if helps else (160, 184, 184)


# One compiled kernel for every number of rows, as `linear_kernel`.
@gluon.jit(do_not_specialize=["M", "split"])
def linear_roles_kernel(
    x_desc,  # [M, K] in blocks of [ROWS, BLOCK_K]
    w_desc,  # [N, K] in blocks of [BLOCK_N, BLOCK_K]
    narrow_w_desc,  # [N, K] in blocks of [NARROW, BLOCK_K]
    ahead_ptr,  # [N, K]: the weights, if they can be asked for ahead
    bias_ptr,  # [N]
    stats_ptr,  # [2, partials, M]: row statistics of x
    column_sum_ptr,  # [N], fp32
    scale_ptr,  # [N]: LayerScale
    residual_ptr,  # [M, N]
    y_ptr,  # [M, N]
    y_stats_ptr,  # [2, N / 64, M]: row statistics of y
    M,
    N,
    K,
    split,
    stride_bias,
    stride_scale,
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
    """This program computes every so-manieth tile of y, as `linear_kernel` would, and of the last `split` tiles its
    share in pieces of NARROW columns. Operands are of 16 bits, N is a multiple of NARROW, BLOCK_M is HALVES * ROWS.
    """
    if ahead_ptr is not None:
        fetch_ahead(ahead_ptr, N, K, OVERLAP)
    # The loading roles wait for the launch before, and so does what reads the residual; what the others do, they do
    # with what those have loaded. Activations are fed half their input: see `activate_fast`.
    TIMES: gl.constexpr = 1.0 if ACTIVATION == "none" else 0.5  # type: ignore[reportAssignmentType]
    FLOATS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])  # type: ignore[reportAssignmentType]
    HELPS: gl.constexpr = _helps(BLOCK_N, HAS_RESIDUAL, EMIT_STATS)  # type: ignore[reportAssignmentType]
    REGISTERS: gl.constexpr = _registers(BLOCK_N, HELPS)  # type: ignore[reportAssignmentType]
    FINISHING: gl.constexpr = _finishing_warps(BLOCK_N)  # type: ignore[reportAssignmentType]
    PIECES: gl.constexpr = BLOCK_N // NARROW
    SUMS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_N], x_desc.dtype)  # type: ignore[reportAssignmentType]
    PIECE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, NARROW], x_desc.dtype)  # type: ignore[reportAssignmentType]
    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES * HALVES, ROWS, BLOCK_K], x_desc.layout)
    w_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    sums_s = gl.allocate_shared_memory(x_desc.dtype, [HALVES, ROWS, BLOCK_N], SUMS)
    vectors = (
        gl.allocate_shared_memory(gl.float32, [TURNS * HALVES, ROWS], FLOATS),
        gl.allocate_shared_memory(gl.float32, [TURNS * HALVES, ROWS], FLOATS),
        gl.allocate_shared_memory(gl.float32, [TURNS * PIECES, NARROW], FLOATS),
        gl.allocate_shared_memory(gl.float32, [TURNS * PIECES, NARROW], FLOATS),
        gl.allocate_shared_memory(gl.float32, [TURNS * PIECES, NARROW], FLOATS),
    )
    ring = x_s, w_s, barriers(STAGES, 1), barriers(STAGES, HALVES)
    sums = sums_s, as_pieces(sums_s, PIECE), barriers(HALVES, 1), barriers(HALVES, 1)
    vector_bars = barriers(TURNS, 1), barriers(TURNS, HALVES + 1)
    results = residual_ptr, y_ptr, y_stats_ptr
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    0, results, ring, sums, vectors, vector_bars, M, N, K, split, stride_rm, BLOCK_M, BLOCK_N, BLOCK_K,
                    GROUP_M, STAGES, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, HELPS, OVERLAP,
                ),
            ),
            (
                multiply,
                (
                    1, results, ring, sums, vectors, vector_bars, M, N, K, split, stride_rm, BLOCK_M, BLOCK_N, BLOCK_K,
                    GROUP_M, STAGES, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, HELPS, OVERLAP,
                ),
            ),
            (
                finish,
                (
                    results, sums, vectors, vector_bars, M, N, split, stride_rm, BLOCK_M, BLOCK_N, GROUP_M, FINISHING,
                    NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, HELPS, OVERLAP,
                ),
            ),
            (
                load_operands,
                (
                    x_desc, w_desc, narrow_w_desc, ring, M, N, K, split, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
                    OVERLAP,
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
        [4, FINISHING, 1, 1],
        [REGISTERS[0], REGISTERS[1], REGISTERS[2], REGISTERS[2]],
    )  # fmt: skip
