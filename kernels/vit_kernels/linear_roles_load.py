"""The loading roles of `linear_roles_kernel`: one warp brings operands, one the vectors of a tile."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .linear_roles_ring import HALVES, NARROW, ROWS, TURNS, load_block, share_of_tiles, tile_of_turn
from .primitives import STATS_COLUMNS, follow, shift_and_scale, tiles_over

@gluon.jit
def _load_weights(w_desc, ring, slot, column, k, WIDTH: gl.constexpr):
    """Loads the weights of a step, and has the slot's barrier expect x beside them."""
    x_s, w_s, full, _ = ring
    mbarrier.expect(full.index(slot), (HALVES * ROWS + WIDTH) * x_s.shape[2] * 2)
    load_block(w_desc, [column, k], full.index(slot), w_s.index(slot).slice(0, WIDTH))


@gluon.jit
def _load_tile(
    x_desc, w_desc, ring, step, ahead, row, column, K, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr
):
    """Loads the operands of the tile at (row, column), step by step, weights only from step number `ahead` on. Returns
    the number of the next step."""
    x_s, _, full, empty = ring
    for k in range(0, K, BLOCK_K):
        slot = step % STAGES
        if step >= ahead:
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            _load_weights(w_desc, ring, slot, column, k, WIDTH)
        for half in gl.static_range(HALVES):  # type: ignore[reportGeneralTypeIssues]
            load_block(x_desc, [row + half * ROWS, k], full.index(slot), x_s.index(slot * HALVES + half))
        step += 1
    return step


@gluon.jit
def load_operands(
    x_desc, w_desc, narrow_w_desc, ring, M, N, K, split, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the loading warp: the operands of all tiles of this program, in order."""
    own, all_turns, whole = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    # Every program has a whole tile to begin with. The weights of its first steps, as many as there are slots, do not
    # depend on the launch before.
    _, column, _ = tile_of_turn(0, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    ahead = gl.minimum(tiles_over(K, BLOCK_K), STAGES)
    for step in range(ahead):
        _load_weights(w_desc, ring, step, column, step * BLOCK_K, BLOCK_N)
    follow(OVERLAP)
    step = 0
    for turn in range(own):
        row, column, _ = tile_of_turn(turn, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = _load_tile(x_desc, w_desc, ring, step, ahead, row, column, K, BLOCK_K, STAGES, BLOCK_N)
    for turn in range(own, all_turns):
        row, column, _ = tile_of_turn(turn, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = _load_tile(x_desc, narrow_w_desc, ring, step, ahead, row, column, K, BLOCK_K, STAGES, NARROW)


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
    pointers, vectors, vector_bars, turn, row, column, pieces, M, N, K, stride_bias, stride_scale, eps,
    NORM: gl.constexpr, PARTIALS: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr,
):  # fmt: skip
    """Writes what finishes the tile at (row, column): TIMES rstd and -TIMES rstd mean of its rows, TIMES bias, weight
    sums and LayerScale of its columns."""
    bias_ptr, stats_ptr, column_sum_ptr, scale_ptr = pointers
    rstd_s, shift_s, bias_s, column_sum_s, scale_s = vectors
    ready, spent = vector_bars
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])  # type: ignore[reportAssignmentType]
    slot = turn % TURNS
    mbarrier.wait(spent.index(slot), (turn // TURNS & 1) ^ 1)
    for piece in range(pieces):
        at = slot * (bias_s.shape[0] // TURNS) + piece
        columns = column + piece * NARROW + gl.arange(0, NARROW, LANES)
        keep = columns < N
        if HAS_BIAS:
            bias = gl.load(bias_ptr + columns.to(gl.int64) * stride_bias, mask=keep, other=0.0)
            bias_s.index(at).store(bias.to(gl.float32) * TIMES)
        if HAS_SCALE:
            scale = gl.load(scale_ptr + columns.to(gl.int64) * stride_scale, mask=keep, other=0.0)
            scale_s.index(at).store(scale.to(gl.float32))
        if NORM == "layer":
            column_sum_s.index(at).store(gl.load(column_sum_ptr + columns, mask=keep, other=0.0))
    if NORM != "none":
        # In a loop that stays one: the loads of more rows fill the registers.
        for half in range(HALVES):
            rows = gl.minimum(row + half * ROWS + gl.arange(0, ROWS, LANES), M - 1)
            mean, m2 = _merged_moments(stats_ptr, rows, M, K, PARTIALS)
            mean, rstd = shift_and_scale(mean, m2, K, eps, NORM)
            rstd_s.index(slot * HALVES + half).store(rstd * TIMES)
            shift_s.index(slot * HALVES + half).store(-mean * (rstd * TIMES))
    mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit
def load_vectors(
    pointers, vectors, vector_bars, M, N, K, split, stride_bias, stride_scale, eps,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, NORM: gl.constexpr, PARTIALS: gl.constexpr,
    TIMES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the warp that loads vectors: the vectors of all tiles of this program, in order."""
    follow(OVERLAP)
    own, all_turns, whole = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    for turn in range(all_turns):
        row, column, pieces = tile_of_turn(turn, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        _write_vectors(
            pointers, vectors, vector_bars, turn, row, column, pieces, M, N, K, stride_bias, stride_scale, eps, NORM,
            PARTIALS, TIMES, HAS_BIAS, HAS_SCALE,
        )  # fmt: skip
