"""The loading of `linear_roles_kernel`: by two warps that do nothing else, or by those that multiply and finish."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .linear_roles_ring import HALVES, NARROW, ROWS, TURNS, as_tall, load_block, share_of_tiles, tile_of_turn
from .primitives import STATS_COLUMNS, follow, shift_and_scale, tiles_over


@gluon.jit
def load_x(x_desc, ring, step, row, k, half: gl.constexpr):
    """Loads one half of the rows of x of a step, and has the step's barrier expect it."""
    x_s, _, full, _ = ring
    slot = step % (x_s.shape[0] // HALVES)
    mbarrier.expect(full.index(slot), ROWS * x_s.shape[2] * 2)
    load_block(x_desc, [row + half * ROWS, k], full.index(slot), x_s.index(slot * HALVES + half))


@gluon.jit
def load_weights(w_desc, ring, step, column, k, WIDTH: gl.constexpr):
    """Loads the weights of a step, and has the step's barrier expect them."""
    x_s, w_s, full, _ = ring
    arrived = full.index(step % (x_s.shape[0] // HALVES))
    mbarrier.expect(arrived, WIDTH * x_s.shape[2] * 2)
    load_block(w_desc, [column, k], arrived, w_s.index(step % w_s.shape[0]).slice(0, WIDTH))


@gluon.jit
def load_again(
    descs, ring, half: gl.constexpr, step, last, k, tile, after, K_END, BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Where those that multiply load: lets go of the slots of a step that this warpgroup has multiplied, and fills its
    half of x with the step as many ahead as there are slots. Weights likewise, which the warpgroups load in turns.

    k: where in K the step was; `last` is the number of the program's last. tile, after: row, column and whether it is
    narrow of the tile it was of and of the next, which begins K_END behind the beginning of this one.
    """
    x_s, w_s, _, empty = ring
    x_desc, w_desc, narrow_w_desc = descs
    SLOTS: gl.constexpr = x_s.shape[0] // HALVES
    STAGES: gl.constexpr = w_s.shape[0]
    row, column, narrow = tile
    row_after, column_after, narrow_after = after
    # All warps of this warpgroup wait for each other here: its half of x is free, too.
    mbarrier.arrive(empty.index(step % STAGES), count=1)
    if step + SLOTS <= last:
        at = k + SLOTS * BLOCK_K
        if at >= K_END:
            at -= K_END
            row = row_after
        load_x(x_desc, ring, step + SLOTS, row, at, half)
    ahead = step + STAGES
    if (ahead <= last) & (ahead % HALVES == half):
        mbarrier.wait(empty.index(step % STAGES), step // STAGES & 1)
        at = k + STAGES * BLOCK_K
        if at >= K_END:
            at -= K_END
            column = column_after
            narrow = narrow_after
        if narrow:
            load_weights(narrow_w_desc, ring, ahead, column, at, NARROW)
        else:
            load_weights(w_desc, ring, ahead, column, at, BLOCK_N)


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
            load_weights(w_desc, ring, step, column, k, WIDTH)
        if step < last:
            at = k + BLOCK_K
            following = row
            if at >= K:
                at = 0
                following = row_after
            for half in gl.static_range(HALVES):  # type: ignore[reportGeneralTypeIssues]
                load_x(x_desc, ring, step + 1, following, at, half)
        step += 1
    return step


@gluon.jit
def load_operands(
    descs, ring, M, N, K, split, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the loading warp: the operands of all tiles of this program, in order."""
    x_desc, w_desc, narrow_w_desc = descs
    own, all_turns, whole = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    steps = tiles_over(K, BLOCK_K)
    last = all_turns * steps - 1
    # Every program has a whole tile to begin with. The weights of its first steps, as many as there are slots, do not
    # depend on the launch before.
    row, column, _ = tile_of_turn(0, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    ahead = gl.minimum(steps, ring[1].shape[0])
    for step in range(ahead):
        load_weights(w_desc, ring, step, column, step * BLOCK_K, BLOCK_N)
    follow(OVERLAP)
    for half in gl.static_range(HALVES):  # type: ignore[reportGeneralTypeIssues]
        load_x(x_desc, ring, 0, row, 0, half)
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
def merged_moments(stats_ptr, rows, M, columns, PARTIALS: gl.constexpr):
    """Mean and M2 of rows below M from their partials, as `merge_moments`: without a loop, because then as many of the
    loads are under way as registers hold."""
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
def load_statistics_of(
    stats_ptr, vectors, vector_bars, turn, row, M, K, eps, NORM: gl.constexpr, PARTIALS: gl.constexpr,
    TIMES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """TIMES rstd and -TIMES rstd mean of the rows of one tile."""
    ready, spent = vector_bars
    # No more rows at a time than there are threads, or two a thread: the loads of more fill the registers.
    TALL: gl.constexpr = min(HALVES * ROWS, 64 * WARPS)  # type: ignore[reportAssignmentType]
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])  # type: ignore[reportAssignmentType]
    PARTS: gl.constexpr = HALVES * ROWS // TALL
    rstd_s = as_tall(vectors[0], TALL)
    shift_s = as_tall(vectors[1], TALL)
    slot = turn % TURNS
    mbarrier.wait(spent.index(slot), (turn // TURNS & 1) ^ 1)
    for part in range(PARTS):
        rows = gl.minimum(row + part * TALL + gl.arange(0, TALL, LANES), M - 1)
        mean, m2 = merged_moments(stats_ptr, rows, M, K, PARTIALS)
        mean, rstd = shift_and_scale(mean, m2, K, eps, NORM)
        rstd_s.index(slot * PARTS + part).store(rstd * TIMES)
        shift_s.index(slot * PARTS + part).store(-mean * (rstd * TIMES))
    mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit
def load_statistics(
    stats_ptr, vectors, vector_bars, M, N, K, split, eps, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr, NORM: gl.constexpr, PARTIALS: gl.constexpr, TIMES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the warp that loads row statistics: those of all tiles of this program, in order."""
    if NORM != "none":
        follow(OVERLAP)
        own, all_turns, whole = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
        for turn in range(all_turns):
            row, _, _ = tile_of_turn(turn, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            load_statistics_of(
                stats_ptr, vectors, vector_bars, turn, row, M, K, eps, NORM, PARTIALS, TIMES, 1
            )  # fmt: skip
