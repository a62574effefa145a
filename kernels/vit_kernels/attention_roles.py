"""Attention on sm_90 for sequences of more keys than `attention_whole` holds: its kernel, in Gluon.

Its warps have roles. One warp loads queries, keys and values; three warpgroups attend with 64 queries of a tile each,
by a running softmax over blocks of keys (arXiv 2205.14135, algorithm 1). Each of them has the product of a block's
weights with its values under way while it softens the scores of the next, and they begin their products in turns, so
that one multiplies while others take exponentials (arXiv 2407.08608).

What whole blocks of 128 keys leave over comes last: a block of 64, and one that is no wider than it must be. 577 keys
are 4 x 128 + 64 + 16. What lies past the last key reads as zero and its scores are replaced; queries past the last are
not stored, and a warpgroup without any lets a tile pass.

A barrier's n-th use is waited for by its parity, n & 1. Nobody fills a slot before everybody has let go of it:

    k_full[slot], v_full[slot]   a block has arrived          k_empty[slot], v_empty[slot]   every warpgroup has used it
    q_full[turn, part]           queries have arrived         q_empty[turn, part]            their results have left
    turns[part]                  the warpgroup before has begun its products of a block
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .attention_roles_multiply import PARTS, ROWS, TURNS, multiply, number_of_tiles, place_of_tile
from .linear_roles_ring import barriers, load_block
from .primitives import follow

# Registers a thread of the second and third multiplying warpgroup, of the loading warp; the first has what is left, as
# many as the others.
_MULTIPLYING = gl.constexpr(160)
_LOADING = gl.constexpr(32)


@gluon.jit
def _load_block(
    desc, image, key, column, step, full, empty, places, KEYS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Loads KEYS keys, or their values, into the slot of a step."""
    BOX: gl.constexpr = desc.block_type.shape[1]
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), KEYS // BOX * desc.block_type.nbytes)
    for first in gl.static_range(0, KEYS, BOX):  # type: ignore[reportGeneralTypeIssues]
        load_block(desc, [image, key + first, column], full.index(slot), places.index(slot).slice(first, BOX, 1))


@gluon.jit
def _load_keys_and_values(
    k_desc, v_desc, image, key, column, step, ring, KEYS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    k_s, v_s, k_full, k_empty, v_full, v_empty, _ = ring
    _load_block(k_desc, image, key, column, step, k_full, k_empty, k_s, KEYS, STAGES)
    _load_block(v_desc, image, key, column, step, v_full, v_empty, v_s, KEYS, STAGES)


@gluon.jit
def load(
    q_desc, k_desc, v_desc, k_rest_desc, v_rest_desc, queues, ring, numbers, HALF: gl.constexpr,
    REST: gl.constexpr, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of the loading warp: queries, keys and values of all tiles of this program, in order."""
    sequences, heads, queries, keys = numbers
    q_s, q_full, q_empty = queues
    step = 0
    for turn in range(number_of_tiles(sequences, queries)):
        image, row, column = place_of_tile(turn, sequences, heads, queries, WIDTH)
        for part in gl.static_range(PARTS):  # type: ignore[reportGeneralTypeIssues]
            at = turn % TURNS * PARTS + part
            mbarrier.wait(q_empty.index(at), (turn // TURNS & 1) ^ 1)
            mbarrier.expect(q_full.index(at), q_desc.block_type.nbytes)
            load_block(q_desc, [image, row + part * ROWS, column], q_full.index(at), q_s.index(at))
        for key in range(0, keys - (BLOCK_N - 1), BLOCK_N):
            _load_keys_and_values(k_desc, v_desc, image, key, column, step, ring, BLOCK_N, STAGES)
            step += 1
        left = keys // BLOCK_N * BLOCK_N
        if HALF:
            _load_keys_and_values(k_desc, v_desc, image, left, column, step, ring, BLOCK_N // 2, STAGES)
            step += 1
            left += BLOCK_N // 2
        if REST:
            _load_keys_and_values(k_rest_desc, v_rest_desc, image, left, column, step, ring, REST, STAGES)
            step += 1


# One compiled kernel for every number of queries, and of keys that leaves blocks as wide.
@gluon.jit(do_not_specialize=["sequences", "heads", "queries", "keys"])
def attention_roles_kernel(
    q_desc,  # [B, Nq, H * WIDTH] in blocks of [1, 64, WIDTH]
    k_desc,  # [B, Nk, H * WIDTH] in blocks of [1, BLOCK_N / 2, WIDTH]
    v_desc,  # as k_desc
    k_rest_desc,  # as k_desc, in blocks of [1, REST, WIDTH]
    v_rest_desc,  # as k_rest_desc
    o_desc,  # as q_desc
    sequences,  # B * H
    heads,
    queries,
    keys,
    logit_scale,
    HALF: gl.constexpr,
    REST: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """This program computes every P-th tile (of P programs) of 192 queries of one head of one image.

    Behind whole blocks of keys, of which there is one at least, HALF a block follows or not, and one of REST, or none.
    BLOCK_M is 192, BLOCK_N 128 and WIDTH 64.
    """
    follow(OVERLAP)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [TURNS * PARTS, 1, ROWS, WIDTH], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, WIDTH], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, WIDTH], v_desc.layout)
    queues = (q_s, barriers(TURNS * PARTS, 1), barriers(TURNS * PARTS, 1))
    ring = (
        k_s, v_s, barriers(STAGES, 1), barriers(STAGES, PARTS), barriers(STAGES, 1), barriers(STAGES, PARTS),
        barriers(PARTS, 1),
    )  # fmt: skip
    fence_async_shared()
    numbers = (sequences, heads, queries, keys)
    gl.warp_specialize(
        [
            (multiply, (0, o_desc, queues, ring, numbers, logit_scale, HALF, REST, WIDTH, BLOCK_N, STAGES)),
            (multiply, (1, o_desc, queues, ring, numbers, logit_scale, HALF, REST, WIDTH, BLOCK_N, STAGES)),
            (multiply, (2, o_desc, queues, ring, numbers, logit_scale, HALF, REST, WIDTH, BLOCK_N, STAGES)),
            (
                load,
                (
                    q_desc, k_desc, v_desc, k_rest_desc, v_rest_desc, queues, ring, numbers, HALF, REST, WIDTH,
                    BLOCK_N, STAGES,
                ),
            ),
        ],
        [4, 4, 1],
        [_MULTIPLYING, _MULTIPLYING, _LOADING],
    )  # fmt: skip
