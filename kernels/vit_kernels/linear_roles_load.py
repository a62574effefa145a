"""The loading roles of `linear_roles_kernel`: one warp brings operands and residuals, two the vectors of a tile."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .linear_roles_ring import NARROW, ROWS, TURNS, load_block, narrow_tile, own_slot, share_of_tiles
from .primitives import STATS_COLUMNS, follow, grouped_tile, shift_and_scale, tiles_over

# Row statistics are many small loads: two warps wait for them.
VECTOR_WARPS = gl.constexpr(2)


@gluon.jit
def _load_weights(w_desc, tail_desc, ring, slot, column, k, WIDTH: gl.constexpr, TAIL: gl.constexpr):
    """Loads the weights of a step, and has the slot's barrier expect x beside them."""
    x_s, w_s, tail_s, full, _ = ring
    GROUPS: gl.constexpr = x_s.shape[0] // w_s.shape[0]
    BYTES: gl.constexpr = (GROUPS * x_s.shape[1] + WIDTH + TAIL) * x_s.shape[2] * 2
    mbarrier.expect(full.index(slot), BYTES)
    load_block(w_desc, [column, k], full.index(slot), w_s.index(slot).slice(0, WIDTH))
    if TAIL:
        load_block(tail_desc, [column + WIDTH, k], full.index(slot), tail_s.index(slot))


@gluon.jit
def load_weights_ahead(
    w_desc, tail_desc, ring, column, first, steps, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr,
    TAIL: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Loads the weights of the first steps of a program, as many as there are slots, and then waits for the launch
    before, which they do not depend on; returns how many steps these were."""
    ahead = gl.minimum(steps, STAGES)
    for step in range(ahead):
        _load_weights(w_desc, tail_desc, ring, step, column, (first + step) * BLOCK_K, WIDTH, TAIL)
    follow(OVERLAP)
    return ahead


@gluon.jit
def load_step(
    x_desc, w_desc, tail_desc, ring, step, ahead, row, column, k, STAGES: gl.constexpr, WIDTH: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """Loads the operands of a step, weights only from step number `ahead` on."""
    x_s, w_s, _, full, empty = ring
    GROUPS: gl.constexpr = x_s.shape[0] // w_s.shape[0]
    slot = step % STAGES
    if step >= ahead:
        mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
        _load_weights(w_desc, tail_desc, ring, slot, column, k, WIDTH, TAIL)
    for group in gl.static_range(GROUPS):  # type: ignore[reportGeneralTypeIssues]
        load_block(x_desc, [row + group * x_s.shape[1], k], full.index(slot), x_s.index(slot * GROUPS + group))


@gluon.jit
def _load_residual(
    residual_desc, tail_desc, full, place, tail_place, row, column, WIDTH: gl.constexpr, TAIL: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Brings a residual to where the results will be, or only says that these may come."""
    if HAS_RESIDUAL:
        TOGETHER: gl.constexpr = residual_desc.block_shape[0]
        mbarrier.expect(full, TOGETHER * (WIDTH + TAIL) * 2)
        load_block(residual_desc, [row, column], full, place)
        if TAIL:
            load_block(tail_desc, [row, column + WIDTH], full, tail_place)
    else:
        mbarrier.arrive(full, count=1)


@gluon.jit
def _load_tile(
    x_desc, w_desc, tail_w_desc, residual_desc, tail_residual_desc, ring, third, step, turn, ahead, row, column, K,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr, TAIL: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Loads the operands of the tile at (row, column), step by step, and hands out places for results, with its
    residual: two slots, and the third place to the third warpgroup if there is one."""
    x_s, w_s, tail_s, full, empty = ring
    GROUPS: gl.constexpr = x_s.shape[0] // w_s.shape[0]
    for k in range(0, K, BLOCK_K):
        load_step(x_desc, w_desc, tail_w_desc, ring, step, ahead, row, column, k, STAGES, WIDTH, TAIL)
        step += 1
    # Warpgroups that go together have the columns of a tile in two halves, and those of a narrow one in the first slot.
    HALF: gl.constexpr = residual_desc.block_shape[1] if HAS_RESIDUAL else WIDTH
    for group in gl.static_range(2):  # type: ignore[reportGeneralTypeIssues]
        slot = step % STAGES
        mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
        if GROUPS == 1:
            if group * HALF < WIDTH:
                place = own_slot(ring, slot, residual_desc, HALF) if HAS_RESIDUAL else w_s.index(slot)
                _load_residual(
                    residual_desc, tail_residual_desc, full.index(slot), place, tail_s.index(slot), row,
                    column + group * HALF, HALF, 0, HAS_RESIDUAL,
                )  # fmt: skip
            else:
                mbarrier.arrive(full.index(slot), count=1)
        else:
            place = own_slot(ring, slot, residual_desc, WIDTH) if HAS_RESIDUAL else w_s.index(slot)
            _load_residual(
                residual_desc, tail_residual_desc, full.index(slot), place, tail_s.index(slot), row + group * ROWS,
                column, WIDTH, TAIL, HAS_RESIDUAL,
            )  # fmt: skip
        step += 1
    if GROUPS == 3:
        place, tail_place, third_full, third_empty = third
        mbarrier.wait(third_empty, (turn & 1) ^ 1)
        _load_residual(
            residual_desc, tail_residual_desc, third_full, place.slice(0, WIDTH, 1), tail_place, row + 2 * ROWS, column,
            WIDTH, TAIL, HAS_RESIDUAL,
        )  # fmt: skip
    return step


@gluon.jit
def load_operands(
    x_desc, w_desc, narrow_w_desc, residual_desc, narrow_residual_desc, ring, third, M, N, K, split,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the loading warp: the operands and residuals of all tiles of this program, in order."""
    WIDTH: gl.constexpr = w_desc.block_shape[0]
    TAIL: gl.constexpr = BLOCK_N - WIDTH
    step = 0
    turn = 0
    programs = gl.num_programs(0)
    whole, first, pieces = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    # Every program has a whole tile to begin with.
    _, tile_n = grouped_tile(gl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    steps = tiles_over(K, BLOCK_K)
    ahead = load_weights_ahead(
        w_desc, narrow_w_desc, ring, tile_n * BLOCK_N, 0, steps, BLOCK_K, STAGES, WIDTH, TAIL, OVERLAP
    )
    for tile in range(gl.program_id(0), whole, programs):
        tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = _load_tile(
            x_desc, w_desc, narrow_w_desc, residual_desc, narrow_residual_desc, ring, third, step, turn, ahead,
            tile_m * BLOCK_M, tile_n * BLOCK_N, K, BLOCK_K, STAGES, WIDTH, TAIL, HAS_RESIDUAL,
        )  # fmt: skip
        turn += 1
    for piece in range(first, pieces, programs):
        row, column = narrow_tile(piece, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        step = _load_tile(
            x_desc, narrow_w_desc, narrow_w_desc, narrow_residual_desc, narrow_residual_desc, ring, third, step, turn,
            ahead, row, column, K, BLOCK_K, STAGES, NARROW, 0, HAS_RESIDUAL,
        )  # fmt: skip
        turn += 1


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
    PIECES: gl.constexpr = rstd_s.shape[1] // ROWS
    ready, spent = vector_bars
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [VECTOR_WARPS], [0])  # type: ignore[reportAssignmentType]
    slot = turn % TURNS
    mbarrier.wait(spent.index(slot), (turn // TURNS & 1) ^ 1)
    for part in gl.static_range(WIDTH // NARROW):  # type: ignore[reportGeneralTypeIssues]
        columns = column + part * NARROW + gl.arange(0, NARROW, LANES)
        keep = columns < N
        if HAS_BIAS:
            bias = gl.load(bias_ptr + columns.to(gl.int64) * stride_bias, mask=keep, other=0.0)
            bias_s.index(slot).slice(part * NARROW, NARROW).store(bias.to(gl.float32) * TIMES)
        if HAS_SCALE:
            scale = gl.load(scale_ptr + columns.to(gl.int64) * stride_scale, mask=keep, other=0.0)
            scale_s.index(slot).slice(part * NARROW, NARROW).store(scale.to(gl.float32))
        if NORM == "layer":
            column_sum = gl.load(column_sum_ptr + columns, mask=keep, other=0.0)
            column_sum_s.index(slot).slice(part * NARROW, NARROW).store(column_sum)
    if NORM != "none":
        # 64 rows at a time: the loads of more fill the registers.
        for piece in gl.static_range(BLOCK_M // ROWS):  # type: ignore[reportGeneralTypeIssues]
            rows = gl.minimum(row + piece * ROWS + gl.arange(0, ROWS, LANES), M - 1)
            mean, m2 = _merged_moments(stats_ptr, rows, M, K, PARTIALS)
            mean, rstd = shift_and_scale(mean, m2, K, eps, NORM)
            own = slot * (BLOCK_M // ROWS // PIECES) + piece // PIECES
            rstd_s.index(own).slice(piece % PIECES * ROWS, ROWS).store(rstd * TIMES)
            shift_s.index(own).slice(piece % PIECES * ROWS, ROWS).store(-mean * (rstd * TIMES))
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
