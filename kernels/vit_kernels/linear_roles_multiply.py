"""The multiplying role of `linear_roles_kernel`: one or two warpgroups multiply rows of a tile, finish and store
them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .linear_roles_ring import NARROW, TURNS, narrow_tile, own_slot, share_of_tiles, store_block
from .primitives import STATS_COLUMNS, activate_fast, grouped_tile, product, rounded


@gluon.jit
def _store_stats(y_stats_ptr, y, row, column, M, N):
    """The moments of finished rows y [rows, width], one partial per 64 columns, into [2, N / 64, M]."""
    ROWS: gl.constexpr = y.shape[0]
    PARTS: gl.constexpr = y.shape[1] // STATS_COLUMNS
    groups = y.reshape(ROWS, PARTS, STATS_COLUMNS)
    mean = gl.sum(groups, 2) * (1.0 / STATS_COLUMNS)
    apart = groups - gl.expand_dims(mean, 2)
    m2 = gl.sum(product(apart, apart), 2)
    LAYOUT: gl.constexpr = mean.type.layout
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    parts = column // STATS_COLUMNS + gl.arange(0, PARTS, gl.SliceLayout(0, LAYOUT))
    at = y_stats_ptr + parts[None, :].to(gl.int64) * M + rows[:, None]
    keep = (rows < M)[:, None] & (parts < N // STATS_COLUMNS)[None, :]
    gl.store(at, mean, mask=keep)
    gl.store(at + gl.to_tensor(N // STATS_COLUMNS).to(gl.int64) * M, m2, mask=keep)


@gluon.jit
def _row_vectors(vectors, turn, group: gl.constexpr, GROUPS: gl.constexpr, LAYOUT: gl.constexpr, NORM: gl.constexpr):
    """What these rows are multiplied by, and what is added to them per weight sum."""
    rstd_s, shift_s, _, _, _ = vectors
    ROWS: gl.constexpr = rstd_s.shape[1]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)  # type: ignore[reportAssignmentType]
    rstd = gl.zeros((ROWS,), gl.float32, BY_ROW)
    shift = rstd
    if NORM != "none":
        rstd = rstd_s.index(turn % TURNS * GROUPS + group).load(BY_ROW)
    if NORM == "layer":
        shift = shift_s.index(turn % TURNS * GROUPS + group).load(BY_ROW)
    return rstd, shift


@gluon.jit
def _finish(
    acc, y_desc, y_stats_ptr, place, vectors, turn, group: gl.constexpr, row, column, M, N, FIRST: gl.constexpr,
    GROUPS: gl.constexpr, NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """Everything behind the product of some rows: folded norm, bias, activation, LayerScale, residual, store, moments.

    FIRST: the column of the tile that acc begins at.
    """
    _, _, bias_s, column_sum_s, scale_s = vectors
    WIDTH: gl.constexpr = acc.shape[1]
    LAYOUT: gl.constexpr = acc.type.layout
    rstd, shift = _row_vectors(vectors, turn, group, GROUPS, LAYOUT, NORM)
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)  # type: ignore[reportAssignmentType]
    slot = turn % TURNS
    if NORM == "none":
        acc = acc * TIMES
    else:
        acc = acc * rstd[:, None]
    if NORM == "layer":
        column_sum = column_sum_s.index(slot).slice(FIRST, WIDTH).load(BY_COLUMN)
        if HAS_BIAS:
            bias = bias_s.index(slot).slice(FIRST, WIDTH).load(BY_COLUMN)
            acc = acc + (shift[:, None] * column_sum[None, :] + bias[None, :])
        else:
            acc = acc + shift[:, None] * column_sum[None, :]
    elif HAS_BIAS:
        acc = acc + bias_s.index(slot).slice(FIRST, WIDTH).load(BY_COLUMN)[None, :]
    if ACTIVATION != "none":
        acc = activate_fast(acc, ACTIVATION)
    if HAS_SCALE:
        acc = acc * scale_s.index(slot).slice(FIRST, WIDTH).load(BY_COLUMN)[None, :]
    if HAS_RESIDUAL:
        acc = acc + place.load(acc.type.layout).to(gl.float32)
    y, stored = rounded(acc, y_desc.dtype)
    place.store(y)
    fence_async_shared()
    store_block(y_desc, [row, column + FIRST], place)
    if EMIT_STATS:
        _store_stats(y_stats_ptr, stored, row, column + FIRST, M, N)


@gluon.jit
def accumulators(ROWS: gl.constexpr, WIDTH: gl.constexpr, TAIL: gl.constexpr):
    """Sums of ROWS rows of a tile of WIDTH + TAIL columns; without a tail a number stands for it."""
    WARPS: gl.constexpr = ROWS // 16
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])  # type: ignore[reportAssignmentType]
    tail = 0
    if TAIL:
        TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TAIL, 16])  # type: ignore[reportAssignmentType]
        tail = gl.zeros((ROWS, TAIL), gl.float32, TAIL_LAYOUT)
    return gl.zeros((ROWS, WIDTH), gl.float32, LAYOUT), tail


@gluon.jit
def multiply_step(
    acc, tail, ring, step, group: gl.constexpr, WIDTH: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
    ADD: gl.constexpr,
):  # fmt: skip
    """Begins one step's product, added to the sums or, in the first step, in their place; ends the one
    before."""
    x_s, w_s, tail_s, full, _ = ring
    GROUPS: gl.constexpr = x_s.shape[0] // w_s.shape[0]
    slot = step % STAGES
    mbarrier.wait(full.index(slot), step // STAGES & 1)
    x = x_s.index(slot * GROUPS + group)
    acc = warpgroup_mma(x, w_s.index(slot).slice(0, WIDTH).permute((1, 0)), acc, use_acc=ADD, is_async=True)
    if TAIL:
        tail = warpgroup_mma(x, tail_s.index(slot).permute((1, 0)), tail, use_acc=ADD, is_async=True)
        acc, tail = warpgroup_mma_wait(2, deps=(acc, tail))  # type: ignore[reportGeneralTypeIssues]
    else:
        acc = warpgroup_mma_wait(1, deps=(acc,))
    return acc, tail


@gluon.jit
def end_products(acc, tail, TAIL: gl.constexpr):
    """Waits for the last step's."""
    if TAIL:
        acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))  # type: ignore[reportGeneralTypeIssues]
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, tail


@gluon.jit
def _multiply_tile(
    group: gl.constexpr, y_desc, tail_y_desc, y_stats_ptr, ring, third, vectors, vector_bars, step, turn, row, column,
    M, N, K, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr, TAIL: gl.constexpr,
    NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """Multiplies and finishes the rows of number `group` of the tile at (row, column)."""
    x_s, w_s, tail_s, full, empty = ring
    third_place, third_tail, third_full, third_empty = third
    ready, spent = vector_bars
    GROUPS: gl.constexpr = x_s.shape[0] // w_s.shape[0]
    ROWS: gl.constexpr = x_s.shape[1]
    acc, tail = accumulators(ROWS, WIDTH, TAIL)
    # The place of this warpgroup's results of the tile before is given back under the first product of this one,
    # because it takes long to empty.
    acc, tail = multiply_step(acc, tail, ring, step, group, WIDTH, TAIL, STAGES, False)
    if turn > 0:
        tma.store_wait(0)
    if GROUPS == 1:
        for half in gl.static_range(2):  # type: ignore[reportGeneralTypeIssues]
            mbarrier.arrive(empty.index((step + (STAGES - 2 + half)) % STAGES), count=1, pred=turn > 0)
    elif group < 2:
        held = (step + (STAGES - 2 + group)) % STAGES
        # For the other warpgroups, too, which have no part in this slot.
        mbarrier.arrive(empty.index(held), count=GROUPS, pred=turn > 0)
    else:
        mbarrier.arrive(third_empty, count=1, pred=turn > 0)
    step += 1
    for _ in range(BLOCK_K, K, BLOCK_K):
        acc, tail = multiply_step(acc, tail, ring, step, group, WIDTH, TAIL, STAGES, True)
        mbarrier.arrive(empty.index((step + (STAGES - 1)) % STAGES), count=1)
        step += 1
    mbarrier.wait(ready.index(turn % TURNS), turn // TURNS & 1)
    acc, tail = end_products(acc, tail, TAIL)
    mbarrier.arrive(empty.index((step + (STAGES - 1)) % STAGES), count=1)
    if GROUPS == 1:
        HALF: gl.constexpr = y_desc.block_shape[1]
        halves = (acc, acc)
        if HALF < WIDTH:
            halves = acc.reshape((ROWS, 2, HALF)).permute((0, 2, 1)).split()
        for half in gl.static_range(WIDTH // HALF):  # type: ignore[reportGeneralTypeIssues]
            own = (step + half) % STAGES
            mbarrier.wait(full.index(own), (step + half) // STAGES & 1)
            _finish(
                halves[half], y_desc, y_stats_ptr, own_slot(ring, own, y_desc, HALF), vectors, turn, group, row, column,
                M, N, half * HALF, GROUPS, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
            )  # fmt: skip
    else:
        if group < 2:
            own = (step + group) % STAGES
            mbarrier.wait(full.index(own), (step + group) // STAGES & 1)
            place = own_slot(ring, own, y_desc, WIDTH)
            tail_place = tail_s.index(own)
        else:
            mbarrier.wait(third_full, turn & 1)
            place = third_place.slice(0, WIDTH, 1)
            tail_place = third_tail
        _finish(
            acc, y_desc, y_stats_ptr, place, vectors, turn, group, row + group * ROWS, column, M, N, 0, GROUPS, NORM,
            ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
        )  # fmt: skip
        if TAIL:
            _finish(
                tail, tail_y_desc, y_stats_ptr, tail_place, vectors, turn, group, row + group * ROWS, column, M, N,
                WIDTH, GROUPS, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
            )  # fmt: skip
    mbarrier.arrive(spent.index(turn % TURNS), count=1)
    step += 2
    return step


@gluon.jit
def multiply(
    group: gl.constexpr, y_desc, narrow_y_desc, y_stats_ptr, ring, third, vectors, vector_bars, M, N, K, split,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """The role of one multiplying warpgroup or two: their rows of all tiles of this program, in order."""
    w_s = ring[1]
    WIDTH: gl.constexpr = w_s.shape[1]
    step = 0
    turn = 0
    programs = gl.num_programs(0)
    whole, first, pieces = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    for tile in range(gl.program_id(0), whole, programs):
        tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = _multiply_tile(
            group, y_desc, narrow_y_desc, y_stats_ptr, ring, third, vectors, vector_bars, step, turn, tile_m * BLOCK_M,
            tile_n * BLOCK_N, M, N, K, BLOCK_K, STAGES, WIDTH, BLOCK_N - WIDTH, NORM, ACTIVATION, TIMES, HAS_BIAS,
            HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
        )  # fmt: skip
        turn += 1
    for piece in range(first, pieces, programs):
        row, column = narrow_tile(piece, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = _multiply_tile(
            group, narrow_y_desc, narrow_y_desc, y_stats_ptr, ring, third, vectors, vector_bars, step, turn, row,
            column, M, N, K, BLOCK_K, STAGES, NARROW, 0, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL,
            EMIT_STATS,
        )  # fmt: skip
        turn += 1
    tma.store_wait(0)
