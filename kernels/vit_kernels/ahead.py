"""Weights on their way into the L2 cache before a kernel may begin its work."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .primitives import INLINE_ASSEMBLY, tiles_over

# Bytes that one program asks for at most: those of a GPU together should not take the whole cache.
_MOST = tl.constexpr(128 * 1024)
# What L2 fetches at a time.
_SECTOR = tl.constexpr(32)


def fetchable(weight: torch.Tensor) -> torch.Tensor | None:
    """The weights, if `fetch_ahead` can ask for them: one piece of memory that begins and ends at multiples of 16
    bytes. None otherwise."""
    whole = weight.is_contiguous() and weight.data_ptr() % 16 == 0 and weight.nbytes % 16 == 0
    return weight if whole else None


@triton.jit
def fetch_ahead(ptr, rows, columns, OVERLAP: tl.constexpr):
    """Before `follow`: asks for this program's share of a contiguous [rows, columns] to be brought into the L2 cache.

    A small product waits for memory more than for anything else: the few tiles that it has under way ask for too few
    bytes at a time. Weights do not depend on the launch before, so that all of them can be on their way while it ends.
    Nobody waits for them here, and no result depends on it: L2 is where every SM reads and writes.
    """
    if OVERLAP and INLINE_ASSEMBLY:
        size = tl.cast(rows, tl.int64) * columns * (ptr.dtype.element_ty.primitive_bitwidth // 8)
        lines = tiles_over(size, 128).to(tl.int32)
        share = ((lines - 1) // tl.num_programs(0) + 1).to(tl.int64) * 128
        begin = tl.program_id(0) * share
        share = tl.minimum(tl.minimum(share, size - begin), _MOST).to(tl.int32)
        at = ptr.to(tl.int64) + begin
        for start in range(0, share, 128 * _SECTOR):
            # 128 threads, for every kernel has as many. In Gluon's kernels, those of other warps are not here.
            tl.inline_asm_elementwise(
                "{ .reg .pred p; .reg .b64 a; mov.u32 $0, %tid.x; mad.wide.u32 a, $0, 32, $1; "
                "setp.lt.u32 p, $0, 128; shl.b32 $0, $0, 5; setp.lt.and.s32 p, $0, $2, p; "
                "@p prefetch.global.L2 [a]; }",
                "=&r,l,r",
                [at + start, share - start],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
