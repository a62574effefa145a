"""The loading roles of `linear_roles_kernel`: one warp brings operands and residuals, two the vectors of a tile."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .linear_roles_ring import NARROW, TURNS, load_block, narrow_tile, own_slot, share_of_tiles
from .primitives import STATS_COLUMNS, follow, grouped_tile, shift_and_scale, tiles_over

# Row statistics are many small loads: two warps wait for them.
VECTOR_WARPS = gl.constexpr(2)


@gluon.jit
def load_weights_ahead(
    x_desc, w_desc, ring, column, first, steps, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr
):  # fmt: skip
    """Loads the weights of the first steps of a program, as many as there are slots, and then waits for the launch
    before, which they do not depend on; returns how many steps these were. The barriers expect x beside them."""
    _, w_s, full, _ = ring
    ahead = gl.minimum(steps, STAGES)
    for step in range(ahead):
        mbarrier.expect(full.index(step), x_desc.block_type.nbytes + w_desc.block_type.nbytes)
        load_block(w_desc, [column, (first + step) * BLOCK_K], full.index(step), w_s.index(step))
    follow(OVERLAP)
    return ahead


@gluon.jit
def load_step(
    x_desc, w_desc, ring, step, ahead, row, column, k, STAGES: gl.constexpr, WIDTH: gl.constexpr
):  # fmt: skip
    """Loads the operands of a step, weights only from step number `ahead` on."""
    x_s, w_s, full, empty = ring
    slot = step % STAGES
    if step >= ahead:
        mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(slot), x_desc.block_type.nbytes + w_desc.block_type.nbytes)
        load_block(w_desc, [column, k], full.index(slot), w_s.index(slot).slice(0, WIDTH))
    load_block(x_desc, [row, k], full.index(slot), x_s.index(slot))


@gluon.jit
def _load_tile(
    x_desc, w_desc, residual_desc, ring, step, ahead, row, column, K,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Loads the operands of the tile at (row, column), step by step, and hands out two slots, with its residual."""
    _, _, full, empty = ring
    for k in range(0, K, BLOCK_K):
        load_step(x_desc, w_desc, ring, step, ahead, row, column, k, STAGES, WIDTH)
        step += 1
    for half in gl.static_range(2):  # type: ignore[reportGeneralTypeIssues]
        slot = step % STAGES
        mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
        if HAS_RESIDUAL:
            mbarrier.expect(full.index(slot), residual_desc.block_type.nbytes)
            place = own_slot(ring, slot, residual_desc, WIDTH)
            load_block(residual_desc, [row + half * (BLOCK_M // 2), column], full.index(slot), place)
        else:
            mbarrier.arrive(full.index(slot), count=1)
        step += 1
    return step


@gluon.jit
def load_operands(
    x_desc, w_desc, narrow_w_desc, residual_desc, narrow_residual_desc, ring, M, N, K, split,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the loading warp: the operands and residuals of all tiles of this program, in order."""
    step = 0
    programs = gl.num_programs(0)
    whole, first, pieces = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    # Every program has a whole tile to begin with.
    _, tile_n = grouped_tile(gl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    steps = tiles_over(K, BLOCK_K)
    ahead = load_weights_ahead(x_desc, w_desc, ring, tile_n * BLOCK_N, 0, steps, BLOCK_K, STAGES, OVERLAP)
    for tile in range(gl.program_id(0), whole, programs):
        tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = _load_tile(
            x_desc, w_desc, residual_desc, ring, step, ahead, tile_m * BLOCK_M, tile_n * BLOCK_N, K,
            BLOCK_M, BLOCK_K, STAGES, BLOCK_N, HAS_RESIDUAL,
        )  # fmt: skip
    for piece in range(first, pieces, programs):
        row, column = narrow_tile(piece, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = _load_tile(
            x_desc, narrow_w_desc, narrow_residual_desc, ring, step, ahead, row, column, K,
            BLOCK_M, BLOCK_K, STAGES, NARROW, HAS_RESIDUAL,
        )  # fmt: skip


@gluon.jit
def _merged_moments(stats_ptr, rows, M, columns, PARTIALS: gl.constexpr):
    """Mean and M2 of rows below M from their partials, as `merge_moments`: without a loop, because then as many of the
    loads are under way as the registers of a loading warp hold."""
    pitch = gl.to_tensor(M).to(gl.int64)
    at = stats_ptr + rows
    mean = gl.load(at)
    m2 = gl.load(at + PARTIALS * pitch)
    for t in gl.static_range(1, PARTIALS):  # type: ignore[reportGeneralTypeIssues]
        before = t * STATS_COLUMNS
        count = STATS_COLUMNS if t < PARTIALS - 1 else columns - before
        share = count / (before + count)
        apart = gl.load(at + t * pitch) - mean
        mean += apart * share
        m2 += gl.load(at + (PARTIALS + t) * pitch) + apart * apart * (before * share)
    return mean, m2


@gluon.jit
def _write_vectors(
    pointers, vectors, vector_bars, turn, row, column, M, N, K, stride_bias, stride_scale, eps,
    BLOCK_M: gl.constexpr, WIDTH: gl.constexpr, NORM: gl.constexpr, PARTIALS: gl.constexpr, TIMES: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr,
):  # fmt: skip
    """Writes what finishes the tile at (row, column): TIMES rstd and -TIMES rstd mean of its rows, TIMES bias, weight
    sums and LayerScale of its columns."""
    bias_ptr, stats_ptr, column_sum_ptr, scale_ptr = pointers
    rstd_s, shift_s, bias_s, column_sum_s, scale_s = vectors
    ready, spent = vector_bars
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [VECTOR_WARPS], [0])  # type: ignore[reportAssignmentType]
    slot = turn % TURNS
    mbarrier.wait(spent.index(slot), (turn // TURNS & 1) ^ 1)
    columns = column + gl.arange(0, WIDTH, LANES)
    keep = columns < N
    if HAS_BIAS:
        bias = gl.load(bias_ptr + columns.to(gl.int64) * stride_bias, mask=keep, other=0.0)
        bias_s.index(slot).slice(0, WIDTH).store(bias.to(gl.float32) * TIMES)
    if HAS_SCALE:
        scale = gl.load(scale_ptr + columns.to(gl.int64) * stride_scale, mask=keep, other=0.0)
        scale_s.index(slot).slice(0, WIDTH).store(scale.to(gl.float32))
    if NORM == "layer":
        column_sum = gl.load(column_sum_ptr + columns, mask=keep, other=0.0)
        column_sum_s.index(slot).slice(0, WIDTH).store(column_sum)
    if NORM != "none":
        rows = gl.minimum(row + gl.arange(0, BLOCK_M, LANES), M - 1)
        mean, m2 = _merged_moments(stats_ptr, rows, M, K, PARTIALS)
        mean, rstd = shift_and_scale(mean, m2, K, eps, NORM)
        rstd_s.index(slot).store(rstd * TIMES)
        shift_s.index(slot).store(-mean * (rstd * TIMES))
    mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit
def load_vectors(
    pointers, vectors, vector_bars, M, N, K, split, stride_bias, stride_scale, eps,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, NORM: gl.constexpr, PARTIALS: gl.constexpr,
    TIMES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the warps that load vectors: the vectors of all tiles of this program, in order."""
    follow(OVERLAP)
    turn = 0
    programs = gl.num_programs(0)
    whole, first, pieces = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    for tile in range(gl.program_id(0), whole, programs):
        tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        _write_vectors(
            pointers, vectors, vector_bars, turn, tile_m * BLOCK_M, tile_n * BLOCK_N, M, N, K, stride_bias,
            stride_scale, eps, BLOCK_M, BLOCK_N, NORM, PARTIALS, TIMES, HAS_BIAS, HAS_SCALE,
        )  # fmt: skip
        turn += 1
    for piece in range(first, pieces, programs):
        row, column = narrow_tile(piece, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        _write_vectors(
            pointers, vectors, vector_bars, turn, row, column, M, N, K, stride_bias, stride_scale, eps,
            BLOCK_M, NARROW, NORM, PARTIALS, TIMES, HAS_BIAS, HAS_SCALE,
        )  # fmt: skip
        turn += 1
