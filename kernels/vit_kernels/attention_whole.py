"""Attention on sm_90 for sequences whose keys and values fit shared memory whole: its kernel, in Gluon.

A program loads all keys and values of a head once, by descriptors, and goes through tiles of queries with them:

    s = q k^T,   m = max s,   p = 2^(c (s - m)),   o = (p v) / sum p,     c = log2(e) scale

No block of keys rescales the results of others, because the maximum of a row is known before its first exponential,
and nothing waits for memory but the first tile. Blocks are of 64 keys, and what whole blocks leave over is in one of
its own that is no wider than it must be: 197 keys are 3 x 64 + 16. What lies past the last key reads as zero and its
scores are replaced; queries past the last are not stored.
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

from .linear_roles_ring import barriers, load_block, store_block
from .primitives import follow, rounded

# Triton 3.6 has only the old name.
all_warps = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Tiles of queries in shared memory at a time; their results leave from there.
SLOTS = gl.constexpr(2)


@gluon.jit
def _begin_scores(q, k, KEYS: gl.constexpr):
    """Begins q k^T [BLOCK_M, KEYS]; k [1, KEYS, WIDTH]."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])  # type: ignore[reportAssignmentType]
    ROWS: gl.constexpr = q.shape[0]
    WIDTH: gl.constexpr = k.shape[2]
    nothing = gl.zeros((ROWS, KEYS), gl.float32, LAYOUT)
    return warpgroup_mma(q, k.reshape((KEYS, WIDTH)).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _begin_results(o, p, v, LAYOUT: gl.constexpr, KEYS: gl.constexpr, ADD: gl.constexpr):
    """Begins p v, added to o or in its place; p [BLOCK_M, KEYS] stays in registers, v [1, KEYS, WIDTH]."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)  # type: ignore[reportAssignmentType]
    WIDTH: gl.constexpr = v.shape[2]
    p, _ = rounded(p, v.dtype)
    return warpgroup_mma(gl.convert_layout(p, OPERAND), v.reshape((KEYS, WIDTH)), o, use_acc=ADD, is_async=True)


@gluon.jit
def _load_all(desc, rest_desc, image, column, ready, blocks, rest, BLOCKS: gl.constexpr, REST: gl.constexpr):
    """Loads all keys, or all values, of a head: blocks [BLOCKS, 1, BLOCK_N, WIDTH], rest [1, REST, WIDTH]."""
    BLOCK_N: gl.constexpr = blocks.shape[2]
    BYTES: gl.constexpr = (BLOCKS * BLOCK_N + REST) * blocks.shape[3] * 2
    mbarrier.expect(ready, BYTES)
    for i in gl.static_range(BLOCKS):  # type: ignore[reportGeneralTypeIssues]
        load_block(desc, [image, i * BLOCK_N, column], ready, blocks.index(i))
    if REST:
        load_block(rest_desc, [image, BLOCKS * BLOCK_N, column], ready, rest)


@gluon.jit
def _load_queries(q_desc, image, tile, column, ready, place):
    BLOCK_M: gl.constexpr = place.shape[1]
    mbarrier.expect(ready, q_desc.block_type.nbytes)
    load_block(q_desc, [image, tile * BLOCK_M, column], ready, place)


# One compiled kernel for every number of queries, and of keys that leaves as many blocks.
@gluon.jit(do_not_specialize=["queries", "keys", "tiles_each"])
def attention_whole_kernel(
    q_desc,  # [B, Nq, H * WIDTH] in blocks of [1, BLOCK_M, WIDTH]
    k_desc,  # [B, Nk, H * WIDTH] in blocks of [1, BLOCK_N, WIDTH]
    v_desc,  # as k_desc
    k_rest_desc,  # as k_desc, in blocks of [1, REST, WIDTH]
    v_rest_desc,  # as k_rest_desc
    o_desc,  # as q_desc
    heads,
    queries,
    keys,
    tiles_each,
    logit_scale,
    BLOCKS: gl.constexpr,
    REST: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """This program computes `tiles_each` tiles of queries, or as many as are left, of one head of one image.

    The programs of a head follow each other, from the last to the first: what the launch before wrote last is in L2
    still. BLOCKS: whole blocks of keys, 1 to 4; REST: width of the one that they
    leave over, 0 if there is none. WIDTH, BLOCK_M and BLOCK_N are 64.
    """
    follow(OVERLAP)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])  # type: ignore[reportAssignmentType]
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)  # type: ignore[reportAssignmentType]
    q_s = gl.allocate_shared_memory(q_desc.dtype, [SLOTS, 1, BLOCK_M, WIDTH], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [BLOCKS, 1, BLOCK_N, WIDTH], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [BLOCKS, 1, BLOCK_N, WIDTH], v_desc.layout)
    k_rest_s, v_rest_s = k_s, v_s
    if REST:
        k_rest_s = gl.allocate_shared_memory(k_desc.dtype, [1, REST, WIDTH], k_rest_desc.layout)
        v_rest_s = gl.allocate_shared_memory(v_desc.dtype, [1, REST, WIDTH], v_rest_desc.layout)
    q_ready, k_ready, v_ready = barriers(SLOTS, 1), barriers(1, 1).index(0), barriers(1, 1).index(0)
    fence_async_shared()

    tiles = (queries - 1) // BLOCK_M + 1
    parts = (tiles - 1) // tiles_each + 1
    program = gl.num_programs(0) - 1 - gl.program_id(0)
    first = program % parts * tiles_each
    number = gl.minimum(tiles - first, tiles_each)
    image = program // parts // heads
    column = program // parts % heads * WIDTH
    _load_queries(q_desc, image, first, column, q_ready.index(0), q_s.index(0))
    _load_all(k_desc, k_rest_desc, image, column, k_ready, k_s, k_rest_s, BLOCKS, REST)
    _load_all(v_desc, v_rest_desc, image, column, v_ready, v_s, v_rest_s, BLOCKS, REST)
    if number > 1:
        _load_queries(q_desc, image, first + 1, column, q_ready.index(1), q_s.index(1))

    mbarrier.wait(k_ready, 0)
    for tile in range(number):
        slot = q_s.index(tile % SLOTS)
        mbarrier.wait(q_ready.index(tile % SLOTS), tile // SLOTS & 1)
        q = slot.reshape((BLOCK_M, WIDTH))
        s = ()
        for i in gl.static_range(BLOCKS):  # type: ignore[reportGeneralTypeIssues]
            s = s + (_begin_scores(q, k_s.index(i), BLOCK_N),)
        if REST:
            s = s + (_begin_scores(q, k_rest_s, REST),)
        # When the results of the tile before have left its slot, the queries of the tile behind this one may come.
        tma.store_wait(0)
        if tile > 0 and tile + 1 < number:
            after = (tile + 1) % SLOTS
            _load_queries(q_desc, image, first + tile + 1, column, q_ready.index(after), q_s.index(after))
        if BLOCKS > 1 or REST > 0:
            s = warpgroup_mma_wait(0, deps=s)
        else:
            s = (warpgroup_mma_wait(0, deps=s),)

        largest = s[0]
        for i in gl.static_range(1, BLOCKS):  # type: ignore[reportGeneralTypeIssues]
            largest = gl.maximum(largest, s[i])
        row_max = gl.max(largest, 1)
        if REST:
            key = BLOCKS * BLOCK_N + gl.arange(0, REST, gl.SliceLayout(0, s[BLOCKS].type.layout))
            rest = gl.where((key < keys)[None, :], s[BLOCKS], float("-inf"))
            row_max = gl.maximum(row_max, gl.convert_layout(gl.max(rest, 1), ROW))
        row_max = row_max * logit_scale

        mbarrier.wait(v_ready, 0)
        o = gl.zeros((BLOCK_M, WIDTH), gl.float32, LAYOUT)
        total = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, LAYOUT)
        for i in gl.static_range(BLOCKS):  # type: ignore[reportGeneralTypeIssues]
            p = gl.exp2(s[i] * logit_scale - row_max[:, None])
            total = total + p if i > 0 else p
            o = _begin_results(o, p, v_s.index(i), LAYOUT, BLOCK_N, i > 0)
        row_sum = gl.sum(total, 1)
        if REST:
            offset = gl.convert_layout(row_max, gl.SliceLayout(1, rest.type.layout))
            p = gl.exp2(rest * logit_scale - offset[:, None])
            row_sum = row_sum + gl.convert_layout(gl.sum(p, 1), ROW)
            o = _begin_results(o, p, v_rest_s, LAYOUT, REST, True)
        o = warpgroup_mma_wait(0, deps=(o,))
        y, _ = rounded(o * (1.0 / row_sum)[:, None], q_desc.dtype)
        # All four warps have read the queries whose place the results take.
        all_warps()
        q.store(y)
        fence_async_shared()
        store_block(o_desc, [image, (first + tile) * BLOCK_M, column], slot)
    tma.store_wait(0)
