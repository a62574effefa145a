"""Parts of a product on sm_90, in Gluon: `linear_parts_kernel` with warps that have roles.

One warp loads operands into a ring of slots, and two warpgroups multiply, 64 rows of a tile each. Barriers as in
`linear_roles_kernel`: full[slot], operands have arrived; empty[slot], both warpgroups have used them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .ahead import fetch_ahead
from .linear_roles_load import load_step, load_weights_ahead
from .linear_roles_multiply import accumulators, end_products, multiply_step
from .linear_roles_ring import ROWS, barriers
from .primitives import tiles_over

# Registers a thread of the second multiplying warpgroup and of the loading warp; the first has what is left.
_MULTIPLYING = gl.constexpr(224)
_LOADING = gl.constexpr(56)


@gluon.jit
def _load(
    x_desc, w_desc, ring, row, column, first, steps, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr
):  # fmt: skip
    """The role of the loading warp, which alone waits for the launch before."""
    WIDTH: gl.constexpr = w_desc.block_shape[0]
    ahead = load_weights_ahead(w_desc, w_desc, ring, column, first, steps, BLOCK_K, STAGES, WIDTH, 0, OVERLAP)
    for step in range(steps):
        k = (first + step) * BLOCK_K
        load_step(x_desc, w_desc, w_desc, ring, step, ahead, row, column, k, STAGES, WIDTH, 0)


@gluon.jit
def _multiply(group: gl.constexpr, sums_ptr, ring, row, column, steps, M, N, STAGES: gl.constexpr):
    """The role of a multiplying warpgroup: 64 rows of the tile, summed and stored."""
    _, w_s, _, _, empty = ring
    WIDTH: gl.constexpr = w_s.shape[1]
    acc, none = accumulators(WIDTH, 0)
    acc, none = multiply_step(acc, none, ring, 0, group, WIDTH, 0, STAGES, False)
    for step in range(1, steps):
        acc, none = multiply_step(acc, none, ring, step, group, WIDTH, 0, STAGES, True)
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
    acc, none = end_products(acc, none, 0)
    LAYOUT: gl.constexpr = acc.type.layout
    rows = row + group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = column + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    at = sums_ptr + rows.to(gl.int64)[:, None] * N + columns[None, :]
    gl.store(at, acc, mask=(rows < M)[:, None] & (columns < N)[None, :])


# One compiled kernel for every number of rows, as `linear_kernel`.
@gluon.jit(do_not_specialize=["M", "parts"])
def linear_parts_roles_kernel(
    x_desc,  # [M, K] in blocks of [64, BLOCK_K]
    w_desc,  # [N, K] in blocks of [BLOCK_N, BLOCK_K]
    ahead_ptr,  # [N, K]: the weights, if they can be asked for ahead
    sums_ptr,  # [parts, M, N], fp32
    M,
    N,
    K,
    parts,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """This program sums x W^T over one part of K for a BLOCK_M x BLOCK_N tile, as `linear_parts_kernel` would."""
    if ahead_ptr is not None:
        fetch_ahead(ahead_ptr, N, K, OVERLAP)
    tiles_m = tiles_over(M, BLOCK_M)
    tiles = tiles_m * tiles_over(N, BLOCK_N)
    tile = gl.program_id(0) % tiles
    part = gl.program_id(0) // tiles
    row = tile % tiles_m * BLOCK_M
    column = tile // tiles_m * BLOCK_N
    first = part * (K // BLOCK_K) // parts
    steps = (part + 1) * (K // BLOCK_K) // parts - first
    sums_ptr += part.to(gl.int64) * M * N

    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES * (BLOCK_M // ROWS), ROWS, BLOCK_K], x_desc.layout)
    w_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    ring = (x_s, w_s, w_s, barriers(STAGES, 1), barriers(STAGES, 2))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (0, sums_ptr, ring, row, column, steps, M, N, STAGES)),
            (_multiply, (1, sums_ptr, ring, row, column, steps, M, N, STAGES)),
            (_load, (x_desc, w_desc, ring, row, column, first, steps, BLOCK_K, STAGES, OVERLAP)),
        ],
        [4, 1],
        [_MULTIPLYING, _LOADING],
    )
