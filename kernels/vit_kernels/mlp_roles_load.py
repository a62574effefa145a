"""The loading of `mlp_roles_kernel`, by two warps: one has blocks loaded, the other loads and converts vectors."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .linear_roles_ring import NARROW, ROWS, load_block
from .primitives import follow

# Steps whose vectors are loaded at a time: eight values a lane.
CHUNK = gl.constexpr(4)


@gluon.jit
def _load_weights(descs, ring, turn, TAIL: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr):
    """Loads the weights of a turn: W2 [WIDTH, NARROW] of the step before, W1 [NARROW, WIDTH] of this one."""
    _, w1_desc, w2_desc, tail_desc, _ = descs
    w1_s, w2_s, tail_s, full, _ = ring
    STAGES: gl.constexpr = w2_s.shape[0]
    MAIN: gl.constexpr = w2_s.shape[1]
    SLABS: gl.constexpr = w1_s.shape[0] // STAGES
    BYTES: gl.constexpr = SLABS * NARROW * NARROW * 2
    slot = turn % STAGES
    arrived = full.index(slot)
    mbarrier.expect(arrived, BYTES if FIRST or LAST else 2 * BYTES)
    if not FIRST:
        load_block(w2_desc, [0, (turn - 1) * NARROW], arrived, w2_s.index(slot))
        if TAIL:
            load_block(tail_desc, [MAIN, (turn - 1) * NARROW], arrived, tail_s.index(slot))
    if not LAST:
        for k in gl.static_range(SLABS):  # type: ignore[reportGeneralTypeIssues]
            load_block(w1_desc, [turn * NARROW, k * NARROW], arrived, w1_s.index(slot * SLABS + k))


@gluon.jit
def _load_rows(desc, x_s, arrived, row, half: gl.constexpr, HALVES: gl.constexpr):
    """Loads 64 rows of x or of the residual, [ROWS, WIDTH]."""
    SLABS: gl.constexpr = x_s.shape[0] // HALVES
    mbarrier.expect(arrived.index(half), SLABS * ROWS * NARROW * 2)
    for k in gl.static_range(SLABS):  # type: ignore[reportGeneralTypeIssues]
        load_block(desc, [row + half * ROWS, k * NARROW], arrived.index(half), x_s.index(half * SLABS + k))


@gluon.jit
def load(
    descs, ring, x_s, x_bars, row, STEPS: gl.constexpr, TAIL: gl.constexpr, HALVES: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the loading warp. The weights of the first turns do not depend on the launch before."""
    x_desc, _, _, _, residual_desc = descs
    _, w2_s, _, _, empty = ring
    arrived, spent = x_bars
    STAGES: gl.constexpr = w2_s.shape[0]
    _load_weights(descs, ring, 0, TAIL, True, False)
    follow(OVERLAP)
    for half in gl.static_range(HALVES):  # type: ignore[reportGeneralTypeIssues]
        _load_rows(x_desc, x_s, arrived, row, half, HALVES)
    for turn in range(1, STEPS):
        # The first round finds all slots empty.
        mbarrier.wait(empty.index(turn % STAGES), (turn // STAGES & 1) ^ 1)
        _load_weights(descs, ring, turn, TAIL, False, False)
    mbarrier.wait(empty.index(STEPS % STAGES), (STEPS // STAGES & 1) ^ 1)
    _load_weights(descs, ring, STEPS, TAIL, False, True)
    if HAS_RESIDUAL:
        for half in gl.static_range(HALVES):  # type: ignore[reportGeneralTypeIssues]
            mbarrier.wait(spent.index(half), 0)
            _load_rows(residual_desc, x_s, arrived, row, half, HALVES)


@gluon.jit
def load_vectors(
    vectors, behind, HIDDEN: gl.constexpr, NORM: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS1: gl.constexpr,
    HAS_BIAS2: gl.constexpr, HAS_SCALE: gl.constexpr,
):  # fmt: skip
    """The role of a warp: TIMES bias1 and weight sums of every step, bias2 and LayerScale, all in fp32."""
    bias1_ptr, stride_bias1, column_sum_ptr, bias2_ptr, stride_bias2, scale_ptr, stride_scale = behind
    bias1_s, column_sum_s, bias2_s, scale_s, ready = vectors
    CHUNKS: gl.constexpr = bias1_s.shape[0] // CHUNK
    LANES: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])  # type: ignore[reportAssignmentType]
    columns = gl.arange(0, NARROW, LANES).to(gl.int64)
    for chunk in range(CHUNKS):
        bias = ()
        column_sum = ()
        for i in gl.static_range(CHUNK):  # type: ignore[reportGeneralTypeIssues]
            hidden = (chunk * CHUNK + i) * NARROW + columns
            keep = hidden < HIDDEN
            if HAS_BIAS1:
                bias = bias + (gl.load(bias1_ptr + hidden * stride_bias1, mask=keep, other=0.0),)
            if NORM == "layer":
                column_sum = column_sum + (gl.load(column_sum_ptr + hidden, mask=keep, other=0.0),)
        for i in gl.static_range(CHUNK):  # type: ignore[reportGeneralTypeIssues]
            if HAS_BIAS1:
                bias1_s.index(chunk * CHUNK + i).store(bias[i].to(gl.float32) * TIMES)
            if NORM == "layer":
                column_sum_s.index(chunk * CHUNK + i).store(column_sum[i])
        mbarrier.arrive(ready.index(chunk), count=1)
    for piece in range(bias2_s.shape[0]):
        at = piece * NARROW + columns
        if HAS_BIAS2:
            bias2_s.index(piece).store(gl.load(bias2_ptr + at * stride_bias2).to(gl.float32))
        if HAS_SCALE:
            scale_s.index(piece).store(gl.load(scale_ptr + at * stride_scale).to(gl.float32))
    mbarrier.arrive(ready.index(CHUNKS), count=1)
