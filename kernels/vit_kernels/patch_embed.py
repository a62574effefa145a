"""Patch embedding: image -> tokens in one launch (arXiv 2010.11929, equation 1).

    tokens[b] = [prefix ; patches(image_b) W^T + bias] + position

An implicit im2col matrix product: the patch matrix [B * L, C * Ph * Pw] is never written, its elements are gathered
from the image while they are multiplied. Row r of the result is token r % T of image r // T.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import gemm_tiles, tiles
from .ahead import fetch_ahead, fetchable
from .checks import (
    check_flag,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_tf32,
    check_vector,
    short,
)
from .device import device_of
from .launch import allocate, describable, describe_in_gluon, launch
from .linear import stats_partials
from .linear_roles_ring import NARROW, ROWS
from .patch_embed_blocks import patch_embed_blocks_kernel
from .primitives import accumulate, follow, grouped_tile, store_partial_moments


@triton.jit(do_not_specialize=["M", "T", "grid_w"])
def patch_embed_kernel(
    image_ptr,  # [B, C, H, W]
    w_ptr,  # [D, C * PH * PW], any row stride
    ahead_ptr,  # the same memory, if it can be asked for ahead
    bias_ptr,  # [D]
    prefix_ptr,  # [PREFIX, D]
    position_ptr,  # [T, D], or [T - PREFIX, D] for patches only
    mean_ptr,  # [C], contiguous
    std_ptr,  # [C], contiguous
    tokens_ptr,  # [B, T, D]
    stats_ptr,  # [2, ceil(D / 64), B * T]
    M,
    T,
    N,
    K,
    grid_w,
    stride_ib,
    stride_ic,
    stride_ih,
    stride_iw,
    stride_wn,
    stride_bias,
    stride_prefix,
    stride_position,
    PH: tl.constexpr,
    PW: tl.constexpr,
    PREFIX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    POSITION_HAS_PREFIX: tl.constexpr,
    FROM_BYTES: tl.constexpr,
    NORMALISE: tl.constexpr,
    EMIT_STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """This program computes the BLOCK_M tokens x BLOCK_N features tile that `grouped_tile` gives it."""
    if ahead_ptr is not None:
        fetch_ahead(ahead_ptr, N, K, OVERLAP)
    follow(OVERLAP)
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first = tile_m.to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    keep_rows = rows < M
    keep_columns = columns < N
    if w_ptr.dtype.element_ty == tl.float32:
        # Short divisions would make a few tiles spill.
        image = rows // T
        token = (rows % T).to(tl.int32)
    else:
        # One division of 64 bits for the tile, and short ones for its rows: with long ones, fewer programs share an SM.
        row = (first % T).to(tl.int32) + tl.arange(0, BLOCK_M)
        image = first // T + row // T
        token = row % T
    is_patch = token >= PREFIX
    patch = tl.maximum(token - PREFIX, 0)
    corner = (
        image_ptr
        + image * stride_ib
        + (patch // grid_w).to(tl.int64) * PH * stride_ih
        + (patch % grid_w).to(tl.int64) * PW * stride_iw
    )
    w_row = w_ptr + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * stride_wn
    read = (keep_rows & is_patch)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        channel = k // (PH * PW)
        offset = (
            channel.to(tl.int64) * stride_ic
            + (k // PW % PH).to(tl.int64) * stride_ih
            + (k % PW).to(tl.int64) * stride_iw
        )
        pixel = tl.load(corner[:, None] + offset[None, :], mask=read & (k < K)[None, :], other=0)
        if FROM_BYTES:
            pixel = pixel.to(tl.float32) / 255.0
        if NORMALISE:
            mean = tl.load(mean_ptr + channel, mask=k < K, other=0.0)
            std = tl.load(std_ptr + channel, mask=k < K, other=1.0)
            pixel = (pixel.to(tl.float32) - mean[None, :]) / std[None, :]
        w = tl.load(w_row + k[:, None], mask=(k < K)[:, None], other=0.0)
        acc = accumulate(pixel.to(w.dtype), w, acc, PRECISION)

    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns.to(tl.int64) * stride_bias, mask=keep_columns, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if PREFIX > 0:
        at = prefix_ptr + token.to(tl.int64)[:, None] * stride_prefix + columns[None, :]
        fixed = tl.load(at, mask=(keep_rows & (token < PREFIX))[:, None] & keep_columns[None, :], other=0.0)
        acc = tl.where(is_patch[:, None], acc, fixed.to(tl.float32))
    keep = keep_rows[:, None] & keep_columns[None, :]
    if HAS_POSITION:
        place = token if POSITION_HAS_PREFIX else token - PREFIX
        at = position_ptr + place.to(tl.int64)[:, None] * stride_position + columns[None, :]
        acc += tl.load(at, mask=keep & (place >= 0)[:, None], other=0.0).to(tl.float32)
    tokens = acc.to(tokens_ptr.dtype.element_ty)
    tl.store(tokens_ptr + rows[:, None] * N + columns[None, :], tokens, mask=keep)
    if EMIT_STATS:
        store_partial_moments(
            stats_ptr, tokens.to(tl.float32), rows, keep_rows, tile_n * BLOCK_N, M, N, BLOCK_M, BLOCK_N
        )


def _check_images(images: torch.Tensor, weight: torch.Tensor) -> None:
    check_floating("weight", weight, 4)
    check_tensor("images", images)
    if images.ndim != 4:
        raise ValueError(f"images must be a tensor [B, C, H, W]; got shape {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        check_floating("images", images, 4)
        check_same_dtype("images", images, "weight (or be uint8)", weight.dtype)
    features, channels, ph, pw = weight.shape
    if min(features, channels, ph, pw) == 0:
        raise ValueError(f"weight must have no empty dimension; got shape {tuple(weight.shape)}")
    if images.shape[1] != channels:
        raise ValueError(f"images must have C = {channels} channels like weight; got shape {tuple(images.shape)}")
    height, width = images.shape[2:]
    if height == 0 or width == 0:
        raise ValueError(f"images must have at least one patch of {ph}x{pw} pixels; got {height}x{width}")
    if height % ph or width % pw:
        raise ValueError(
            f"images must have a size that the patch size {ph}x{pw} divides; got {height}x{width}. "
            f"Resize or pad them to {tiles.cdiv(height, ph) * ph}x{tiles.cdiv(width, pw) * pw}"
        )


# Pixels of a step, of one patch.
_STEP = 64


@functools.lru_cache
def pairs_of_block(batch: int, grid_h: int, grid_w: int) -> tuple[int, int, int]:
    """Images, rows and pairs in a row of a block of 64 pairs of patches, of those that cover the batch's with the least
    left over the one with the longest rows."""
    size = ROWS.value
    powers = [1 << bit for bit in range(size.bit_length())]
    shapes = [(size // (high * wide), high, wide) for wide in powers for high in powers if high * wide <= size]
    return min(shapes, key=lambda s: (_blocks(batch, grid_h, grid_w, s), -s[2], -s[1]))


def _blocks(batch: int, grid_h: int, grid_w: int, shape: tuple[int, int, int]) -> int:
    images, high, wide = shape
    return tiles.cdiv(batch, images) * tiles.cdiv(grid_h, high) * tiles.cdiv(grid_w // 2, wide)


def _may_come_in_blocks(
    images: torch.Tensor, matrix: torch.Tensor, ph: int, pw: int, tables: tuple[torch.Tensor | None, ...],
    tokens: torch.Tensor,
) -> bool:  # fmt: skip
    """Whether `patch_embed_blocks` can read these images: pairs of patches, whole steps in each channel, rows of all
    channels one behind the other. And the tables: contiguous, and 32 bits count the tokens of a block's images."""
    height, width = images.shape[2:]
    return (
        all(table is None or table.is_contiguous() for table in tables)
        and ROWS.value * tokens[0].numel() < 2**31
        and images.dtype == matrix.dtype
        and pw in (16, 32)
        and width // pw % 2 == 0
        and ph % (_STEP // pw) == 0
        and describable(images)
        and (images.shape[1] == 1 or images.stride(1) == height * images.stride(2))
        and describable(matrix)
    )


def _launch_blocks(
    tile: gemm_tiles.GemmTile, images: torch.Tensor, matrix: torch.Tensor, pointers: tuple[torch.Tensor | None, ...],
    patch: tuple[int, int], m: int, prefix: int, placed: int,
) -> None:  # fmt: skip
    batch, channels, height, width = images.shape
    ph, pw = patch
    n, k = matrix.shape
    grid = height // ph, width // pw
    shape = pairs_of_block(batch, *grid)
    row = images.stride(2)
    pairs = images.as_strided(
        (ph, batch, channels * grid[0], grid[1] // 2, 2 * pw), (row, images.stride(0), ph * row, 2 * pw, 1)
    )
    narrow = NARROW.value
    wide = min(tile.block_n, 2 * narrow)
    programs = min(_blocks(batch, *grid, shape) * (n // tile.block_n), device_of(images).sm_count)
    launch(
        images, patch_embed_blocks_kernel, programs, describe_in_gluon(pairs, _STEP // pw, *shape, 2 * pw),
        describe_in_gluon(matrix, wide, _STEP), describe_in_gluon(matrix, narrow, _STEP), fetchable(matrix), *pointers,
        batch, *grid, m, n, k, PH=ph, PREFIX=prefix, PLACED=placed, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip


def patch_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    *,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
    emit_stats: bool = False,
    tf32: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Images to tokens: patches projected, class and register tokens put in front, positions added, in one launch.

    images [B, C, H, W] in the dtype of weight, or uint8 (divided by 255), any strides; weight [D, C, Ph, Pw] fp32, fp16
    or bf16; bias [D]; prefix [R, D] (class and register tokens); position [L, D] for the L = (H/Ph)(W/Pw) patches alone
    or [R + L, D] for all tokens. mean, std [C] fp32: each channel becomes (value - mean) / std before the product,
    rounded to the dtype of weight as eager PyTorch would. Returns tokens [B, R + L, D] in the dtype of weight, or
    (tokens, stats) with emit_stats: the row statistics [2, ceil(D / 64), B (R + L)] that the first norm needs.
    tf32: as in `linear`.

    Raises ValueError for an image size that the patch size does not divide; TypeError or ValueError that names the
    argument; UnsupportedDeviceError for tensors the kernels cannot reach. Source: arXiv 2010.11929, equation 1.
    """
    _check_images(images, weight)
    check_flag("emit_stats", emit_stats)
    precision = check_tf32(tf32, weight.dtype)
    dtype = weight.dtype
    features, channels, ph, pw = weight.shape
    batch, _, height, width = images.shape
    grid_h, grid_w = height // ph, width // pw
    check_vector("bias", bias, features, "D, the rows of weight")
    count = 0
    if prefix is not None:
        check_floating("prefix", prefix, 2)
        count = prefix.shape[0]
        check_shape("prefix", prefix, (count, features), "tokens x D")
    patches = grid_h * grid_w
    tokens_per_image = count + patches
    if position is not None:
        check_floating("position", position, 2)
        if tuple(position.shape) not in ((patches, features), (tokens_per_image, features)):
            raise ValueError(
                f"position must have shape ({patches}, {features}) for the patches of a {height}x{width} image or "
                f"({tokens_per_image}, {features}) with the {count} prefix tokens; got {tuple(position.shape)}"
            )
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be given together; got only " + ("std" if mean is None else "mean"))
    for name, value in (("mean", mean), ("std", std)):
        check_vector(name, value, channels, "C, the channels of images")
        if value is not None and value.dtype != torch.float32:
            raise TypeError(f"{name} must have dtype float32; got {short(value.dtype)}")
        if value is not None and not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() on it")
    check_same_device(
        "images",
        images,
        {"weight": weight, "bias": bias, "prefix": prefix, "position": position, "mean": mean, "std": std},
    )
    k = channels * ph * pw
    matrix = _unit_columns(weight.reshape(features, k))
    prefix = None if prefix is None or count == 0 else _unit_columns(prefix)
    position = None if position is None else _unit_columns(position)

    m = batch * tokens_per_image
    tokens = allocate(images, (batch, tokens_per_image, features), dtype)
    stats = None
    if emit_stats:
        stats = allocate(images, (2, stats_partials(features), m), torch.float32)
    if m > 0:
        call = tiles.described(
            "patch_embed", dtype, bytes=images.dtype == torch.uint8, height=height, width=width, patch_h=ph, patch_w=pw,
            prefix=count, bias=bias, position=0 if position is None else position.shape[0], mean=mean,
            emit_stats=emit_stats, pixel_stride=images.stride(3),
        )  # fmt: skip
        described = mean is None and _may_come_in_blocks(images, matrix, ph, pw, (bias, prefix, position), tokens)
        tile = gemm_tiles.choose_patch_embed(
            m, features, k, weight.element_size(), device_of(images), tf32=tf32, described=described, call=call
        )
        if emit_stats:
            gemm_tiles.check_statistics(tile)
        all_placed = position is not None and position.shape[0] == tokens_per_image
        if tile.blocks:
            fits = gemm_tiles.may_have_roles(
                features, weight.element_size(), device_of(images), gated=False, described=described
            )
            if not fits or features % tile.block_n:
                shape = f"{m} x {features} x {k}"
                raise ValueError(f"a tile of blocks of pixels does not fit this problem: {tile}, {shape}")
            pointers = bias, prefix, position, tokens, stats
            _launch_blocks(tile, images, matrix, pointers, (ph, pw), m, count, count if all_placed else 0)
        else:
            launch(
                images, patch_embed_kernel, triton.cdiv(m, tile.block_m) * triton.cdiv(features, tile.block_n),
                images, matrix, fetchable(matrix), bias, prefix, position, mean, std, tokens, stats,
                m, tokens_per_image, features, k, grid_w, *images.stride(), matrix.stride(0),
                0 if bias is None else bias.stride(0), 0 if prefix is None else prefix.stride(0),
                0 if position is None else position.stride(0),
                PH=ph, PW=pw, FROM_BYTES=images.dtype == torch.uint8, NORMALISE=mean is not None, PRECISION=precision,
                PREFIX=count, HAS_BIAS=bias is not None, HAS_POSITION=position is not None,
                POSITION_HAS_PREFIX=all_placed, EMIT_STATS=emit_stats,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
    return tokens if stats is None else (tokens, stats)


def _unit_columns(table: torch.Tensor) -> torch.Tensor:
    """The table with contiguous features, which the kernel relies on (a copy only where they are not)."""
    return table if table.stride(1) == 1 else table.contiguous()
