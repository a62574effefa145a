"""The kernel of `linear` for middling numbers of rows on sm_90, in Gluon: features are the rows of its products.

A warpgroup multiplies 64 rows at a time, and 1,576 tokens (8 images of 197) are 13 tiles of 128: of fc2's 78 tiles of
128 x 128 that leaves 54 of 132 SMs without one. Columns of a product come in multiples of 8. So here the weights'
rows, which are multiples of 64, are the product's rows, and tokens are its columns, in a number that gives every SM one
tile: 128 x 72 of fc2, 256 x 144 of fc1, 132 tiles each. That number is a power of two and a tail, for that is what
blocks can be.

One tile a program, without a loop around it. A warp loads, GROUPS warpgroups multiply 64 features each. What they have
summed goes through shared memory, transposed, and they finish it together, rows of x by rows, so that a warp stores
whole lines of y. All run the same code: what a program runs once, it mostly waits for.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .ahead import fetch_ahead
from .linear_roles_load import merged_moments
from .linear_roles_ring import NARROW, barriers, load_block
from .primitives import STATS_COLUMNS, activate_fast, follow, rounded, shift_and_scale, tiles_over, widened

# Where an SM holds two programs: with few warps, one would take all registers else, needed or not.
SHARED_SM_REGISTERS = 128


@gluon.jit
def _load(descs, ring, feature, token, K, BLOCK_K: gl.constexpr, OVERLAP: gl.constexpr):
    """The role of the loading warp. The weights of the first steps do not depend on the launch before."""
    w_desc, wide_desc, tail_desc = descs
    w_s, wide_s, tail_s, full, empty = ring
    STAGES: gl.constexpr = wide_s.shape[0]
    W_BYTES: gl.constexpr = w_s.shape[1] * BLOCK_K * 2
    X_BYTES: gl.constexpr = (wide_s.shape[1] + tail_s.shape[1]) * BLOCK_K * 2
    steps = tiles_over(K, BLOCK_K)
    for step in range(gl.minimum(steps, STAGES)):
        mbarrier.expect(full.index(step), W_BYTES)
        load_block(w_desc, [feature, step * BLOCK_K], full.index(step), w_s.index(step))
    follow(OVERLAP)
    for step in range(steps):
        slot = step % STAGES
        if step >= STAGES:
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), W_BYTES)
            load_block(w_desc, [feature, step * BLOCK_K], full.index(slot), w_s.index(slot))
        mbarrier.expect(full.index(slot), X_BYTES)
        load_block(wide_desc, [token, step * BLOCK_K], full.index(slot), wide_s.index(slot))
        load_block(tail_desc, [token + wide_s.shape[1], step * BLOCK_K], full.index(slot), tail_s.index(slot))


@gluon.jit
def _row_vectors(
    stats_ptr, row, ROWS: gl.constexpr, M, K, eps, NORM: gl.constexpr, PARTIALS: gl.constexpr, TIMES: gl.constexpr
):  # fmt: skip
    """TIMES rstd and -TIMES rstd mean of ROWS rows of x, at most one for each of 64 threads."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])  # type: ignore[reportAssignmentType]
    rows = gl.minimum(row + gl.arange(0, ROWS, LANES), M - 1)
    mean, m2 = merged_moments(stats_ptr, rows, M, K, PARTIALS)
    mean, rstd = shift_and_scale(mean, m2, K, eps, NORM)
    return rstd * TIMES, -mean * (rstd * TIMES)


@gluon.jit
def _load_vectors(
    row_vectors, column_vectors_s, ready, behind, stats_ptr, feature, token, M, K, eps,
    NORM: gl.constexpr, PARTIALS: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of two warps: TIMES rstd and -TIMES rstd mean of the rows, TIMES bias, weight sums and LayerScale of the
    columns, all in fp32, while others multiply."""
    bias_ptr, column_sum_ptr, scale_ptr, _, _, _, _ = behind
    wide_vectors_s, tail_vectors_s = row_vectors
    WIDE: gl.constexpr = wide_vectors_s.shape[1]
    BY_64: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 2], [1, 0])  # type: ignore[reportAssignmentType]
    columns = (feature + _columns(column_vectors_s.shape[1], BY_64)).to(gl.int64)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + columns)
        column_vectors_s.index(0).store(bias.to(gl.float32) * TIMES)
    if NORM == "layer":
        column_vectors_s.index(1).store(gl.load(column_sum_ptr + columns))
    if HAS_SCALE:
        scale = gl.load(scale_ptr + columns)
        column_vectors_s.index(2).store(scale.to(gl.float32))
    if NORM != "none":
        follow(OVERLAP)
        for piece in gl.static_range(WIDE // NARROW):  # type: ignore[reportGeneralTypeIssues]
            rstd, shift = _row_vectors(stats_ptr, token + piece * NARROW, NARROW, M, K, eps, NORM, PARTIALS, TIMES)
            wide_vectors_s.index(0).slice(piece * NARROW, NARROW).store(rstd)
            wide_vectors_s.index(1).slice(piece * NARROW, NARROW).store(shift)
        rstd, shift = _row_vectors(
            stats_ptr, token + WIDE, tail_vectors_s.shape[1], M, K, eps, NORM, PARTIALS, TIMES
        )  # fmt: skip
        tail_vectors_s.index(0).store(rstd)
        tail_vectors_s.index(1).store(shift)
    mbarrier.arrive(ready.index(0), count=1)


@gluon.jit
def _columns(GROUPS: gl.constexpr, LAYOUT: gl.constexpr):
    """The numbers of [GROUPS, 64] features."""
    groups = gl.arange(0, GROUPS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, NARROW, gl.SliceLayout(0, LAYOUT))
    return groups[:, None] * NARROW + columns[None, :]


@gluon.jit
def _by_column(vectors_s, number: gl.constexpr, LAYOUT: gl.constexpr):
    """A vector by feature, [GROUPS, 1, 64]."""
    return vectors_s.index(number).load(gl.SliceLayout(1, LAYOUT))[:, None, :]


@gluon.jit
def _rows(TOKENS: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))


@gluon.jit
def _load_residual(
    behind, token, feature, GROUPS: gl.constexpr, TOKENS: gl.constexpr, M, LAYOUT: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """The residual of TOKENS rows, [GROUPS, TOKENS, 64]."""
    _, _, _, residual_ptr, stride_rm, _, _ = behind
    rows = _rows(TOKENS, LAYOUT)
    columns = _columns(GROUPS, gl.SliceLayout(1, LAYOUT))
    residual = columns[:, None, :] + rows[None, :, None]
    if HAS_RESIDUAL:
        first = residual_ptr + (gl.to_tensor(token).to(gl.int64) * stride_rm + feature)
        at = columns[:, None, :] + (rows * stride_rm)[None, :, None]
        residual = gl.load(first + at, mask=(token + rows < M)[None, :, None], other=0.0)
    return residual


@gluon.jit
def _finish_piece(
    behind, sums_s, column_vectors_s, shift, residual, token, feature, M, N, LAYOUT: gl.constexpr,
    NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr,
):  # fmt: skip
    """Finishes sums [GROUPS, TOKENS, 64] that belong at (token, feature): folded norm, bias, activation, LayerScale,
    residual, store, moments."""
    _, _, _, _, _, y_ptr, y_stats_ptr = behind
    GROUPS: gl.constexpr = sums_s.shape[0]
    TOKENS: gl.constexpr = sums_s.shape[1]
    acc = widened(sums_s.load(LAYOUT))
    if NORM == "none":
        acc = acc * TIMES
    if HAS_BIAS:
        acc = acc + _by_column(column_vectors_s, 0, LAYOUT)
    if NORM == "layer":
        acc = acc + shift[None, :, None] * _by_column(column_vectors_s, 1, LAYOUT)
    if ACTIVATION != "none":
        acc = activate_fast(acc, ACTIVATION, y_ptr.dtype.element_ty)
    if HAS_SCALE:
        acc = acc * _by_column(column_vectors_s, 2, LAYOUT)
    if HAS_RESIDUAL:
        acc = acc + widened(residual)
    rows = _rows(TOKENS, LAYOUT)
    keep = token + rows < M
    first = y_ptr + (gl.to_tensor(token).to(gl.int64) * N + feature)
    y, stored = rounded(acc, y_ptr.dtype.element_ty)
    at = _columns(GROUPS, gl.SliceLayout(1, LAYOUT))[:, None, :] + (rows * N)[None, :, None]
    gl.store(first + at, y, mask=keep[None, :, None])
    if EMIT_STATS:
        mean = gl.sum(stored, 2) * (1.0 / STATS_COLUMNS)
        apart = stored - mean[:, :, None]
        m2 = gl.sum(apart * apart, 2)
        parts = gl.arange(0, GROUPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
        first = y_stats_ptr + gl.to_tensor(feature // STATS_COLUMNS).to(gl.int64) * M + token
        at = first + (parts.to(gl.int64)[:, None] * M + rows[None, :])
        gl.store(at, mean, mask=keep[None, :])
        gl.store(at + gl.to_tensor(N // STATS_COLUMNS).to(gl.int64) * M, m2, mask=keep[None, :])


@gluon.jit
def _store_sums(sums_s, number: gl.constexpr, y):
    """Writes y [features, tokens], transposed, in pieces of 64 tokens from place `number` on."""
    GROUPS: gl.constexpr = y.shape[0] // NARROW
    TOKENS: gl.constexpr = y.shape[1]
    if TOKENS <= NARROW:
        sums_s.index(number).permute((0, 2, 1)).store(y.reshape((GROUPS, NARROW, TOKENS)))
    else:
        left, right = y.reshape((y.shape[0], 2, TOKENS // 2)).permute((0, 2, 1)).split()
        _store_sums(sums_s, number, left)
        _store_sums(sums_s, number + TOKENS // 2 // NARROW, right)


@gluon.jit
def _multiply(
    ring, sums, row_vectors, column_vectors_s, ready, behind, feature, token, M, N, K, BLOCK_K: gl.constexpr,
    GROUPS: gl.constexpr, NORM: gl.constexpr, ACTIVATION: gl.constexpr, TIMES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, EMIT_STATS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the warpgroups: the tile, multiplied and finished."""
    w_s, wide_s, tail_s, full, empty = ring
    wide_sums, tail_sums = sums
    wide_vectors_s, tail_vectors_s = row_vectors
    STAGES: gl.constexpr = wide_s.shape[0]
    WIDE: gl.constexpr = wide_s.shape[1]
    TAIL: gl.constexpr = tail_s.shape[1]
    # A thread has 16 bytes of a row, a warp 128 bytes of four rows: whole lines of memory, and all banks.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [GROUPS, 4, 1], [2, 1, 0])  # type: ignore[reportAssignmentType]
    BY_ROW: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))  # type: ignore[reportAssignmentType]
    WARPS: gl.constexpr = 4 * GROUPS  # type: ignore[reportAssignmentType]
    ACC_WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDE, 16])  # type: ignore[reportAssignmentType]
    ACC_TAIL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TAIL, 16])  # type: ignore[reportAssignmentType]
    follow(OVERLAP)
    residual = _load_residual(behind, token, feature, GROUPS, NARROW, M, LAYOUT, HAS_RESIDUAL)
    tail_residual = _load_residual(behind, token + WIDE, feature, GROUPS, TAIL, M, LAYOUT, HAS_RESIDUAL)
    wide = gl.zeros((GROUPS * NARROW, WIDE), gl.float32, ACC_WIDE)
    tail = gl.zeros((GROUPS * NARROW, TAIL), gl.float32, ACC_TAIL)
    for step in range(tiles_over(K, BLOCK_K)):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        w = w_s.index(slot)
        wide = warpgroup_mma(w, wide_s.index(slot).permute((1, 0)), wide, use_acc=step > 0, is_async=True)
        tail = warpgroup_mma(w, tail_s.index(slot).permute((1, 0)), tail, use_acc=step > 0, is_async=True)
        # The products of the step before have ended.
        wide, tail = warpgroup_mma_wait(2, deps=(wide, tail))  # type: ignore[reportGeneralTypeIssues]
        if step > 0:
            mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
    wide, tail = warpgroup_mma_wait(0, deps=(wide, tail))  # type: ignore[reportGeneralTypeIssues]
    mbarrier.wait(ready.index(0), 0)
    if NORM != "none":
        wide = wide * wide_vectors_s.index(0).load(gl.SliceLayout(0, ACC_WIDE))[None, :]
        tail = tail * tail_vectors_s.index(0).load(gl.SliceLayout(0, ACC_TAIL))[None, :]
    y_wide, _ = rounded(wide, wide_sums.dtype)
    y_tail, _ = rounded(tail, wide_sums.dtype)
    _store_sums(wide_sums, 0, y_wide)
    _store_sums(tail_sums, 0, y_tail)
    for piece in gl.static_range(WIDE // NARROW):  # type: ignore[reportGeneralTypeIssues]
        row = token + piece * NARROW
        shift = gl.zeros([NARROW], gl.float32, BY_ROW)
        if NORM == "layer":
            shift = wide_vectors_s.index(1).slice(piece * NARROW, NARROW).load(BY_ROW)
        if piece > 0:
            residual = _load_residual(behind, row, feature, GROUPS, NARROW, M, LAYOUT, HAS_RESIDUAL)
        _finish_piece(
            behind, wide_sums.index(piece), column_vectors_s, shift, residual, row, feature, M, N, LAYOUT, NORM,
            ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
        )  # fmt: skip
    shift = gl.zeros([TAIL], gl.float32, BY_ROW)
    if NORM == "layer":
        shift = tail_vectors_s.index(1).load(BY_ROW)
    _finish_piece(
        behind, tail_sums.index(0), column_vectors_s, shift, tail_residual, token + WIDE, feature, M, N, LAYOUT, NORM,
        ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def linear_columns_kernel(
    w_desc,  # [N, K] in blocks of [GROUPS * 64, BLOCK_K]
    wide_desc,  # x [M, K] in blocks of [WIDE, BLOCK_K]
    tail_desc,  # x [M, K] in blocks of [TAIL, BLOCK_K]
    ahead_ptr,  # [N, K]: the weights, if they can be asked for ahead
    bias_ptr,  # [N], contiguous
    stats_ptr,  # [2, partials, M]
    column_sum_ptr,  # [N], fp32
    scale_ptr,  # [N], contiguous
    residual_ptr,  # [M, N]
    y_ptr,  # [M, N]
    y_stats_ptr,  # [2, N / 64, M]
    M,
    N,
    K,
    stride_rm,
    eps,
    NORM: gl.constexpr,
    PARTIALS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    EMIT_STATS: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """This program computes GROUPS * 64 columns of WIDE + TAIL rows of y."""
    if ahead_ptr is not None:
        fetch_ahead(ahead_ptr, N, K, OVERLAP)
    TIMES: gl.constexpr = 1.0 if ACTIVATION == "none" else 0.5  # type: ignore[reportAssignmentType]
    FLOATS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])  # type: ignore[reportAssignmentType]
    FLOATS_2D: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])  # type: ignore[reportAssignmentType]
    FEATURES: gl.constexpr = w_desc.block_shape[0]
    BLOCK_K: gl.constexpr = w_desc.block_shape[1]
    WIDE: gl.constexpr = wide_desc.block_shape[0]
    TAIL: gl.constexpr = tail_desc.block_shape[0]
    GROUPS: gl.constexpr = FEATURES // NARROW
    SUMS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUPS, NARROW, NARROW], w_desc.dtype)  # type: ignore[reportAssignmentType]
    TAIL_SUMS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUPS, TAIL, NARROW], w_desc.dtype)  # type: ignore[reportAssignmentType]
    w_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, FEATURES, BLOCK_K], w_desc.layout)
    wide_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, WIDE, BLOCK_K], wide_desc.layout)
    tail_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, TAIL, BLOCK_K], tail_desc.layout)
    sums = (
        gl.allocate_shared_memory(w_desc.dtype, [WIDE // NARROW, GROUPS, NARROW, NARROW], SUMS),
        gl.allocate_shared_memory(w_desc.dtype, [1, GROUPS, TAIL, NARROW], TAIL_SUMS),
    )
    row_vectors = (
        gl.allocate_shared_memory(gl.float32, [2, WIDE], FLOATS),
        gl.allocate_shared_memory(gl.float32, [2, TAIL], FLOATS),
    )
    column_vectors_s = gl.allocate_shared_memory(gl.float32, [3 if HAS_SCALE else 2, GROUPS, NARROW], FLOATS_2D)
    ready = barriers(1, 1)
    # Weights and x are expected apart.
    ring = w_s, wide_s, tail_s, barriers(STAGES, 2), barriers(STAGES, 1)
    fence_async_shared()
    behind = bias_ptr, column_sum_ptr, scale_ptr, residual_ptr, stride_rm, y_ptr, y_stats_ptr
    token_tiles = tiles_over(M, WIDE + TAIL)
    feature = gl.program_id(0) // token_tiles * FEATURES
    token = gl.program_id(0) % token_tiles * (WIDE + TAIL)
    descs = w_desc, wide_desc, tail_desc
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    ring, sums, row_vectors, column_vectors_s, ready, behind, feature, token, M, N, K, BLOCK_K, GROUPS,
                    NORM, ACTIVATION, TIMES, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, EMIT_STATS, OVERLAP,
                ),
            ),
            (
                _load_vectors,
                (
                    row_vectors, column_vectors_s, ready, behind, stats_ptr, feature, token, M, K, eps, NORM,
                    PARTIALS, TIMES, HAS_BIAS, HAS_SCALE, OVERLAP,
                ),
            ),
            (_load, (descs, ring, feature, token, K, BLOCK_K, OVERLAP)),
        ],
        [2, 1],
        [64, 64],
    )  # fmt: skip
