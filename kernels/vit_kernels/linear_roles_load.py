"""The loading roles of `linear_roles_kernel`: one warp brings operands, one row statistics."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .linear_roles_ring import HALVES, NARROW, ROWS, TURNS, load_block, share_of_tiles, tile_of_turn
from .primitives import STATS_COLUMNS, follow, shift_and_scale, tiles_over


@gluon.jit
def _load_x(x_desc, ring, step, row, k):
    """Loads x of a step, and has the step's barrier expect it."""
    x_s, _, full, _ = ring
    SLOTS: gl.constexpr = x_s.shape[0] // HALVES
    arrived = full.index(step % SLOTS)
    mbarrier.expect(arrived, HALVES * ROWS * x_s.shape[2] * 2)
    for half in gl.static_range(HALVES):  # type: ignore[reportGeneralTypeIssues]
        load_block(x_desc, [row + half * ROWS, k], arrived, x_s.index(step % SLOTS * HALVES + half))


@gluon.jit
def _load_weights(w_desc, ring, step, column, k, WIDTH: gl.constexpr):
    """Loads the weights of a step, and has the step's barrier expect them."""
    x_s, w_s, full, _ = ring
    arrived = full.index(step % (x_s.shape[0] // HALVES))
    mbarrier.expect(arrived, WIDTH * x_s.shape[2] * 2)
    load_block(w_desc, [column, k], arrived, w_s.index(step % w_s.shape[0]).slice(0, WIDTH))


@gluon.jit
def _load_tile(
    x_desc, w_desc, ring, step, ahead, last, row, column, row_after, K, BLOCK_K: gl.constexpr, WIDTH: gl.constexpr
):
    """Loads the weights of the tile at (row, column), step by step from number `ahead` on, and x of the step behind
    each, in the end of the next tile's first: the slot that the weights of a step wait for was let go of with that of x
    one step later. Returns the number of the next step; `last` is that of the program's last."""
    _, w_s, _, empty = ring
    STAGES: gl.constexpr = w_s.shape[0]
    for k in range(0, K, BLOCK_K):
        if step >= ahead:
            mbarrier.wait(empty.index(step % STAGES), (step // STAGES & 1) ^ 1)
            _load_weights(w_desc, ring, step, column, k, WIDTH)
        if step < last:
            after = k + BLOCK_K
            if after < K:
                _load_x(x_desc, ring, step + 1, row, after)
            else:
                _load_x(x_desc, ring, step + 1, row_after, 0)
        step += 1
    return step


@gluon.jit
def load_operands(
    x_desc, w_desc, narrow_w_desc, ring, M, N, K, split, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the loading warp: the operands of all tiles of this program, in order."""
    own, all_turns, whole = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    steps = tiles_over(K, BLOCK_K)
    last = all_turns * steps - 1
    # Every program has a whole tile to begin with. The weights of its first steps, as many as there are slots, do not
    # depend on the launch before.
    row, column, _ = tile_of_turn(0, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    ahead = gl.minimum(steps, STAGES)
    for step in range(ahead):
        _load_weights(w_desc, ring, step, column, step * BLOCK_K, BLOCK_N)
    follow(OVERLAP)
    _load_x(x_desc, ring, 0, row, 0)
    step = 0
    for turn in range(own):
        # There is no tile behind the last, and no number of one to divide by.
        turn_after = gl.minimum(turn + 1, all_turns - 1)
        after, column_after, _ = tile_of_turn(turn_after, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = _load_tile(x_desc, w_desc, ring, step, ahead, last, row, column, after, K, BLOCK_K, BLOCK_N)
        row, column = after, column_after
    for turn in range(own, all_turns):
        turn_after = gl.minimum(turn + 1, all_turns - 1)
        after, column_after, _ = tile_of_turn(turn_after, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = _load_tile(x_desc, narrow_w_desc, ring, step, ahead, last, row, column, after, K, BLOCK_K, NARROW)
        row, column = after, column_after


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
def load_statistics(
    stats_ptr, vectors, vector_bars, M, N, K, split, eps, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr, NORM: gl.constexpr, PARTIALS: gl.constexpr, TIMES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the warp that loads row statistics: TIMES rstd and -TIMES rstd mean of the rows of all tiles of this
    program, in order."""
    if NORM != "none":
        follow(OVERLAP)
        rstd_s, shift_s = vectors
        ready, spent = vector_bars
        LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])  # type: ignore[reportAssignmentType]
        own, all_turns, whole = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
        for turn in range(all_turns):
            row, _, _ = tile_of_turn(turn, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            slot = turn % TURNS
            mbarrier.wait(spent.index(slot), (turn // TURNS & 1) ^ 1)
            # In a loop that stays one: the loads of more rows fill the registers.
            for half in range(HALVES):
                rows = gl.minimum(row + half * ROWS + gl.arange(0, ROWS, LANES), M - 1)
                mean, m2 = _merged_moments(stats_ptr, rows, M, K, PARTIALS)
                mean, rstd = shift_and_scale(mean, m2, K, eps, NORM)
                rstd_s.index(slot * HALVES + half).store(rstd * TIMES)
                shift_s.index(slot * HALVES + half).store(-mean * (rstd * TIMES))
            mbarrier.arrive(ready.index(slot), count=1)
