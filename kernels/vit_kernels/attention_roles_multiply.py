"""The multiplying role of `attention_roles_kernel`: a warpgroup attends with 64 queries of a tile to all keys.

With the scores of block j, s_j = q k_j^T, a running maximum m of scale s and p_j = 2^(s_j scale - m):

    begin s_j,   begin o += p_(j-1) v_(j-1),   wait for s_j,   m and p_j in fp32,   wait for o,   round p_j, rescale o
"""

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

from .attention_whole import all_warps
from .linear_roles_ring import store_block
from .primitives import tiles_over

# Queries of a warpgroup.
ROWS = gl.constexpr(64)
# Warpgroups that multiply.
PARTS = gl.constexpr(3)
# The queries of the next tile arrive while those of this one are in use.
TURNS = gl.constexpr(2)
# A thread has two columns beside each other of every so many.
COLUMNS = gl.constexpr(8)


@gluon.jit
def number_of_tiles(sequences, queries):
    """How many tiles of queries this program computes."""
    tiles = sequences * tiles_over(queries, PARTS * ROWS)
    rounds = tiles // gl.num_programs(0)
    return rounds + ((gl.program_id(0) + rounds) % gl.num_programs(0) < tiles % gl.num_programs(0)).to(gl.int32)


@gluon.jit
def place_of_tile(turn, sequences, heads, queries, WIDTH: gl.constexpr):
    """(image, first query, first column) of a tile of this program; the tiles of a head follow each other, heads from
    the last to the first: what the launch before wrote last is in L2 still.

    A program is one place further on in each round: the last tile of a head may have few queries, and where tiles of a
    head divide programs, the same programs would always have it.
    """
    tile = turn * gl.num_programs(0) + (gl.program_id(0) + turn) % gl.num_programs(0)
    tiles_m = tiles_over(queries, PARTS * ROWS)
    head = sequences - 1 - tile // tiles_m
    return head // heads, tile % tiles_m * (PARTS * ROWS), head % heads * WIDTH


@gluon.jit
def _await_turn(ring, part: gl.constexpr, step):
    """Waits until the warpgroup whose turn is before has begun its products of block `step`, or the first of them, of
    the block before."""
    mbarrier.wait(ring[6].index(part), (step & 1) ^ (part == 0))


@gluon.jit
def _pass_turn(ring, part: gl.constexpr):
    mbarrier.arrive(ring[6].index((part + 1) % PARTS), count=1)


@gluon.jit
def _begin_scores(q, k, KEYS: gl.constexpr):
    """Begins q k^T [ROWS, KEYS] with the first KEYS keys of k [1, BLOCK_N, WIDTH]."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])  # type: ignore[reportAssignmentType]
    BLOCK_N: gl.constexpr = k.shape[1]
    WIDTH: gl.constexpr = k.shape[2]
    k = k.reshape((BLOCK_N, WIDTH)).slice(0, KEYS).permute((1, 0))
    return warpgroup_mma(q, k, gl.zeros((ROWS, KEYS), gl.float32, LAYOUT), use_acc=False, is_async=True)


@gluon.jit
def _begin_results(o, p, v):
    """Begins o + p v; p [ROWS, KEYS] stays in registers and meets the first KEYS values of v [1, BLOCK_N, WIDTH]."""
    KEYS: gl.constexpr = p.shape[1]
    BLOCK_N: gl.constexpr = v.shape[1]
    WIDTH: gl.constexpr = v.shape[2]
    return warpgroup_mma(p, v.reshape((BLOCK_N, WIDTH)).slice(0, KEYS), o, is_async=True)


@gluon.jit
def _masked(s, number):
    """s [ROWS, KEYS] with -inf behind its first `number` columns.

    By groups of columns: which of them a register holds is known to the compiler, where single columns, one number for
    each register, would be kept in registers all through the kernel.
    """
    KEYS: gl.constexpr = s.shape[1]
    LAYOUT: gl.constexpr = s.type.layout
    groups = s.reshape(ROWS, KEYS // COLUMNS, COLUMNS)
    BY_GROUP: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, groups.type.layout))  # type: ignore[reportAssignmentType]
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, groups.type.layout))  # type: ignore[reportAssignmentType]
    group = gl.arange(0, KEYS // COLUMNS, BY_GROUP)
    full = (number + (COLUMNS - 1) - gl.arange(0, COLUMNS, BY_COLUMN)) // COLUMNS
    groups = gl.where(group[None, :, None] < full[None, None, :], groups, float("-inf"))
    return gl.convert_layout(groups.reshape(ROWS, KEYS), LAYOUT)


@gluon.jit
def _sums(p):
    """Sums [ROWS, COLUMNS / 2] of those columns of p [ROWS, KEYS] that the same thread has."""
    KEYS: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(p.reshape(ROWS, KEYS // COLUMNS, COLUMNS // 2, 2), 3), 1)


@gluon.jit
def _soften(s, row_max, sums, logit_scale):
    """Scores s [ROWS, KEYS] join the running softmax: (p, row_max, sums, what the results before are multiplied by)."""
    BY_ROW: gl.constexpr = gl.SliceLayout(1, s.type.layout)  # type: ignore[reportAssignmentType]
    BY_SUM: gl.constexpr = gl.SliceLayout(1, sums.type.layout)  # type: ignore[reportAssignmentType]
    largest = gl.convert_layout(gl.max(s, 1), row_max.type.layout)
    new_max = gl.maximum(row_max, largest * logit_scale)
    p = gl.exp2(s * logit_scale - gl.convert_layout(new_max, BY_ROW)[:, None])
    rescale = gl.exp2(row_max - new_max)
    sums = sums * gl.convert_layout(rescale, BY_SUM)[:, None] + gl.convert_layout(_sums(p), sums.type.layout)
    return p, new_max, sums, rescale


@gluon.jit
def _operand(p, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """p, rounded, as the left operand of a product whose results have this layout."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)  # type: ignore[reportAssignmentType]
    return gl.convert_layout(p.to(DTYPE), OPERAND)


@gluon.jit
def _attend(
    part: gl.constexpr, o, p, row_max, sums, q, ring, step, number, logit_scale, KEYS: gl.constexpr,
    MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores with the KEYS keys of block `step`, or the first `number`, over the results of the block before."""
    k_s, v_s, k_full, k_empty, v_full, v_empty, _ = ring
    slot = step % STAGES
    before = (step + (STAGES - 1)) % STAGES
    mbarrier.wait(k_full.index(slot), step // STAGES & 1)
    _await_turn(ring, part, step)
    s = _begin_scores(q, k_s.index(slot), KEYS)
    o = _begin_results(o, p, v_s.index(before))
    _pass_turn(ring, part)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    if MASKED:
        s = _masked(s, number)
    p, row_max, sums, rescale = _soften(s, row_max, sums, logit_scale)
    # Stands here because it is a loop, and the compiler moves nothing across one: left alone, it has the exponentials
    # wait for the very product that they hide.
    mbarrier.wait(v_full.index(slot), step // STAGES & 1)
    o = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(v_empty.index(before), count=1)
    # Only now are the registers of the p before free.
    LAYOUT: gl.constexpr = o.type.layout
    p = _operand(p, v_s.dtype, LAYOUT)
    o = o * rescale[:, None]
    return o, p, row_max, sums


@gluon.jit
def _attend_all(
    part: gl.constexpr, o_desc, place, released, turn, image, row, column, ring, step, keys, logit_scale,
    HALF: gl.constexpr, REST: gl.constexpr, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Results of the queries in `place` [1, ROWS, WIDTH], which they replace there on their way out."""
    k_s, v_s, k_full, k_empty, v_full, v_empty, _ = ring
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])  # type: ignore[reportAssignmentType]
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)  # type: ignore[reportAssignmentType]
    q = place.reshape((ROWS, WIDTH))
    slot = step % STAGES
    mbarrier.wait(k_full.index(slot), step // STAGES & 1)
    _await_turn(ring, part, step)
    s = _begin_scores(q, k_s.index(slot), BLOCK_N)
    _pass_turn(ring, part)
    # The results of the tile before have left the place of its queries long since.
    tma.store_wait(0)
    mbarrier.arrive(released, count=1, pred=turn > 0)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    row_max = gl.full((ROWS,), float("-inf"), gl.float32, ROW)
    SCORES: gl.constexpr = s.type.layout
    sums = _sums(gl.zeros((ROWS, BLOCK_N), gl.float32, SCORES))
    p, row_max, sums, _ = _soften(s, row_max, sums, logit_scale)
    p = _operand(p, v_s.dtype, LAYOUT)
    mbarrier.wait(v_full.index(slot), step // STAGES & 1)
    o = gl.zeros((ROWS, WIDTH), gl.float32, LAYOUT)
    whole = step + keys // BLOCK_N
    for later in range(step + 1, whole):
        o, p, row_max, sums = _attend(
            part, o, p, row_max, sums, q, ring, later, BLOCK_N, logit_scale, BLOCK_N, False, STAGES
        )  # fmt: skip
    step = whole
    if HALF:
        o, p, row_max, sums = _attend(
            part, o, p, row_max, sums, q, ring, step, BLOCK_N, logit_scale, BLOCK_N // 2, False, STAGES
        )  # fmt: skip
        step += 1
    if REST:
        o, p, row_max, sums = _attend(
            part, o, p, row_max, sums, q, ring, step, keys % (BLOCK_N // 2), logit_scale, REST, True, STAGES
        )  # fmt: skip
        step += 1
    last = (step + (STAGES - 1)) % STAGES
    o = _begin_results(o, p, v_s.index(last))
    inverse = 1.0 / gl.convert_layout(gl.sum(sums, 1), ROW)
    o = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(v_empty.index(last), count=1)
    y = (o * inverse[:, None]).to(o_desc.dtype)
    # All four warps have read the queries whose place the results take.
    all_warps()
    q.store(y)
    fence_async_shared()
    store_block(o_desc, [image, row, column], place)
    return step


@gluon.jit
def _pass_by(part: gl.constexpr, released, turn, ring, step, blocks, STAGES: gl.constexpr):
    """What the other warpgroups, and the loading warp, expect of one that has no queries in a tile."""
    _, _, k_full, k_empty, v_full, v_empty, _ = ring
    tma.store_wait(0)
    mbarrier.arrive(released, count=1, pred=turn > 0)
    for _ in range(blocks):
        slot = step % STAGES
        mbarrier.wait(k_full.index(slot), step // STAGES & 1)
        mbarrier.arrive(k_empty.index(slot), count=1)
        _await_turn(ring, part, step)
        _pass_turn(ring, part)
        mbarrier.wait(v_full.index(slot), step // STAGES & 1)
        mbarrier.arrive(v_empty.index(slot), count=1)
        step += 1
    return step


@gluon.jit
def multiply(
    part: gl.constexpr, o_desc, queues, ring, numbers, logit_scale, HALF: gl.constexpr, REST: gl.constexpr,
    WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of a multiplying warpgroup: its part, 64 queries, of all tiles of this program, in order."""
    sequences, heads, queries, keys = numbers
    q_s, q_full, q_empty = queues
    step = 0
    for turn in range(number_of_tiles(sequences, queries)):
        image, row, column = place_of_tile(turn, sequences, heads, queries, WIDTH)
        row += part * ROWS
        at = turn % TURNS * PARTS + part
        released = q_empty.index((turn + 1) % TURNS * PARTS + part)
        mbarrier.wait(q_full.index(at), turn // TURNS & 1)
        if row < queries:
            step = _attend_all(
                part, o_desc, q_s.index(at), released, turn, image, row, column, ring, step, keys, logit_scale,
                HALF, REST, WIDTH, BLOCK_N, STAGES,
            )  # fmt: skip
        else:
            step = _pass_by(part, released, turn, ring, step, keys // BLOCK_N + HALF + (REST > 0), STAGES)
    tma.store_wait(0)
