"""Attention on sm_90 for sequences of more keys than `attention_whole` holds: its kernel, in Gluon.

Its warps have roles. One warp loads queries, keys and values; every other warpgroup attends with 64 queries of a tile,
by a running softmax over blocks of keys (arXiv 2205.14135, algorithm 1), and has two products under way at a time:

    s_j = q k_j^T   and, under the softmax of s_j,   o += p_(j-1) v_(j-1)

so that tensor cores and exponential unit work at the same time, in one warpgroup and across them (arXiv 2407.08608).
What whole blocks of keys leave over comes last, in a block that is no wider than it must be: 577 keys are 4 x 128 + 64
+ 1. What lies past the last key reads as zero and its scores are replaced; queries past the last are not stored.

A barrier's n-th use is waited for by its parity, n & 1. Nobody fills a slot before everybody has let go of it:

    k_full[slot], v_full[slot]   a block has arrived       k_empty[slot], v_empty[slot]   all warpgroups have used it
    q_full[part]   queries of a warpgroup have arrived     q_empty[part]   the results that took their place have left
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .attention_roles_multiply import ROWS, TURNS, multiply, place_of_tile
from .linear_roles_ring import barriers, load_block
from .primitives import follow, tiles_over


@gluon.jit
def _load_block(desc, image, key, column, step, full, empty, place, KEYS: gl.constexpr, STAGES: gl.constexpr):
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    load_block(desc, [image, key, column], full.index(slot), place.index(slot).slice(0, KEYS, 1))


@gluon.jit
def load(
    q_desc, k_desc, v_desc, k_rest_desc, v_rest_desc, queues, ring, numbers,
    REST: gl.constexpr, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of the loading warp: queries, keys and values of all tiles of this program, in order."""
    PARTS: gl.constexpr = BLOCK_M // ROWS
    sequences, heads, queries, keys = numbers
    q_s, q_full, q_empty = queues
    k_s, v_s, k_full, k_empty, v_full, v_empty = ring
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), sequences * tiles_over(queries, BLOCK_M), gl.num_programs(0)):
        image, row, column = place_of_tile(tile, heads, queries, WIDTH, BLOCK_M)
        for part in gl.static_range(PARTS):  # type: ignore[reportGeneralTypeIssues]
            at = turn % TURNS * PARTS + part
            mbarrier.wait(q_empty.index(at), (turn // TURNS & 1) ^ 1)
            mbarrier.expect(q_full.index(at), q_desc.block_type.nbytes)
            load_block(q_desc, [image, row + part * ROWS, column], q_full.index(at), q_s.index(at))
        for key in range(0, keys - (BLOCK_N - 1), BLOCK_N):
            _load_block(k_desc, image, key, column, step, k_full, k_empty, k_s, BLOCK_N, STAGES)
            _load_block(v_desc, image, key, column, step, v_full, v_empty, v_s, BLOCK_N, STAGES)
            step += 1
        if REST:
            key = keys // BLOCK_N * BLOCK_N
            _load_block(k_rest_desc, image, key, column, step, k_full, k_empty, k_s, REST, STAGES)
            _load_block(v_rest_desc, image, key, column, step, v_full, v_empty, v_s, REST, STAGES)
            step += 1
        turn += 1


# One compiled kernel for every number of queries, and of keys that leaves a block as wide.
@gluon.jit(do_not_specialize=["sequences", "heads", "queries", "keys"])
def attention_roles_kernel(
    q_desc,  # [B, Nq, H * WIDTH] in blocks of [1, 64, WIDTH]
    k_desc,  # [B, Nk, H * WIDTH] in blocks of [1, BLOCK_N, WIDTH]
    v_desc,  # as k_desc
    k_rest_desc,  # as k_desc, in blocks of [1, REST, WIDTH]
    v_rest_desc,  # as k_rest_desc
    o_desc,  # as q_desc
    sequences,  # B * H
    heads,
    queries,
    keys,
    logit_scale,
    REST: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    MULTIPLYING: gl.constexpr,
    LOADING: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """This program computes every so-manieth tile of BLOCK_M queries of one head of one image.

    REST: width of the block for the keys left over by whole blocks, 0 if there are none. There is one whole block at
    least. BLOCK_M is 128, two warpgroups of queries, or 192.
    """
    follow(OVERLAP)
    PARTS: gl.constexpr = BLOCK_M // ROWS
    q_s = gl.allocate_shared_memory(q_desc.dtype, [TURNS * PARTS, 1, ROWS, WIDTH], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, WIDTH], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, WIDTH], v_desc.layout)
    queues = (q_s, barriers(TURNS * PARTS, 1), barriers(TURNS * PARTS, 1))
    ring = (
        k_s, v_s, barriers(STAGES, 1), barriers(STAGES, PARTS), barriers(STAGES, 1), barriers(STAGES, PARTS),
    )  # fmt: skip
    fence_async_shared()
    numbers = (sequences, heads, queries, keys)
    if PARTS == 1:
        gl.warp_specialize(
            [
                (multiply, (0, o_desc, queues, ring, numbers, logit_scale, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (load, (q_desc, k_desc, v_desc, k_rest_desc, v_rest_desc, queues, ring, numbers, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
            ],
            [1],
            [LOADING],
        )
    elif PARTS == 2:
        gl.warp_specialize(
            [
                (multiply, (0, o_desc, queues, ring, numbers, logit_scale, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (multiply, (1, o_desc, queues, ring, numbers, logit_scale, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (load, (q_desc, k_desc, v_desc, k_rest_desc, v_rest_desc, queues, ring, numbers, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
            ],
            [4, 1],
            [MULTIPLYING, LOADING],
        )
    elif PARTS == 3:
        gl.warp_specialize(
            [
                (multiply, (0, o_desc, queues, ring, numbers, logit_scale, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (multiply, (1, o_desc, queues, ring, numbers, logit_scale, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (multiply, (2, o_desc, queues, ring, numbers, logit_scale, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (load, (q_desc, k_desc, v_desc, k_rest_desc, v_rest_desc, queues, ring, numbers, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
            ],
            [4, 4, 1],
            [MULTIPLYING, MULTIPLYING, LOADING],
        )
    elif PARTS == 4:
        gl.warp_specialize(
            [
                (multiply, (0, o_desc, queues, ring, numbers, logit_scale, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (multiply, (1, o_desc, queues, ring, numbers, logit_scale, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (multiply, (2, o_desc, queues, ring, numbers, logit_scale, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (multiply, (3, o_desc, queues, ring, numbers, logit_scale, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (load, (q_desc, k_desc, v_desc, k_rest_desc, v_rest_desc, queues, ring, numbers, REST, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
            ],
            [4, 4, 4, 1],
            [MULTIPLYING, MULTIPLYING, MULTIPLYING, LOADING],
        )
