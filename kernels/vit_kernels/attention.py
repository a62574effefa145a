"""Flash attention: o = softmax(scale q k^T + mask) v, one pass over the keys with running maximum and sum.

The keys that are left over by whole blocks come first, in a block of their own that is no wider than it must be: 197
keys are 16 + 3 x 64, not 4 x 64, the loop over whole blocks masks nothing, and the keys of the first block, which no
loop fetches ahead, arrive while other programs of the SM compute.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import attention_tiles, tiles, with_torch
from .attention_block import LOG2_E, attend_block
from .attention_checks import check_attention, expand_mask
from .attention_roles import attention_roles_kernel
from .attention_whole import attention_whole_kernel
from .checks import check_flag
from .device import device_of
from .launch import allocate, describable, describe_in_gluon, launch
from .primitives import follow, tiles_over

LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def attention_kernel(
    q_ptr,  # [B, Nq, H, D]
    k_ptr,  # [B, Nk, Hk, D]
    v_ptr,  # [B, Nk, Hk, D]
    lengths_ptr,  # key lengths [B], or, PACKED, the first row of each sequence [B + 1]
    mask_ptr,  # [B, H, Nq, Nk], expanded by strides
    o_ptr,  # [B, Nq, H, D]
    lse_ptr,  # [B, H, Nq]
    heads,
    queries,
    keys,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_vd,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    logit_scale,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,
    MASK: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """This program computes queries [tile * BLOCK_M, (tile + 1) * BLOCK_M) of one head of one image.

    The tiles of a head follow each other, so that its keys and values are read from L2. Strides of images, tokens and
    heads count in UNIT elements. REST: width of the block for the keys left over by whole blocks, 0 if there are none.
    It is 0, too, where only the program knows which keys are its last, causal, with lengths or packed: there a loop of
    masked blocks ends it. PACKED: image i is the rows [lengths[i], lengths[i + 1]) of one image, and queries, keys are
    those of the longest.
    """
    follow(OVERLAP)
    tiles_m = tiles_over(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles_m
    head = (tl.program_id(0) // tiles_m) % heads
    image = (tl.program_id(0) // tiles_m // heads).to(tl.int64)
    head_k = (head // GROUP).to(tl.int64)
    first = image * queries
    if PACKED:
        first = tl.load(lengths_ptr + image).to(tl.int64)
        queries = (tl.load(lengths_ptr + image + 1) - first).to(tl.int32)
        keys = queries
        if tile * BLOCK_M >= queries:
            return
        q_ptr += first * stride_qn * UNIT
        k_ptr += first * stride_kn * UNIT
        v_ptr += first * stride_vn * UNIT
    else:
        q_ptr += image * stride_qb * UNIT
        k_ptr += image * stride_kb * UNIT
        v_ptr += image * stride_vb * UNIT
    q_ptr += head.to(tl.int64) * stride_qh * UNIT
    k_ptr += head_k * stride_kh * UNIT
    v_ptr += head_k * stride_vh * UNIT
    if MASK != "none":
        mask_ptr += image * stride_mask_b + head.to(tl.int64) * stride_mask_h

    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    keep_query = query < queries
    # Queries past the end repeat the last one; their results are dropped.
    q_row = q_ptr + tl.minimum(query, queries - 1).to(tl.int64)[:, None] * stride_qn * UNIT
    d = tl.arange(0, MAIN)
    q = tl.load(q_row + d.to(tl.int64)[None, :] * stride_qd, mask=(d < WIDTH)[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    # Without a tail these two only fill the argument list.
    q_tail = q
    acc_tail = tl.zeros((BLOCK_M,), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if TAIL:
        d_tail = MAIN + tl.arange(0, TAIL)
        at = q_row + d_tail.to(tl.int64)[None, :] * stride_qd
        q_tail = tl.load(at, mask=(d_tail < WIDTH)[None, :], other=0.0)
        acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    # The diagonal is aligned bottom-right of all keys; a key length only cuts keys off.
    diagonal = keys - queries
    stop = keys
    if HAS_LENGTHS:
        stop = tl.maximum(tl.minimum(tl.load(lengths_ptr + image), keys), 0).to(tl.int32)
    length = stop
    whole = stop // BLOCK_N * BLOCK_N
    if CAUSAL:
        stop = tl.minimum(stop, (tile + 1) * BLOCK_M + diagonal)
        whole = tl.maximum(tl.minimum(whole, (tile * BLOCK_M + diagonal + 1) // BLOCK_N * BLOCK_N), 0)
    if REST:
        acc, acc_tail, row_sum, row_max = attend_block(
            acc, acc_tail, row_sum, row_max, q, q_tail, k_ptr, v_ptr, mask_ptr,
            query, keep_query, whole, length, diagonal,
            stride_kn, stride_kd, stride_vn, stride_vd, stride_mask_m, stride_mask_n, logit_scale,
            WIDTH, MAIN, TAIL, UNIT, MASK, CAUSAL, True, True, PRECISION, REST,
        )  # fmt: skip
    for start in range(0, whole, BLOCK_N):
        acc, acc_tail, row_sum, row_max = attend_block(
            acc, acc_tail, row_sum, row_max, q, q_tail, k_ptr, v_ptr, mask_ptr,
            query, keep_query, start, length, diagonal,
            stride_kn, stride_kd, stride_vn, stride_vd, stride_mask_m, stride_mask_n, logit_scale,
            WIDTH, MAIN, TAIL, UNIT, MASK, CAUSAL, False, False, PRECISION, BLOCK_N,
        )  # fmt: skip
    if CAUSAL or HAS_LENGTHS or PACKED:
        for start in range(whole, stop, BLOCK_N):
            acc, acc_tail, row_sum, row_max = attend_block(
                acc, acc_tail, row_sum, row_max, q, q_tail, k_ptr, v_ptr, mask_ptr,
                query, keep_query, start, length, diagonal,
                stride_kn, stride_kd, stride_vn, stride_vd, stride_mask_m, stride_mask_n, logit_scale,
                WIDTH, MAIN, TAIL, UNIT, MASK, CAUSAL, True, False, PRECISION, BLOCK_N,
            )  # fmt: skip

    # A row without any allowed key has the sum 0 and gives 0.
    inverse = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)
    out = ((first + query.to(tl.int64)[:, None]) * heads + head) * WIDTH
    tl.store(
        o_ptr + out + d[None, :],
        (acc * inverse[:, None]).to(o_ptr.dtype.element_ty),
        mask=keep_query[:, None] & (d < WIDTH)[None, :],
    )
    if TAIL:
        d_tail = MAIN + tl.arange(0, TAIL)
        tl.store(
            o_ptr + out + d_tail[None, :],
            (acc_tail * inverse[:, None]).to(o_ptr.dtype.element_ty),
            mask=keep_query[:, None] & (d_tail < WIDTH)[None, :],
        )
    if RETURN_LSE:
        lse = row_max * LN_2 + tl.log(row_sum)
        tl.store(lse_ptr + (image * heads + head) * queries + query, lse, mask=keep_query)


def stride_unit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int:
    """8 for 16-bit tensors where 8 divides all strides but those of the head width, and 16 does not; else 1.

    Triton knows of a run-time number only whether 16 divides it. Heads 72 wide lie 72 elements apart; that 8 divides
    it, and with it loads of 16 bytes in place of 2, has to be said. Said where nothing is gained by it, or in fp32, it
    makes some tiles spill.
    """
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    gains = q.element_size() == 2 and any(stride % 16 for stride in strides)
    return 8 if gains and all(stride % 8 == 0 for stride in strides) else 1


def launch_attention(
    tile: attention_tiles.AttentionTile, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    lengths: torch.Tensor | None, mask: torch.Tensor | None, o: torch.Tensor, lse: torch.Tensor | None, scale: float, *,
    sequences: int, queries: int, keys: int, mask_kind: str, causal: bool, packed: bool, precision: str,
) -> None:  # fmt: skip
    """Launches the kernel on checked arguments, for `sequences` sequences of at most so many queries and keys."""
    heads, width = q.shape[2:]
    main, tail = tiles.split_width(width)
    unit = stride_unit(q, k, v)
    strides = [stride // (unit if axis < 3 else 1) for x in (q, k, v) for axis, stride in enumerate(x.stride())]
    last_by_loop = causal or lengths is not None
    launch(
        q, attention_kernel, triton.cdiv(queries, tile.block_m) * sequences * heads,
        q, k, v, lengths, mask, o, lse, heads, queries, keys,
        *strides, *((0, 0, 0, 0) if mask is None else mask.stride()),
        scale * LOG2_E.value,
        WIDTH=width, MAIN=main, TAIL=tail, GROUP=heads // k.shape[2], UNIT=unit, CAUSAL=causal,
        HAS_LENGTHS=lengths is not None and not packed, PACKED=packed, MASK=mask_kind, RETURN_LSE=lse is not None,
        PRECISION=precision, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        REST=0 if last_by_loop else attention_tiles.rest_block(keys, tile.block_n),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def heads_adjoin(x: torch.Tensor) -> bool:
    """Whether the heads of x [B, N, H, D] lie side by side in rows that tensor descriptors can load."""
    return (x.shape[2] == 1 or x.stride(2) == x.shape[3]) and describable(x)


def launch_whole(
    tile: attention_tiles.AttentionTile, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
    scale: float,
) -> None:  # fmt: skip
    """Launches the kernel that keeps all keys of a head in shared memory, for tensors that `heads_adjoin`."""
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    rest = attention_tiles.rest_block(keys, tile.block_n)
    rows = [x.as_strided((batch, x.shape[1], heads * width), (*x.stride()[:2], 1)) for x in (q, k, v, o)]
    blocks = [describe_in_gluon(x, 1, tile.block_m, width) for x in rows]
    rests = [describe_in_gluon(x, 1, rest, width) if rest else None for x in rows[1:3]]
    programs = triton.cdiv(triton.cdiv(queries, tile.block_m), tile.whole) * batch * heads
    launch(
        q, attention_whole_kernel, programs, *blocks[:3], *rests, blocks[3], heads, queries, keys, tile.whole,
        scale * LOG2_E.value, BLOCKS=keys // tile.block_n, REST=rest, WIDTH=width, BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip


def launch_roles(
    tile: attention_tiles.AttentionTile, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
    scale: float,
) -> None:  # fmt: skip
    """Launches the kernel whose warps have roles, one program an SM, for tensors that `heads_adjoin`."""
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    _, half, rest = attention_tiles.blocks_of_keys(keys, tile.block_n)
    rows = [x.as_strided((batch, x.shape[1], heads * width), (*x.stride()[:2], 1)) for x in (q, k, v, o)]
    narrow = [describe_in_gluon(x, 1, 64, width) for x in rows]
    rests = [describe_in_gluon(x, 1, rest, width) if rest else None for x in rows[1:3]]
    programs = min(triton.cdiv(queries, tile.block_m) * batch * heads, device_of(q).sm_count)
    launch(
        q, attention_roles_kernel, programs, *narrow[:3], *rests, narrow[3], batch * heads, heads, queries, keys,
        scale * LOG2_E.value, HALF=half, REST=rest, WIDTH=width, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    return_lse: bool = False,
    tf32: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o = softmax(scale q k^T + mask) v per head, with fp32 statistics.

    q [B, Nq, H, D]; k, v [B, Nk, Hk, D] of one dtype (fp32, fp16, bf16) and any strides, so that the three views of a
    packed projection [B, N, 3, H, D] go in as they are. D from 1 to 128 (16 and more at full speed); H a multiple of
    Hk: query head h reads the key head h // (H / Hk). Returns o [B, Nq, H, D] contiguous, or (o, lse).

    scale: positive, default D**-0.5. causal: query i sees keys up to i + Nk - Nq (aligned bottom-right).
    key_lengths [B] int32 or int64: keys from there on are never read (values are clamped to [0, Nk]).
    mask: boolean (True: may attend) or additive floating, broadcastable to [B, H, Nq, Nk]. A masked key that *is* read
    must be finite: its weight is exactly 0, but 0 x NaN is NaN, as in PyTorch. Conditions add up.
    return_lse: also the natural-log sum of exponentials, lse [B, H, Nq] fp32.
    A query with no allowed key gives o = 0 and lse = -inf. tf32: as in `linear`.

    Raises TypeError or ValueError that names the argument, UnsupportedDeviceError for tensors the kernels cannot reach.
    Source: arXiv 1706.03762 equation 1, computed as arXiv 2205.14135 algorithm 1.
    """
    check_flag("return_lse", return_lse)
    precision, scale = check_attention(q, k, v, scale, causal, key_lengths, mask, tf32)
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    kind, mask = expand_mask(mask, (batch, heads, queries, keys))
    tile = None
    plain = mask is None and not causal and key_lengths is None and not return_lse and k.shape[2] == heads
    described = plain and all(map(heads_adjoin, (q, k, v)))
    if q.numel() > 0:
        call = tiles.described(
            "attention", q.dtype, mask=kind, causal=causal, key_lengths=key_lengths, return_lse=return_lse,
            heads_q=heads, heads_k=k.shape[2], q_stride=q.stride(1), tf32=tf32,
        )  # fmt: skip
        tile = attention_tiles.choose_attention(
            batch * heads, queries, keys, width, q.element_size(), device_of(q), masked=kind != "none",
            described=described, call=call,
        )  # fmt: skip
        if tile is tiles.TORCH:
            return with_torch.attention(q, k, v, scale=scale, causal=causal)
    o = allocate(q, (batch, queries, heads, width))
    lse = allocate(q, (batch, heads, queries), torch.float32) if return_lse else None
    if tile is not None and tile.whole:
        size, device = q.element_size(), device_of(q)
        if not attention_tiles.may_be_whole(keys, width, size, device, described=described):
            raise ValueError(f"a tile with all keys in shared memory does not fit this problem: {tile}")
        launch_whole(tile, q, k, v, o, scale)
    elif tile is not None and tile.roles:
        if not attention_tiles.may_have_roles(keys, width, q.element_size(), device_of(q), described=described):
            raise ValueError(f"a tile whose warps have roles does not fit this problem: {tile}")
        launch_roles(tile, q, k, v, o, scale)
    elif tile is not None:
        launch_attention(
            tile, q, k, v, key_lengths, mask, o, lse, scale, sequences=batch, queries=queries, keys=keys,
            mask_kind=kind, causal=causal, packed=False, precision=precision,
        )  # fmt: skip
    return o if lse is None else (o, lse)
