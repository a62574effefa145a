"""The multiplying role of `linear_roles_kernel`: a warpgroup multiplies its half of a tile's rows and hands over the
sums."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .linear_roles_ring import HALVES, NARROW, ROWS, TURNS, share_of_tiles
from .primitives import rounded


@gluon.jit
def _multiply_step(
    acc, ring, step, half: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr
):  # fmt: skip
    """Begins one step's product, added to the sums or, in the first step, in their place; ends the one
    before."""
    x_s, w_s, full, _ = ring
    SLOTS: gl.constexpr = x_s.shape[0] // HALVES
    slot = step % SLOTS
    mbarrier.wait(full.index(slot), step // SLOTS & 1)
    x = x_s.index(slot * HALVES + half)
    acc = warpgroup_mma(x, w_s.index(step % STAGES).slice(0, WIDTH).permute((1, 0)), acc, use_acc=ADD, is_async=True)
    return warpgroup_mma_wait(1, deps=(acc,))


@gluon.jit
def _store_pieces(sums_s, first: gl.constexpr, y):
    """Writes y in pieces of NARROW columns, to the places from number `first` on."""
    WIDTH: gl.constexpr = y.shape[1]
    if WIDTH == NARROW:
        sums_s.index(first).store(y)
    else:
        left, right = y.reshape((ROWS, 2, WIDTH // 2)).permute((0, 2, 1)).split()
        _store_pieces(sums_s, first, left)
        _store_pieces(sums_s, first + WIDTH // 2 // NARROW, right)


@gluon.jit
def _multiply_half(
    half: gl.constexpr, ring, sums, vectors, vector_bars, step, turn, K, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    WIDTH: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    """Multiplies the rows of one half of a tile of WIDTH columns, and hands over their sums, times rstd with a norm.
    Returns the number of the next step."""
    _, _, _, empty = ring
    sums_s, summed, free = sums
    rstd_s, _ = vectors
    ready, spent = vector_bars
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])  # type: ignore[reportAssignmentType]
    acc = gl.zeros((ROWS, WIDTH), gl.float32, LAYOUT)
    acc = _multiply_step(acc, ring, step, half, WIDTH, STAGES, False)
    step += 1
    for _ in range(BLOCK_K, K, BLOCK_K):
        acc = _multiply_step(acc, ring, step, half, WIDTH, STAGES, True)
        mbarrier.arrive(empty.index((step + (STAGES - 1)) % STAGES), count=1)
        step += 1
    if NORM != "none":
        mbarrier.wait(ready.index(turn % TURNS), turn // TURNS & 1)
    mbarrier.wait(free.index(half), (turn & 1) ^ 1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + (STAGES - 1)) % STAGES), count=1)
    if NORM != "none":
        acc = acc * rstd_s.index(turn % TURNS * HALVES + half).load(gl.SliceLayout(1, LAYOUT))[:, None]
        mbarrier.arrive(spent.index(turn % TURNS), count=1)
    y, _ = rounded(acc, sums_s.dtype)
    _store_pieces(sums_s, half * (sums_s.shape[0] // HALVES), y)
    mbarrier.arrive(summed.index(half), count=1)
    return step


@gluon.jit
def multiply(
    half: gl.constexpr, ring, sums, vectors, vector_bars, M, N, K, split, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    """The role of a multiplying warpgroup: its half of all tiles of this program, in order."""
    step = 0
    own, all_turns, _ = share_of_tiles(M, N, split, BLOCK_M, BLOCK_N)
    for turn in range(own):
        step = _multiply_half(half, ring, sums, vectors, vector_bars, step, turn, K, BLOCK_K, STAGES, BLOCK_N, NORM)
    for turn in range(own, all_turns):
        step = _multiply_half(half, ring, sums, vectors, vector_bars, step, turn, K, BLOCK_K, STAGES, NARROW, NORM)
