"""The multiplying role of `linear_roles_kernel`: a warpgroup multiplies 64 rows of a tile, finishes and stores them."""

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
def _row_vectors(
    vectors, turn, half: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr, NORM: gl.constexpr
):  # fmt: skip
    """What the rows of a warpgroup are multiplied by, and what is added to them per weight sum."""
    rstd_s, shift_s, _, _, _ = vectors
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)  # type: ignore[reportAssignmentType]
    rstd = gl.zeros((ROWS,), gl.float32, BY_ROW)
    shift = rstd
    if NORM != "none":
        rstd = rstd_s.index(turn % TURNS).slice(half * ROWS, ROWS).load(BY_ROW)
    if NORM == "layer":
        shift = shift_s.index(turn % TURNS).slice(half * ROWS, ROWS).load(BY_ROW)
    return rstd, shift


@gluon.jit
def _finish(
    acc, rstd, shift, y_desc, y_stats_ptr, place, vectors, turn, row, column, M, N, NORM: gl.constexpr,
    ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """Everything behind the product of 64 rows: folded norm, bias, activation, LayerScale, residual, store, moments."""
    _, _, bias_s, column_sum_s, scale_s = vectors
    WIDTH: gl.constexpr = acc.shape[1]
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, acc.type.layout)  # type: ignore[reportAssignmentType]
    slot = turn % TURNS
    if NORM == "none":
        acc = acc * TIMES
    else:
        acc = acc * rstd[:, None]
    if NORM == "layer":
        column_sum = column_sum_s.index(slot).slice(0, WIDTH).load(BY_COLUMN)
        if HAS_BIAS:
            bias = bias_s.index(slot).slice(0, WIDTH).load(BY_COLUMN)
            acc = acc + (shift[:, None] * column_sum[None, :] + bias[None, :])
        else:
            acc = acc + shift[:, None] * column_sum[None, :]
    elif HAS_BIAS:
        acc = acc + bias_s.index(slot).slice(0, WIDTH).load(BY_COLUMN)[None, :]
    if ACTIVATION != "none":
        acc = activate_fast(acc, ACTIVATION)
    if HAS_SCALE:
        acc = acc * scale_s.index(slot).slice(0, WIDTH).load(BY_COLUMN)[None, :]
    if HAS_RESIDUAL:
        acc = acc + place.load(acc.type.layout).to(gl.float32)
    y, stored = rounded(acc, y_desc.dtype)
    place.store(y)
    fence_async_shared()
    store_block(y_desc, [row, column], place)
    if EMIT_STATS:
        _store_stats(y_stats_ptr, stored, row, column, M, N)


@gluon.jit
def multiply_step(
    acc, ring, step, half: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    ADD: gl.constexpr,
):  # fmt: skip
    """Begins one step's product of 64 rows, added to acc or, in the first step, in its place; ends the one before."""
    x_s, w_s, full, _ = ring
    slot = step % STAGES
    mbarrier.wait(full.index(slot), step // STAGES & 1)
    x = x_s.index(slot).slice(half * ROWS, ROWS)
    w = w_s.index(slot).slice(0, WIDTH).permute((1, 0))
    acc = warpgroup_mma(x, w, acc, use_acc=ADD, is_async=True)
    return warpgroup_mma_wait(1, deps=(acc,))


@gluon.jit
def _multiply_tile(
    half: gl.constexpr, y_desc, y_stats_ptr, ring, vectors, vector_bars, step, turn, row, column, M, N, K,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr,
    NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """Multiplies and finishes one half, 64 rows, of the tile at (row, column)."""
    _, _, full, empty = ring
    ready, spent = vector_bars
    ROWS: gl.constexpr = BLOCK_M // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])  # type: ignore[reportAssignmentType]
    acc = gl.zeros((ROWS, WIDTH), gl.float32, LAYOUT)
    # The slot of this warpgroup's results of the tile before: given back under the first product of this one, because
    # it takes long to empty.
    held = (step + (STAGES - 2 + half)) % STAGES
    acc = multiply_step(acc, ring, step, half, ROWS, WIDTH, STAGES, False)
    if turn > 0:
        tma.store_wait(0)
    # Twice, for the other warpgroup has no part in this slot.
    mbarrier.arrive(empty.index(held), count=2, pred=turn > 0)
    step += 1
    for _ in range(BLOCK_K, K, BLOCK_K):
        acc = multiply_step(acc, ring, step, half, ROWS, WIDTH, STAGES, True)
        mbarrier.arrive(empty.index((step + (STAGES - 1)) % STAGES), count=1)
        step += 1
    own = step + half
    mbarrier.wait(ready.index(turn % TURNS), turn // TURNS & 1)
    rstd, shift = _row_vectors(vectors, turn, half, ROWS, LAYOUT, NORM)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + (STAGES - 1)) % STAGES), count=1)
    mbarrier.wait(full.index(own % STAGES), own // STAGES & 1)
    place = own_slot(ring, own % STAGES, y_desc, WIDTH)
    _finish(
        acc, rstd, shift, y_desc, y_stats_ptr, place, vectors, turn, row + half * ROWS, column, M, N, NORM, ACTIVATION,
        TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
    )  # fmt: skip
    mbarrier.arrive(spent.index(turn % TURNS), count=1)
    step += 2
    return step


@gluon.jit
def multiply(
    half: gl.constexpr, y_desc, narrow_y_desc, y_stats_ptr, ring, vectors, vector_bars, M, N, K,
    split, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """The role of a multiplying warpgroup: its half of all tiles of this program, in order."""
    step = 0
    turn = 0
    programs = gl.num_programs(0)
    whole, first, pieces = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    for tile in range(gl.program_id(0), whole, programs):
        tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = _multiply_tile(
            half, y_desc, y_stats_ptr, ring, vectors, vector_bars, step, turn, tile_m * BLOCK_M,
            tile_n * BLOCK_N, M, N, K, BLOCK_M, BLOCK_K, STAGES, BLOCK_N, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE,
            HAS_RESIDUAL, EMIT_STATS,
        )  # fmt: skip
        turn += 1
    for piece in range(first, pieces, programs):
        row, column = narrow_tile(piece, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = _multiply_tile(
            half, narrow_y_desc, y_stats_ptr, ring, vectors, vector_bars, step, turn, row, column,
            M, N, K, BLOCK_M, BLOCK_K, STAGES, NARROW, NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL,
            EMIT_STATS,
        )  # fmt: skip
        turn += 1
    tma.store_wait(0)
