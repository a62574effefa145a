"""The kernel of `patch_embed` whose pixels come in blocks, on sm_90, in Gluon.

A descriptor sees the images [B, C, H, W] as [PH, B, C * grid_h, grid_w / 2, 2 PW]: a step along the second axis is an
image, along the third a row of patches, for those of all channels lie one behind the other, along the fourth a pair of
patches. A block of it, [STEP, IMAGES, HIGH, WIDE, 2 PW], is STEP rows of pixels of 64 pairs, and in shared memory as
many matrices [64, 2 PW], whose left half is an operand of a product for the pairs' first patches, the right half for
their second ones. So nobody computes addresses of pixels, and a line of a block has 64 bytes; of a patch alone, 32.

Which pairs make 64 is the host's choice (`pairs_of_block`): 32 images x 2 rows of one where the grid is 14 x 14. What
of a block is no patch is multiplied and not stored.

Warps have roles, as in `linear_roles`, and barriers and slots are used as there: one loads, two warpgroups multiply 64
patches each, first and second ones, four warps finish what those have summed, under the next product. Of a program's
last tile, under which nobody multiplies, all finish a part (but for 192 features, beside which registers would be
spilled). A program walks the tiles; those of the same patches follow each other, so that pixels come from memory once,
and from L2 after that. Tokens in front, which are no products, are written by those that finish before they have
anything to finish.
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
from .linear_roles_finish import WARPS, store_stats
from .linear_roles_multiply import store_pieces
from .linear_roles_ring import HALVES, NARROW, ROWS, barriers, load_block, seen_as
from .primitives import follow, rounded, tiles_over, widened

# Tokens in front that are written at a time: one for each row of the finishing warps' lanes.
_FRONT = gl.constexpr(16)
# A finishing thread has 16 bytes of a row, a warp 128 bytes of four rows: whole lines of memory, and all banks.
_FINISHED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS.value, 1], [1, 0]))


@gluon.jit
def _blocks_of(problem, BLOCK: gl.constexpr):
    """Blocks along the batch, the grid's height and its width."""
    batch, grid_h, grid_w, _, _, _ = problem
    _, IMAGES, HIGH, WIDE, _ = BLOCK
    return tiles_over(batch, IMAGES), tiles_over(grid_h, HIGH), tiles_over(grid_w // HALVES, WIDE)


@gluon.jit
def _turns_of(problem, BLOCK: gl.constexpr, FEATURES: gl.constexpr):
    """Tiles of this program."""
    groups, down, across = _blocks_of(problem, BLOCK)
    tiles = groups * down * across * (problem[4] // FEATURES)
    return (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _tile_of_turn(turn, problem, BLOCK: gl.constexpr, FEATURES: gl.constexpr):
    """Image, row and pair in the row of the first patch of the turn-th tile of this program, and its first feature."""
    _, IMAGES, HIGH, WIDE, _ = BLOCK
    _, down, across = _blocks_of(problem, BLOCK)
    tile = gl.program_id(0) + turn * gl.num_programs(0)
    parts = problem[4] // FEATURES
    block = tile // parts
    high, wide = block // across % down * HIGH, block % across * WIDE
    return block // (across * down) * IMAGES, high, wide, tile % parts * FEATURES


@gluon.jit
def _load_weights(descs, ring, slot, feature, k, FEATURES: gl.constexpr):
    """Loads the weights of a step into a slot, whose barrier expects them."""
    _, w_desc, w_tail_desc = descs
    _, wide_s, tail_s, full, _ = ring
    mbarrier.expect(full.index(slot), FEATURES * wide_s.shape[2] * 2)
    load_block(w_desc, [feature, k], full.index(slot), wide_s.index(slot))
    if wide_s.shape[1] < FEATURES:
        load_block(w_tail_desc, [feature + wide_s.shape[1], k], full.index(slot), tail_s.index(slot))


@gluon.jit
def _load(descs, ring, problem, BLOCK: gl.constexpr, PH: gl.constexpr, FEATURES: gl.constexpr, OVERLAP: gl.constexpr):
    """The role of the loading warp: the operands of all tiles of this program, in order. The weights of the first steps
    do not depend on the launch before."""
    pixels_desc, _, _ = descs
    pixels_s, wide_s, _, full, empty = ring
    STAGES: gl.constexpr = wide_s.shape[0]
    BLOCK_K: gl.constexpr = wide_s.shape[2]
    PARTS: gl.constexpr = PH // BLOCK[0]
    _, grid_h, _, _, _, K = problem
    feature = _tile_of_turn(0, problem, BLOCK, FEATURES)[3]
    early = gl.minimum(K // BLOCK_K, STAGES)
    for ahead in range(early):
        _load_weights(descs, ring, ahead, feature, ahead * BLOCK_K, FEATURES)
    follow(OVERLAP)
    step = 0
    for turn in range(_turns_of(problem, BLOCK, FEATURES)):
        image, high, wide, feature = _tile_of_turn(turn, problem, BLOCK, FEATURES)
        for k in range(0, K, BLOCK_K):
            slot = step % STAGES
            if step >= STAGES:
                mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            if step >= early:
                _load_weights(descs, ring, slot, feature, k, FEATURES)
            mbarrier.expect(full.index(slot), HALVES * ROWS * BLOCK_K * 2)
            # A channel is so many steps.
            channel = k // BLOCK_K // PARTS * grid_h
            row = k // BLOCK_K % PARTS * BLOCK[0]
            load_block(pixels_desc, [row, image, channel + high, wide, 0], full.index(slot), pixels_s.index(slot))
            step += 1


@gluon.jit
def _wait(wide, tail, UNDER_WAY: gl.constexpr, HAS_TAIL: gl.constexpr):
    """Waits until so many products are under way."""
    if HAS_TAIL:
        wide, tail = warpgroup_mma_wait(UNDER_WAY, deps=(wide, tail))  # type: ignore[reportGeneralTypeIssues]
    else:
        wide = warpgroup_mma_wait(UNDER_WAY, deps=(wide,))
    return wide, tail


@gluon.jit
def _load_rows(table_ptr, places, keep, feature, N):
    """Rows of a table [rows, N], in the NARROW features from `feature` on; zeros where not to keep."""
    columns = feature + gl.arange(0, NARROW, gl.SliceLayout(0, _FINISHED))
    return gl.load(table_ptr + ((places * N)[:, None] + columns[None, :]), mask=keep[:, None], other=0.0)


@gluon.jit
def _load_added(memory, places, keep, feature, N):
    """Positions and bias of NARROW features; something else where there are none."""
    bias_ptr, _, position_ptr, _, _ = memory
    columns = feature + gl.arange(0, NARROW, gl.SliceLayout(0, _FINISHED))
    position = columns[None, :] + places[:, None]
    if position_ptr is not None:
        position = _load_rows(position_ptr, places, keep, feature, N)
    bias = columns
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + columns)
    return position, bias


@gluon.jit
def _store_tokens(memory, acc, first, rows, keep, feature, M, N):
    """Rounds finished tokens [rows, NARROW], stores them, and their moments; rows are counted from number `first`."""
    _, _, _, tokens_ptr, stats_ptr = memory
    columns = gl.arange(0, NARROW, gl.SliceLayout(0, _FINISHED))
    y, stored = rounded(acc, tokens_ptr.dtype.element_ty)
    at = tokens_ptr + (gl.to_tensor(first).to(gl.int64) * N + feature)
    gl.store(at + ((rows * N)[:, None] + columns[None, :]), y, mask=keep[:, None])
    if stats_ptr is not None:
        store_stats(stats_ptr + first, stored, rows, keep, feature, M, N)


@gluon.jit
def _write_front(memory, problem, PREFIX: gl.constexpr, PLACED: gl.constexpr):
    """This program's share of the tokens in front of the patches: prefix and position."""
    _, prefix_ptr, position_ptr, _, _ = memory
    batch, grid_h, grid_w, M, N, _ = problem
    pieces = N // NARROW
    items = tiles_over(batch * PREFIX, _FRONT) * pieces
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        image = item // pieces * _FRONT // PREFIX
        number = item // pieces * _FRONT + gl.arange(0, _FRONT, gl.SliceLayout(1, _FINISHED))
        feature = item % pieces * NARROW
        keep = number < batch * PREFIX
        place = number % PREFIX
        acc = _load_rows(prefix_ptr, place, keep, feature, N).to(gl.float32)
        if PLACED > 0:
            acc += _load_rows(position_ptr, place, keep, feature, N).to(gl.float32)
        tokens = PREFIX + grid_h * grid_w
        rows = (number // PREFIX - image) * tokens + place
        _store_tokens(memory, acc, image * tokens, rows, keep, feature, M, N)


@gluon.jit
def _finish_pieces(
    sums, memory, problem, turn, half, begin, end, BLOCK: gl.constexpr, FEATURES: gl.constexpr, PREFIX: gl.constexpr,
    PLACED: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """Finishes 64 patches of a tile, first or second ones, 64 features at a time, pieces `begin` to `end`, of which a
    warp has 16 rows. WAIT: others have summed them."""
    bias_ptr, _, position_ptr, _, _ = memory
    sums_s, summed, _ = sums
    batch, grid_h, grid_w, M, N, _ = problem
    _, _, HIGH, WIDE, _ = BLOCK
    PIECES: gl.constexpr = FEATURES // NARROW
    image, high, wide, first = _tile_of_turn(turn, problem, BLOCK, FEATURES)
    of_block = gl.arange(0, ROWS, gl.SliceLayout(1, _FINISHED))
    images = of_block // (HIGH * WIDE)
    highs = high + of_block // WIDE % HIGH
    wides = (wide + of_block % WIDE) * HALVES + half
    keep = (image + images < batch) & (highs < grid_h) & (wides < grid_w)
    patch = highs * grid_w + wides
    tokens = PREFIX + grid_h * grid_w
    rows = images * tokens + PREFIX + patch
    # Where there are none left, those of the first piece are not used.
    position, bias = _load_added(memory, PLACED + patch, keep, first + begin % PIECES * NARROW, N)
    if WAIT:
        mbarrier.wait(summed.index(half), turn & 1)
    for piece in range(begin, end):
        # Those of the next piece are on their way while this one is finished; behind the last the same.
        after = first + gl.minimum(piece + 1, end - 1) * NARROW
        next_position, next_bias = _load_added(memory, PLACED + patch, keep, after, N)
        acc = widened(sums_s.index(half * PIECES + piece).load(_FINISHED))
        if bias_ptr is not None:
            acc = acc + bias.to(gl.float32)[None, :]
        if position_ptr is not None:
            acc = acc + widened(position)
        _store_tokens(memory, acc, image * tokens, rows, keep, first + piece * NARROW, M, N)
        position, bias = next_position, next_bias


@gluon.jit
def _finish(
    sums, memory, problem, BLOCK: gl.constexpr, FEATURES: gl.constexpr, PREFIX: gl.constexpr, PLACED: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of the finishing warps: tokens in front, then the patches of all tiles of this program, in order."""
    PIECES: gl.constexpr = FEATURES // NARROW
    follow(OVERLAP)
    if PREFIX > 0:
        _write_front(memory, problem, PREFIX, PLACED)
    turns = _turns_of(problem, BLOCK, FEATURES)
    for item in range(turns * HALVES):
        turn = item // HALVES
        begin = 0
        if PIECES <= 2:
            # Of the last tile those that multiplied finish the pieces in front.
            begin = gl.where(turn == turns - 1, (PIECES + 1) // 2, 0)
        _finish_pieces(sums, memory, problem, turn, item % HALVES, begin, PIECES, BLOCK, FEATURES, PREFIX, PLACED, True)
        mbarrier.arrive(sums[2].index(item % HALVES), count=1)


@gluon.jit
def _multiply(
    half: gl.constexpr, ring, sums, memory, problem, BLOCK: gl.constexpr, FEATURES: gl.constexpr, PREFIX: gl.constexpr,
    PLACED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The role of a multiplying warpgroup: the sums of its 64 patches of all tiles of this program, in order, and some
    results of the last one."""
    pixels_s, wide_s, tail_s, full, empty = ring
    sums_s, summed, free = sums
    STAGES: gl.constexpr = wide_s.shape[0]
    STEP: gl.constexpr = BLOCK[0]
    PW: gl.constexpr = BLOCK[4] // HALVES
    WIDE: gl.constexpr = wide_s.shape[1]
    PAIRS: gl.constexpr = gl.NVMMASharedLayout(BLOCK[4] * 2, 16)  # type: ignore[reportAssignmentType]
    SHAPE: gl.constexpr = [STAGES * STEP, ROWS, BLOCK[4]]  # type: ignore[reportAssignmentType]
    pairs_s = seen_as(pixels_s, SHAPE, PAIRS)
    PIECES: gl.constexpr = FEATURES // NARROW
    ACC_WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])  # type: ignore[reportAssignmentType]
    ACC_TAIL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW, 16])  # type: ignore[reportAssignmentType]
    HAS_TAIL: gl.constexpr = FEATURES > WIDE  # type: ignore[reportAssignmentType]
    turns = _turns_of(problem, BLOCK, FEATURES)
    wide = gl.zeros((ROWS, WIDE), gl.float32, ACC_WIDE)
    tail = gl.zeros((ROWS, NARROW), gl.float32, ACC_TAIL)
    step = 0
    for turn in range(turns):
        for part in range(problem[5] // wide_s.shape[2]):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            for i in gl.static_range(STEP):  # type: ignore[reportGeneralTypeIssues]
                add = (part > 0) | (i > 0)
                pixels = pairs_s.index(slot * STEP + i).slice(half * PW, PW, dim=1)
                w = wide_s.index(slot).slice(i * PW, PW, dim=1).permute((1, 0))
                wide = warpgroup_mma(pixels, w, wide, use_acc=add, is_async=True)
                if HAS_TAIL:
                    w = tail_s.index(slot).slice(i * PW, PW, dim=1).permute((1, 0))
                    tail = warpgroup_mma(pixels, w, tail, use_acc=add, is_async=True)
            # The products of the step before have ended.
            wide, tail = _wait(wide, tail, STEP * (2 if HAS_TAIL else 1), HAS_TAIL)
            if part > 0:
                mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
            step += 1
        wide, tail = _wait(wide, tail, 0, HAS_TAIL)
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        mbarrier.wait(free.index(half), (turn & 1) ^ 1)
        store_pieces(sums_s, half * PIECES, rounded(wide, sums_s.dtype)[0])
        if HAS_TAIL:
            store_pieces(sums_s, half * PIECES + WIDE // NARROW, rounded(tail, sums_s.dtype)[0])
        mbarrier.arrive(summed.index(half), count=1)
    if not HAS_TAIL:
        follow(OVERLAP)
        _finish_pieces(
            sums, memory, problem, turns - 1, half, 0, (PIECES + 1) // 2, BLOCK, FEATURES, PREFIX, PLACED, False
        )  # fmt: skip


# One compiled kernel for every number of images and every grid that share a shape of blocks.
@gluon.jit(do_not_specialize=["batch", "grid_h", "grid_w", "M"])
def patch_embed_blocks_kernel(
    pixels_desc,  # [PH, B, C * grid_h, grid_w / 2, 2 PW] in blocks of [STEP, IMAGES, HIGH, WIDE, 2 PW], 64 pairs
    w_desc,  # [D, C * PH * PW] in blocks of [64 or 128, BLOCK_K]
    w_tail_desc,  # the same in blocks of [64, BLOCK_K], for what 192 features have beyond 128
    ahead_ptr,  # [D, C * PH * PW]: the weights, if they can be asked for ahead
    bias_ptr,  # [D]
    prefix_ptr,  # [PREFIX, D]
    position_ptr,  # [T, D], or [T - PREFIX, D] for patches only
    tokens_ptr,  # [B, T, D]
    stats_ptr,  # [2, D / 64, B * T]
    batch,
    grid_h,
    grid_w,
    M,
    N,
    K,
    PH: gl.constexpr,
    PREFIX: gl.constexpr,
    PLACED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """This program computes every P-th tile (of P programs) of a block of patches x BLOCK_N features. BLOCK_M is 128,
    the patches of a block; D is a multiple of BLOCK_N, PH one of STEP, BLOCK_K is STEP * PW. PLACED: tokens in front
    that have a position, PREFIX or 0."""
    if ahead_ptr is not None:
        fetch_ahead(ahead_ptr, N, K, OVERLAP)
    BLOCK: gl.constexpr = pixels_desc.block_shape
    WIDE: gl.constexpr = w_desc.block_shape[0]
    DTYPE: gl.constexpr = w_desc.dtype
    SUMS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, NARROW], DTYPE)  # type: ignore[reportAssignmentType]
    pixels_s = gl.allocate_shared_memory(DTYPE, [STAGES] + BLOCK, pixels_desc.layout)
    wide_s = gl.allocate_shared_memory(DTYPE, [STAGES, WIDE, BLOCK_K], w_desc.layout)
    tail_s = wide_s
    if BLOCK_N > WIDE:
        tail_s = gl.allocate_shared_memory(DTYPE, [STAGES, NARROW, BLOCK_K], w_tail_desc.layout)
    sums_s = gl.allocate_shared_memory(DTYPE, [HALVES * BLOCK_N // NARROW, ROWS, NARROW], SUMS)
    # Weights and pixels are expected apart.
    ring = pixels_s, wide_s, tail_s, barriers(STAGES, 2), barriers(STAGES, HALVES)
    sums = sums_s, barriers(HALVES, 1), barriers(HALVES, 1)
    fence_async_shared()
    problem = batch, grid_h, grid_w, M, N, K
    memory = bias_ptr, prefix_ptr, position_ptr, tokens_ptr, stats_ptr
    gl.warp_specialize(
        [
            (_multiply, (0, ring, sums, memory, problem, BLOCK, BLOCK_N, PREFIX, PLACED, OVERLAP)),
            (_multiply, (1, ring, sums, memory, problem, BLOCK, BLOCK_N, PREFIX, PLACED, OVERLAP)),
            (_finish, (sums, memory, problem, BLOCK, BLOCK_N, PREFIX, PLACED, OVERLAP)),
            (_load, ((pixels_desc, w_desc, w_tail_desc), ring, problem, BLOCK, PH, BLOCK_N, OVERLAP)),
        ],
        [4, 4, 1],
        [152, 168, 40],
    )
