"""The kernel of `mlp` for narrow models on sm_90, in Gluon: its warps have roles.

One warp loads, another brings the vectors along, and one or two warpgroups multiply, 64 rows each. A step has 64 hidden
features:

    h = x W1^T,   p = act(norm and bias behind h), in 16 bits,   y += p W2^T

x comes once, and stays in registers (but for `KEPT`) as y does; h and p never leave them, and p is an operand as it is.
Two warpgroups take turns: while one has the tensor cores, with p W2^T and the next step's h, the other one activates.

Such a turn, number n, has one slot of weights: W2 of step n - 1, W1 of step n. There is one more than there are steps.

A barrier's n-th use is waited for by its parity, n & 1. Nobody fills a place before everybody has let go of it:

    full[slot]     the weights of a turn have arrived          empty[slot]  both warpgroups have multiplied them
    arrived[half]  64 rows of x have arrived, then of the      spent[half]  x is needed no more
                   residual
    turn[half]     the tensor cores are this warpgroup's       ready[chunk] vectors of 4 steps have been written; behind
                                                                            the last: bias2 and LayerScale
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

from .linear_roles_finish import store_stats
from .linear_roles_load import merged_moments
from .linear_roles_ring import NARROW, ROWS, barriers, store_block
from .mlp_roles_load import CHUNK, load, load_vectors
from .primitives import INLINE_ASSEMBLY, activate_fast, follow, rounded, shift_and_scale


@gluon.jit
def _take_turn(turn, half: gl.constexpr, number, HALVES: gl.constexpr):
    """Waits for the warpgroup's turn at the tensor cores, the number-th."""
    if HALVES == 2:
        mbarrier.wait(turn.index(half), (number & 1) ^ (1 - half))


@gluon.jit
def _begin_hidden(x_s, kept, ring, turn, slot, half: gl.constexpr, LAYOUT: gl.constexpr, HALVES: gl.constexpr):
    """Begins h [ROWS, NARROW], as many products as x has slabs of 64 columns; before the last of them, the turn is the
    other warpgroup's."""
    w1_s, _, _, _, _ = ring
    SLABS: gl.constexpr = x_s.shape[0] // HALVES
    h = gl.zeros((ROWS, NARROW), gl.float32, LAYOUT)
    for k in gl.static_range(SLABS):  # type: ignore[reportGeneralTypeIssues]
        if HALVES == 2 and k == SLABS - 1:
            mbarrier.arrive(turn.index(1 - half), count=1)
        w1 = w1_s.index(slot * SLABS + k).permute((1, 0))
        if k < len(kept):
            h = warpgroup_mma(kept[k], w1, h, use_acc=k > 0, is_async=True)
        else:
            h = warpgroup_mma(x_s.index(half * SLABS + k), w1, h, use_acc=k > 0, is_async=True)
    return h


@gluon.jit
def _activated(
    h, rstd, shift, vectors, step, DTYPE: gl.constexpr, NORM: gl.constexpr, ACTIVATION: gl.constexpr,
    TIMES: gl.constexpr, HAS_BIAS1: gl.constexpr,
):  # fmt: skip
    """What stands between the products: folded norm, bias, activation, rounding."""
    bias1_s, column_sum_s, _, _, ready = vectors
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, h.type.layout)  # type: ignore[reportAssignmentType]
    if HAS_BIAS1 or NORM == "layer":
        mbarrier.wait(ready.index(step // CHUNK), 0)
    if NORM != "none":
        h = h * rstd[:, None]
    elif TIMES != 1.0:
        h = h * TIMES
    if NORM == "layer":
        added = shift[:, None] * column_sum_s.index(step).load(BY_COLUMN)[None, :]
        if HAS_BIAS1:
            added = added + bias1_s.index(step).load(BY_COLUMN)[None, :]
        h = h + added
    elif HAS_BIAS1:
        h = h + bias1_s.index(step).load(BY_COLUMN)[None, :]
    if ACTIVATION != "none":
        h = activate_fast(h, ACTIVATION, DTYPE)
    p, _ = rounded(h, DTYPE)
    if INLINE_ASSEMBLY:
        # Nothing but: all of it comes before the next wait. Else some would be done while the tensor cores wait for it.
        p = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [p], dtype=p.dtype, is_pure=False, pack=2)
    return p


@gluon.jit
def _begin_outputs(sums, p, ring, slot, TAIL: gl.constexpr, ADD):
    """Begins p W2^T, added to the sums or in their place."""
    _, w2_s, tail_s, _, _ = ring
    y, y_tail = sums
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, y.type.layout, 2)  # type: ignore[reportAssignmentType]
    y = warpgroup_mma(
        gl.convert_layout(p, OPERAND), w2_s.index(slot).permute((1, 0)), y, use_acc=ADD, is_async=True
    )  # fmt: skip
    if TAIL:
        TAIL_OPERAND: gl.constexpr = gl.DotOperandLayout(0, y_tail.type.layout, 2)  # type: ignore[reportAssignmentType]
        y_tail = warpgroup_mma(
            gl.convert_layout(p, TAIL_OPERAND), tail_s.index(slot).permute((1, 0)), y_tail, use_acc=ADD, is_async=True
        )  # fmt: skip
    return y, y_tail


@gluon.jit
def _wait(sums, h, TAIL: gl.constexpr):
    """Waits until all products of this warpgroup have ended."""
    y, y_tail = sums
    if TAIL:
        y, y_tail, h = warpgroup_mma_wait(0, deps=(y, y_tail, h))  # type: ignore[reportGeneralTypeIssues]
    else:
        y, h = warpgroup_mma_wait(0, deps=(y, h))  # type: ignore[reportGeneralTypeIssues]
    return (y, y_tail), h


@gluon.jit
def _finished(
    acc, piece: gl.constexpr, place, vectors, HAS_BIAS2: gl.constexpr, HAS_SCALE: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """64 columns of y as stored, in fp32. They also take the residual's place in shared memory, to leave from there."""
    _, _, bias2_s, scale_s, _ = vectors
    LAYOUT: gl.constexpr = acc.type.layout
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)  # type: ignore[reportAssignmentType]
    if HAS_BIAS2:
        acc = acc + bias2_s.index(piece).load(BY_COLUMN)[None, :]
    if HAS_SCALE:
        acc = acc * scale_s.index(piece).load(BY_COLUMN)[None, :]
    if HAS_RESIDUAL:
        acc = acc + place.load(LAYOUT).to(gl.float32)
    y, stored = rounded(acc, place.dtype)
    place.store(y)
    fence_async_shared()
    return stored


@gluon.jit
def _multiply(
    half: gl.constexpr, y_desc, ring, x_s, x_bars, turn, vectors, stats_ptr, y_stats_ptr, row, M, eps,
    STEPS: gl.constexpr, WIDTH: gl.constexpr, KEPT: gl.constexpr, HALVES: gl.constexpr, NORM: gl.constexpr,
    PARTIALS: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS1: gl.constexpr,
    HAS_BIAS2: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of a warpgroup: its 64 rows."""
    _, w2_s, _, full, empty = ring
    arrived, spent = x_bars
    _, _, _, _, ready = vectors
    STAGES: gl.constexpr = w2_s.shape[0]
    MAIN: gl.constexpr = w2_s.shape[1]
    TAIL: gl.constexpr = WIDTH - MAIN
    SLABS: gl.constexpr = WIDTH // NARROW
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW, 16])  # type: ignore[reportAssignmentType]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, 16])  # type: ignore[reportAssignmentType]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)  # type: ignore[reportAssignmentType]
    row += half * ROWS
    follow(OVERLAP)
    rstd = gl.zeros([ROWS], gl.float32, BY_ROW)
    shift = rstd
    if NORM != "none":
        rows = gl.minimum(row + gl.arange(0, ROWS, BY_ROW), M - 1)
        mean, m2 = merged_moments(stats_ptr, rows, M, WIDTH, PARTIALS)
        mean, rstd = shift_and_scale(mean, m2, WIDTH, eps, NORM)
        rstd = rstd * TIMES
        shift = -mean * rstd
    sums = gl.zeros((ROWS, MAIN), gl.float32, SUMS), gl.zeros((ROWS, NARROW), gl.float32, LAYOUT)
    mbarrier.wait(arrived.index(half), 0)
    kept = ()
    for k in gl.static_range(KEPT):  # type: ignore[reportGeneralTypeIssues]
        kept = kept + (x_s.index(half * SLABS + k).load(gl.DotOperandLayout(0, LAYOUT, 2)),)
    if HAS_RESIDUAL and KEPT == SLABS:
        mbarrier.arrive(spent.index(half), count=1)
    mbarrier.wait(full.index(0), 0)
    _take_turn(turn, half, 0, HALVES)
    h = _begin_hidden(x_s, kept, ring, turn, 0, half, LAYOUT, HALVES)
    sums, h = _wait(sums, h, TAIL)
    mbarrier.arrive(empty.index(0), count=1)
    for step in range(STEPS - 1):
        number = step + 1
        slot = number % STAGES
        mbarrier.wait(full.index(slot), number // STAGES & 1)
        p = _activated(h, rstd, shift, vectors, step, x_s.dtype, NORM, ACTIVATION, TIMES, HAS_BIAS1)
        _take_turn(turn, half, number, HALVES)
        sums = _begin_outputs(sums, p, ring, slot, TAIL, step > 0)
        h = _begin_hidden(x_s, kept, ring, turn, slot, half, LAYOUT, HALVES)
        sums, h = _wait(sums, h, TAIL)
        mbarrier.arrive(empty.index(slot), count=1)
    if HAS_RESIDUAL and KEPT < SLABS:
        mbarrier.arrive(spent.index(half), count=1)
    mbarrier.wait(full.index(STEPS % STAGES), STEPS // STAGES & 1)
    p = _activated(h, rstd, shift, vectors, STEPS - 1, x_s.dtype, NORM, ACTIVATION, TIMES, HAS_BIAS1)
    sums = _begin_outputs(sums, p, ring, STEPS % STAGES, TAIL, STEPS > 1)
    sums, _ = _wait(sums, h, TAIL)
    mbarrier.wait(ready.index((STEPS - 1) // CHUNK + 1), 0)
    if HAS_RESIDUAL:
        mbarrier.wait(arrived.index(half), 1)
    y, y_tail = sums
    pieces = (y,)
    if MAIN > NARROW:
        pieces = y.reshape((ROWS, 2, NARROW)).permute((0, 2, 1)).split()
    if TAIL:
        pieces = pieces + (y_tail,)
    stored = ()
    for piece in gl.static_range(SLABS):  # type: ignore[reportGeneralTypeIssues]
        acc = gl.convert_layout(pieces[piece], LAYOUT)
        place = x_s.index(half * SLABS + piece)
        acc = _finished(acc, piece, place, vectors, HAS_BIAS2, HAS_SCALE, HAS_RESIDUAL)
        stored = stored + (acc,)
        store_block(y_desc, [row, piece * NARROW], place)
    if EMIT_STATS:
        rows = row + gl.arange(0, ROWS, BY_ROW)
        for piece in gl.static_range(SLABS):  # type: ignore[reportGeneralTypeIssues]
            store_stats(y_stats_ptr, stored[piece], rows, rows < M, piece * NARROW, M, WIDTH)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def mlp_roles_kernel(
    x_desc,  # [M, WIDTH] in blocks of [64, 64]
    w1_desc,  # [HIDDEN, WIDTH] in blocks of [64, 64]
    w2_desc,  # [WIDTH, HIDDEN] in blocks of [MAIN, 64]
    tail_desc,  # the same in blocks of [64, 64], if WIDTH is more than MAIN
    residual_desc,  # as x_desc
    y_desc,  # as x_desc
    bias1_ptr,  # [HIDDEN]
    stats_ptr,  # [2, partials, M]
    column_sum_ptr,  # [HIDDEN], fp32
    bias2_ptr,  # [WIDTH]
    scale_ptr,  # [WIDTH]
    y_stats_ptr,  # [2, WIDTH / 64, M]
    M,
    stride_bias1,
    stride_bias2,
    stride_scale,
    eps,
    NORM: gl.constexpr,
    PARTIALS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_BIAS1: gl.constexpr,
    HAS_BIAS2: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    EMIT_STATS: gl.constexpr,
    WIDTH: gl.constexpr,
    HIDDEN: gl.constexpr,
    BLOCK_M: gl.constexpr,
    KEPT: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """This program computes BLOCK_M rows of y, 64 or 128, all WIDTH columns of them; WIDTH is 64, 128 or 192.

    KEPT: so many of the WIDTH / 64 slabs of x stay in registers.
    """
    # Activations are fed half their input: see `activate_fast`.
    TIMES: gl.constexpr = 1.0 if ACTIVATION == "none" else 0.5  # type: ignore[reportAssignmentType]
    FLOATS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])  # type: ignore[reportAssignmentType]
    HALVES: gl.constexpr = BLOCK_M // ROWS
    SLABS: gl.constexpr = WIDTH // NARROW
    MAIN: gl.constexpr = w2_desc.block_shape[0]
    TAIL: gl.constexpr = WIDTH - MAIN
    STEPS: gl.constexpr = (HIDDEN + NARROW - 1) // NARROW
    CHUNKS: gl.constexpr = (STEPS + CHUNK - 1) // CHUNK
    DTYPE: gl.constexpr = x_desc.dtype
    x_s = gl.allocate_shared_memory(DTYPE, [HALVES * SLABS, ROWS, NARROW], x_desc.layout)
    w1_s = gl.allocate_shared_memory(DTYPE, [STAGES * SLABS, NARROW, NARROW], w1_desc.layout)
    w2_s = gl.allocate_shared_memory(DTYPE, [STAGES, MAIN, NARROW], w2_desc.layout)
    tail_s = w2_s
    if TAIL:
        tail_s = gl.allocate_shared_memory(DTYPE, [STAGES, TAIL, NARROW], tail_desc.layout)
    vectors = (
        gl.allocate_shared_memory(gl.float32, [CHUNKS * CHUNK, NARROW], FLOATS),
        gl.allocate_shared_memory(gl.float32, [CHUNKS * CHUNK, NARROW], FLOATS),
        gl.allocate_shared_memory(gl.float32, [SLABS, NARROW], FLOATS),
        gl.allocate_shared_memory(gl.float32, [SLABS, NARROW], FLOATS),
        barriers(CHUNKS + 1, 1),
    )
    ring = w1_s, w2_s, tail_s, barriers(STAGES, 1), barriers(STAGES, HALVES)
    x_bars = barriers(HALVES, 1), barriers(HALVES, 1)
    turn = barriers(HALVES, 1)
    fence_async_shared()
    # From the last rows to the first: what the launch before wrote last is in L2 still.
    row = (gl.num_programs(0) - 1 - gl.program_id(0)) * BLOCK_M
    behind = bias1_ptr, stride_bias1, column_sum_ptr, bias2_ptr, stride_bias2, scale_ptr, stride_scale
    descs = x_desc, w1_desc, w2_desc, tail_desc, residual_desc
    if HALVES == 2:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        0, y_desc, ring, x_s, x_bars, turn, vectors, stats_ptr, y_stats_ptr, row, M, eps, STEPS, WIDTH,
                        KEPT, HALVES, NORM, PARTIALS, ACTIVATION, TIMES, HAS_BIAS1, HAS_BIAS2, HAS_SCALE, HAS_RESIDUAL,
                        EMIT_STATS, OVERLAP,
                    ),
                ),
                (
                    _multiply,
                    (
                        1, y_desc, ring, x_s, x_bars, turn, vectors, stats_ptr, y_stats_ptr, row, M, eps, STEPS, WIDTH,
                        KEPT, HALVES, NORM, PARTIALS, ACTIVATION, TIMES, HAS_BIAS1, HAS_BIAS2, HAS_SCALE, HAS_RESIDUAL,
                        EMIT_STATS, OVERLAP,
                    ),
                ),
                (load, (descs, ring, x_s, x_bars, row, STEPS, TAIL, HALVES, HAS_RESIDUAL, OVERLAP)),
                (load_vectors, (vectors, behind, HIDDEN, NORM, TIMES, HAS_BIAS1, HAS_BIAS2, HAS_SCALE)),
            ],
            [4, 1, 1],
            [232, 40, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        0, y_desc, ring, x_s, x_bars, turn, vectors, stats_ptr, y_stats_ptr, row, M, eps, STEPS, WIDTH,
                        KEPT, HALVES, NORM, PARTIALS, ACTIVATION, TIMES, HAS_BIAS1, HAS_BIAS2, HAS_SCALE, HAS_RESIDUAL,
                        EMIT_STATS, OVERLAP,
                    ),
                ),
                (load, (descs, ring, x_s, x_bars, row, STEPS, TAIL, HALVES, HAS_RESIDUAL, OVERLAP)),
                (load_vectors, (vectors, behind, HIDDEN, NORM, TIMES, HAS_BIAS1, HAS_BIAS2, HAS_SCALE)),
            ],
            [1, 1],
            [40, 40],
        )  # fmt: skip
