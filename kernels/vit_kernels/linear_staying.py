"""The kernel of `linear` for large products of a short K on sm_90, in Gluon: weights stay in shared memory.

128 x 128 results of K = 384 take 192 KB of operands, in 3,072 cycles of the tensor cores; all SMs together get about 41
bytes a clock each out of L2 (measured on an H100), which makes that 4,800. So a program keeps the weights of 128
columns and does tiles of these one after the other: then x is all it loads. Programs that share rows of x do them at
the same time; in another order ViT-S at batch 256 read x from memory again and again, and its fc1 took 149 us for 117.

Its warps have roles, as in `linear_roles`: two warpgroups multiply 64 rows of a tile each, and four warps for each of
them finish what it has summed, for with K this short finishing takes longer than multiplying. One more warp loads
operands, and one row statistics. Barriers are those of `linear_roles`, but empty[slot] is of a slot of x. Those of
weights, one for each step of K, are written anew where a program goes on to other columns, each when the step before
that used it has been multiplied.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .ahead import fetch_ahead
from .linear_roles_finish import WARPS, finish_piece, load_residual, load_vectors, shift_of
from .linear_roles_load import load_statistics_of, load_weights, load_x
from .linear_roles_multiply import multiply_half
from .linear_roles_ring import HALVES, NARROW, ROWS, TURNS, barriers
from .primitives import follow, tiles_over


@gluon.jit
def _shares(N, left, BLOCK_N: gl.constexpr):
    """Each column of tiles has as many programs as the others, P say, and each of these every P-th row of tiles. The
    last `left` rows are for the programs that are over, in shares of tiles below each other, so that they seldom change
    weights. Returns (programs a column, number of this one among those that are over or less than 0, tiles of a share).
    """
    columns = tiles_over(N, BLOCK_N)
    each = gl.num_programs(0) // columns
    over = gl.num_programs(0) - each * columns
    return each, gl.program_id(0) - each * columns, tiles_over(left * columns, gl.maximum(over, 1))


@gluon.jit
def _tiles_of_program(M, N, left, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    each, over, share = _shares(N, left, BLOCK_N)
    own = gl.minimum(left * tiles_over(N, BLOCK_N) - over * share, share)
    if over < 0:
        own = tiles_over(tiles_over(M, BLOCK_M) - left - gl.program_id(0) % each, each)
    return own


@gluon.jit
def _tile_of_turn(turn, M, N, left, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """First row and column of the turn-th tile of this program."""
    each, over, share = _shares(N, left, BLOCK_N)
    if over < 0:
        tile_m = gl.program_id(0) % each + turn * each
        tile_n = gl.program_id(0) // each
    else:
        tile_m = tiles_over(M, BLOCK_M) - left + (over * share + turn) % left
        tile_n = (over * share + turn) // left
    return tile_m * BLOCK_M, tile_n * BLOCK_N


@gluon.jit
def _wait_for_step(empty, step):
    """Until both warpgroups have multiplied a step, which must be one of as many last ones as there are barriers."""
    mbarrier.wait(empty.index(step % empty.shape[0]), step // empty.shape[0] & 1)


@gluon.jit
def _load_operands(
    descs, ring, M, N, K, left, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the loading warp: x of all tiles of this program, in order, and weights where they change."""
    x_desc, w_desc = descs
    x_s, _, full, empty = ring
    SLOTS: gl.constexpr = x_s.shape[0] // HALVES
    own = _tiles_of_program(M, N, left, BLOCK_M, BLOCK_N)
    row, column = _tile_of_turn(0, M, N, left, BLOCK_M, BLOCK_N)
    steps = tiles_over(K, BLOCK_K)
    last = own * steps - 1
    # The first weights do not depend on the launch before.
    for step in range(steps):
        load_weights(w_desc, ring, step, column, step * BLOCK_K, BLOCK_N)
    follow(OVERLAP)
    for half in gl.static_range(HALVES):  # type: ignore[reportGeneralTypeIssues]
        load_x(x_desc, ring, 0, row, 0, half)
    step = 0
    others = row < 0
    for turn in range(own):
        # There is no tile behind the last.
        row_after, column_after = _tile_of_turn(gl.minimum(turn + 1, own - 1), M, N, left, BLOCK_M, BLOCK_N)
        for k in range(0, K, BLOCK_K):
            if others:
                _wait_for_step(empty, step - steps)
                load_weights(w_desc, ring, step, column, k, BLOCK_N)
            elif turn > 0:
                # The step's barrier expects somebody who brings weights.
                mbarrier.arrive(full.index(step % SLOTS), count=1)
            if step < last:
                if step + 1 >= SLOTS:
                    _wait_for_step(empty, step + 1 - SLOTS)
                at = k + BLOCK_K
                following = row
                if at >= K:
                    at = 0
                    following = row_after
                for half in gl.static_range(HALVES):  # type: ignore[reportGeneralTypeIssues]
                    load_x(x_desc, ring, step + 1, following, at, half)
            step += 1
        others = column != column_after
        row, column = row_after, column_after


@gluon.jit
def _load_statistics(
    stats_ptr, vectors, vector_bars, M, N, K, left, eps, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    NORM: gl.constexpr, PARTIALS: gl.constexpr, TIMES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the warp that loads row statistics: those of all tiles of this program, in order."""
    if NORM != "none":
        follow(OVERLAP)
        for turn in range(_tiles_of_program(M, N, left, BLOCK_M, BLOCK_N)):
            row, _ = _tile_of_turn(turn, M, N, left, BLOCK_M, BLOCK_N)
            load_statistics_of(stats_ptr, vectors, vector_bars, turn, row, M, K, eps, NORM, PARTIALS, TIMES, 1)


@gluon.jit
def _multiply(
    half: gl.constexpr, descs, ring, sums, vectors, vector_bars, M, N, K, left, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    """The role of a multiplying warpgroup: its half of all tiles of this program, in order."""
    # The last step and where tiles are concern those that load.
    last = 0
    tile = 0, 0, False
    step = 0
    for turn in range(_tiles_of_program(M, N, left, BLOCK_M, BLOCK_N)):
        step = multiply_half(
            half, descs, ring, sums, vectors, vector_bars, step, last, turn, tile, tile, K, BLOCK_K, BLOCK_N, BLOCK_N,
            NORM, False,
        )  # fmt: skip


@gluon.jit
def _finish(
    half: gl.constexpr, behind, sums, vectors, vector_bars, M, N, left, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of four finishing warps: one half of all tiles of this program, in order, 64 x 64 results at a time.
    What these need from memory is asked for before those in front of them are finished."""
    sums_s, summed, free = sums
    ready, spent = vector_bars
    PITCH: gl.constexpr = sums_s.shape[0] // HALVES
    # A thread has 16 bytes of a row, a warp 128 bytes of four rows: whole lines of memory, and all banks.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # type: ignore[reportAssignmentType]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)  # type: ignore[reportAssignmentType]
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)  # type: ignore[reportAssignmentType]
    follow(OVERLAP)
    own = _tiles_of_program(M, N, left, BLOCK_M, BLOCK_N)
    row, first = _tile_of_turn(0, M, N, left, BLOCK_M, BLOCK_N)
    row += half * ROWS
    added, column_sum, scale = load_vectors(behind, first, BY_COLUMN, NORM, TIMES, HAS_BIAS, HAS_SCALE)
    residual = load_residual(behind, row, first, M, LAYOUT, HAS_RESIDUAL)
    # To add zero is to wait for them here, and not in the loop for what it has just asked for (see `linear_roles`).
    added, column_sum, scale = added + 0.0, column_sum + 0.0, scale + 0.0
    for turn in range(own):
        # Behind the last tile comes that again: what is loaded of it is not used.
        row_after, first_after = _tile_of_turn(gl.minimum(turn + 1, own - 1), M, N, left, BLOCK_M, BLOCK_N)
        row_after += half * ROWS
        if NORM == "layer":
            mbarrier.wait(ready.index(turn % TURNS), turn // TURNS & 1)
        mbarrier.wait(summed.index(half), turn & 1)
        # N is a multiple of NARROW, and not of BLOCK_N: there may be nothing to finish in the last pieces.
        pieces = gl.minimum(BLOCK_N // NARROW, (N - first) // NARROW)
        for piece in range(pieces):
            next_row, next_column = row, first + (piece + 1) * NARROW
            if piece + 1 == pieces:
                next_row, next_column = row_after, first_after
            next_added, next_sum, next_scale = load_vectors(
                behind, next_column, BY_COLUMN, NORM, TIMES, HAS_BIAS, HAS_SCALE
            )  # fmt: skip
            next_residual = load_residual(behind, next_row, next_column, M, LAYOUT, HAS_RESIDUAL)
            finish_piece(
                behind, sums_s.index(half * PITCH + piece).load(LAYOUT), added, column_sum, scale,
                shift_of(vectors[1], turn % TURNS * HALVES + half, BY_ROW, NORM), residual, row, first + piece * NARROW,
                M, N, LAYOUT, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
            )  # fmt: skip
            added, column_sum, scale = next_added, next_sum, next_scale
            residual = next_residual
        mbarrier.arrive(free.index(half), count=1)
        if NORM == "layer":
            mbarrier.arrive(spent.index(turn % TURNS), count=1)
        row, first = row_after, first_after


# One compiled kernel for every number of rows, as `linear_kernel`.
@gluon.jit(do_not_specialize=["M", "left"])
def linear_staying_kernel(
    x_desc,  # [M, K] in blocks of [ROWS, BLOCK_K]
    w_desc,  # [N, K] in blocks of [BLOCK_N, BLOCK_K]
    ahead_ptr,  # [N, K]: the weights, if they can be asked for ahead
    bias_ptr,  # [N], contiguous
    stats_ptr,  # [2, partials, M]: row statistics of x
    column_sum_ptr,  # [N], fp32
    scale_ptr,  # [N], contiguous: LayerScale
    residual_ptr,  # [M, N]
    y_ptr,  # [M, N]
    y_stats_ptr,  # [2, N / 64, M]: row statistics of y
    M,
    N,
    K,
    left,
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
    STAGES: gl.constexpr,
    STEPS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """This program computes tiles of y that `_tile_of_turn` gives it, one after the other. Operands are of 16 bits, N
    is a multiple of NARROW, BLOCK_M is HALVES * ROWS, K at most STEPS * BLOCK_K; STAGES: slots for x."""
    if ahead_ptr is not None:
        fetch_ahead(ahead_ptr, N, K, OVERLAP)
    # Activations are fed half their input: see `activate_fast`.
    TIMES: gl.constexpr = 1.0 if ACTIVATION == "none" else 0.5  # type: ignore[reportAssignmentType]
    FLOATS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])  # type: ignore[reportAssignmentType]
    SUMS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, NARROW], x_desc.dtype)  # type: ignore[reportAssignmentType]
    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES * HALVES, ROWS, BLOCK_K], x_desc.layout)
    w_s = gl.allocate_shared_memory(w_desc.dtype, [STEPS, BLOCK_N, BLOCK_K], w_desc.layout)
    sums_s = gl.allocate_shared_memory(x_desc.dtype, [HALVES * BLOCK_N // NARROW, ROWS, NARROW], SUMS)
    vectors = (
        gl.allocate_shared_memory(gl.float32, [TURNS * HALVES, ROWS], FLOATS),
        gl.allocate_shared_memory(gl.float32, [TURNS * HALVES, ROWS], FLOATS),
    )
    # Both halves of x and weights, or word that these are there.
    ring = x_s, w_s, barriers(STAGES, HALVES + 1), barriers(STAGES, HALVES)
    sums = sums_s, barriers(HALVES, 1), barriers(HALVES, 1)
    # Those that finish read the shift of a norm with means.
    vector_bars = barriers(TURNS, 1), barriers(TURNS, 2 * HALVES if NORM == "layer" else HALVES)
    behind = bias_ptr, column_sum_ptr, scale_ptr, residual_ptr, stride_rm, y_ptr, y_stats_ptr
    descs = x_desc, w_desc
    fence_async_shared()
    # Registers for all of these are what a launch with 20 warps (rounded up to warpgroups) can ask for: 96 a thread.
    gl.warp_specialize(
        [
            (
                _multiply,
                (0, descs, ring, sums, vectors, vector_bars, M, N, K, left, BLOCK_M, BLOCK_N, BLOCK_K, NORM),
            ),
            (
                _multiply,
                (1, descs, ring, sums, vectors, vector_bars, M, N, K, left, BLOCK_M, BLOCK_N, BLOCK_K, NORM),
            ),
            (
                _finish,
                (
                    0, behind, sums, vectors, vector_bars, M, N, left, BLOCK_M, BLOCK_N, NORM, ACTIVATION, TIMES,
                    HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, OVERLAP,
                ),
            ),
            (
                _finish,
                (
                    1, behind, sums, vectors, vector_bars, M, N, left, BLOCK_M, BLOCK_N, NORM, ACTIVATION, TIMES,
                    HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, OVERLAP,
                ),
            ),
            (_load_operands, (descs, ring, M, N, K, left, BLOCK_M, BLOCK_N, BLOCK_K, OVERLAP)),
            (
                _load_statistics,
                (
                    stats_ptr, vectors, vector_bars, M, N, K, left, eps, BLOCK_M, BLOCK_N, NORM, PARTIALS, TIMES,
                    OVERLAP,
                ),
            ),
        ],
        [4, 4, 4, 1, 1],
        [96, 112, 112, 56, 56],
    )  # fmt: skip
