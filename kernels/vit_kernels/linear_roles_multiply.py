"""The multiplying role of `linear_roles_kernel`: a warpgroup loads and multiplies its half of a tile's rows and hands
over the sums."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .linear_roles_load import load_again, load_weights, load_x
from .linear_roles_ring import HALVES, NARROW, ROWS, TURNS, share_of_tiles, tile_of_turn
from .primitives import follow, rounded, tiles_over


@gluon.jit
def _multiply_step(acc, ring, step, half: gl.constexpr, WIDTH: gl.constexpr, ADD: gl.constexpr):
    """Begins one step's product, added to the sums or, in the first step, in their place; ends the one
    before."""
    x_s, w_s, full, _ = ring
    SLOTS: gl.constexpr = x_s.shape[0] // HALVES
    slot = step % SLOTS
    mbarrier.wait(full.index(slot), step // SLOTS & 1)
    w = w_s.index(step % w_s.shape[0]).slice(0, WIDTH).permute((1, 0))
    acc = warpgroup_mma(x_s.index(slot * HALVES + half), w, acc, use_acc=ADD, is_async=True)
    return warpgroup_mma_wait(1, deps=(acc,))


@gluon.jit
def _let_go(
    descs, ring, half: gl.constexpr, step, last, k, tile, after, K_END, BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr,
    LOADS: gl.constexpr,
):  # fmt: skip
    """Lets go of a step's slots; fills them, if those that multiply load."""
    _, _, _, empty = ring
    if LOADS:
        load_again(descs, ring, half, step, last, k, tile, after, K_END, BLOCK_K, BLOCK_N)
    else:
        mbarrier.arrive(empty.index(step % empty.shape[0]), count=1)


@gluon.jit
def store_pieces(sums_s, first: gl.constexpr, y):
    """Writes y in pieces of NARROW columns, to the places from number `first` on."""
    WIDTH: gl.constexpr = y.shape[1]
    if WIDTH == NARROW:
        sums_s.index(first).store(y)
    else:
        left, right = y.reshape((ROWS, 2, WIDTH // 2)).permute((0, 2, 1)).split()
        store_pieces(sums_s, first, left)
        store_pieces(sums_s, first + WIDTH // 2 // NARROW, right)


@gluon.jit
def multiply_half(
    half: gl.constexpr, descs, ring, sums, vectors, vector_bars, step, last, turn, tile, after, K,
    BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, NORM: gl.constexpr,
    LOADS: gl.constexpr,
):  # fmt: skip
    """Multiplies the rows of one half of a tile of WIDTH columns, and hands over their sums, times rstd with a norm.
    Returns the number of the next step."""
    sums_s, summed, free = sums
    rstd_s, _ = vectors
    ready, spent = vector_bars
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])  # type: ignore[reportAssignmentType]
    K_END = tiles_over(K, BLOCK_K) * BLOCK_K
    acc = gl.zeros((ROWS, WIDTH), gl.float32, LAYOUT)
    acc = _multiply_step(acc, ring, step, half, WIDTH, False)
    for k in range(0, K_END - BLOCK_K, BLOCK_K):
        acc = _multiply_step(acc, ring, step + 1, half, WIDTH, True)
        # At once, for an SM gets no more from memory than it has asked for.
        _let_go(descs, ring, half, step, last, k, tile, after, K_END, BLOCK_K, BLOCK_N, LOADS)
        step += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _let_go(descs, ring, half, step, last, K_END - BLOCK_K, tile, after, K_END, BLOCK_K, BLOCK_N, LOADS)
    if NORM != "none":
        mbarrier.wait(ready.index(turn % TURNS), turn // TURNS & 1)
    mbarrier.wait(free.index(half), (turn & 1) ^ 1)
    if NORM != "none":
        acc = acc * rstd_s.index(turn % TURNS * HALVES + half).load(gl.SliceLayout(1, LAYOUT))[:, None]
        mbarrier.arrive(spent.index(turn % TURNS), count=1)
    y, _ = rounded(acc, sums_s.dtype)
    store_pieces(sums_s, half * (sums_s.shape[0] // HALVES), y)
    mbarrier.arrive(summed.index(half), count=1)
    return step + 1


@gluon.jit
def multiply(
    half: gl.constexpr, descs, ring, sums, vectors, vector_bars, M, N, K, split, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, NORM: gl.constexpr, LOADS: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of a multiplying warpgroup: its half of all tiles of this program, in order. LOADS: it also loads, its
    half of x and every other step's weights. (Else whoever loads waits for the launch before.)"""
    x_desc, w_desc, _ = descs
    STAGES: gl.constexpr = ring[1].shape[0]
    own, all_turns, whole = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    last = all_turns * tiles_over(K, BLOCK_K) - 1
    row, column, _ = tile_of_turn(0, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if LOADS:
        # Every program has a whole tile to begin with, of more steps than there are slots for weights. These do not
        # depend on the launch before.
        for ahead in range(half, STAGES, HALVES):
            load_weights(w_desc, ring, ahead, column, ahead * BLOCK_K, BLOCK_N)
        follow(OVERLAP)
        for ahead in range(STAGES + 1):
            load_x(x_desc, ring, ahead, row, ahead * BLOCK_K, half)
    step = 0
    for turn in range(own):
        # There is no tile behind the last, and no number of one to divide by.
        turn_after = gl.minimum(turn + 1, all_turns - 1)
        row_after, column_after, _ = tile_of_turn(turn_after, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        tile, after = (row, column, False), (row_after, column_after, turn_after >= own)
        step = multiply_half(
            half, descs, ring, sums, vectors, vector_bars, step, last, turn, tile, after, K, BLOCK_K, BLOCK_N, BLOCK_N,
            NORM, LOADS,
        )  # fmt: skip
        row, column = row_after, column_after
    for turn in range(own, all_turns):
        turn_after = gl.minimum(turn + 1, all_turns - 1)
        row_after, column_after, _ = tile_of_turn(turn_after, own, whole, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        tile, after = (row, column, True), (row_after, column_after, True)
        step = multiply_half(
            half, descs, ring, sums, vectors, vector_bars, step, last, turn, tile, after, K, BLOCK_K, BLOCK_N, NARROW,
            NORM, LOADS,
        )  # fmt: skip
        row, column = row_after, column_after
