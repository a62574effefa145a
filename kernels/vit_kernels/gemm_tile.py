"""A tile of the GEMM-shaped operations, `linear` and `patch_embed`: what it takes of an SM, which problems it fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .device import Device
from .linear_roles_ring import NARROW
from .primitives import STATS_COLUMNS
from .tiles import cdiv


@dataclass(frozen=True)
class GemmTile:
    """One program computes block_m x block_n results in steps of block_k; group_m row tiles share weights in L2 (0: all
    of them, for small batches: with one division less before the first load).

    chunk: columns that are finished at a time behind the product. tma: operands come through tensor descriptors, and
    so many programs an SM walk the tiles (0: through pointers, one program a tile). roles: the warps have roles
    (`linear_roles`): eight multiply, others finish and load; block_m is 128, and num_stages the slots of their ring for
    weights. parts: so many programs a tile share K (`linear_parts`), and a second launch adds up what they summed.
    columns: its rows are the products' columns (`linear_columns`), one tile a program, tma of them on an SM; block_m is
    64 or 128 and a tail of 8, 16 or 32, block_n 64, 128 or 256, num_warps those that multiply, one for 16 of these.
    staying: the weights of its columns stay in shared memory (`linear_staying`); block_m and block_n are 128, block_k
    64, and num_stages the most slots of x, which share a dozen with the weights.
    blocks: of `patch_embed` alone, pixels come in blocks (`patch_embed_blocks`): block_m is 128, block_n 64, 128 or
    192, block_k 64, num_stages the slots of a ring.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    chunk: int = 256
    tma: int = 0
    roles: bool = False
    parts: int = 1
    columns: bool = False
    staying: bool = False
    blocks: bool = False


# What adds up the parts, so many rows and columns a program: all at once at batch 8 of ViT-B.
SUM_ROWS, SUM_COLUMNS = 16, 64
_REGISTERS = 65536
_LEAST_STEPS = 16  # a shorter K is not shared out: the second launch takes longer
_MOST_PARTS = 8
# Slots of 128 rows or columns and 64 of K that an SM has room for beside sums; at most half of them for weights.
_STAYING_SLOTS = 12
_COLUMN_ROWS = (72, 80, 96, 136, 144, 160)


def gemm_shared_bytes(tile: GemmTile, itemsize: int, operands: int = 1) -> int:
    """Shared memory: num_stages slices of x and of one or two weight tiles, and a chunk on its way out."""
    slices = tile.num_stages * (tile.block_m + operands * tile.block_n) * tile.block_k * itemsize
    if tile.columns:
        # Sums, vectors by row and by column, and barriers.
        vectors = 4 * (2 * tile.block_m + 3 * tile.block_n)
        return slices + tile.block_m * tile.block_n * itemsize + vectors + 512
    if tile.staying:
        # Sums, row vectors, barriers, and what roles share.
        slots = _STAYING_SLOTS * tile.block_m * tile.block_k * itemsize
        return slots + tile.block_m * tile.block_n * itemsize + 4 * tile.block_m * 4 + 1024
    if tile.blocks:
        # Sums, barriers, and what roles share.
        return slices + tile.block_m * tile.block_n * itemsize + 1024
    if tile.roles:
        # One more of x, the sums that are handed over, twice what finishes rows, barriers, and what roles share.
        more = tile.block_m * (tile.block_k + tile.block_n) * itemsize
        return slices + more + 4 * tile.block_m * 4 + 1024
    out = tile.block_m * min(tile.chunk, tile.block_n) * itemsize
    return slices + out if tile.tma else slices


def resident_programs(tile: GemmTile, itemsize: int, device: Device, operands: int = 1) -> int:
    """Programs of this tile that an SM holds at a time, by shared memory and (estimated) registers."""
    if tile.tma:
        return tile.tma
    threads = 32 * tile.num_warps
    registers = min(255, operands * tile.block_m * tile.block_n // threads + 100)
    by_memory = device.shared_memory // (gemm_shared_bytes(tile, itemsize, operands) + 1024)
    return max(1, min(by_memory, _REGISTERS // (threads * registers)))


def loads_early(tile: GemmTile, *, gated: bool) -> bool:
    """Whether the registers hold what the epilogue needs from before the product: 64 sums a thread leave room.

    A small batch waits for data more than for anything else; under the product that wait costs nothing.
    """
    return (2 if gated else 1) * tile.block_m * tile.block_n <= 64 * 32 * tile.num_warps


def may_halve(tile: GemmTile) -> bool:
    """Whether a launch with this tile can share out its last tiles as halves: the kernel then holds code for both."""
    return tile.tma > 0 and tile.block_m >= 128 and not (tile.roles or tile.staying or tile.blocks)


def halved_tiles(tile: GemmTile, m: int, n: int, sm_count: int) -> int:
    """How many of the last tiles are shared out as two halves: all beyond a multiple of the SMs, where these are at
    most half as many. Whole, they would keep so few SMs busy for a whole tile's time; halved, all for half of it."""
    left_over = cdiv(m, tile.block_m) * cdiv(n, tile.block_n) % sm_count
    return left_over if may_halve(tile) and 2 * left_over <= sm_count else 0


def split_tiles(tile: GemmTile, m: int, n: int, sm_count: int) -> int:
    """With roles, how many of the last tiles are shared out in narrow pieces: all beyond a multiple of the SMs, where
    each SM then gets one piece at most. Less than one round is not split: other tiles are better there."""
    if tile.blocks:
        return 0
    rounds, left_over = divmod(cdiv(m, tile.block_m) * cdiv(n, tile.block_n), sm_count)
    return left_over if rounds and left_over * (tile.block_n // NARROW.value) <= sm_count else 0


def may_have_roles(n: int, itemsize: int, device: Device, *, gated: bool, described: bool) -> bool:
    """Whether `linear_roles_kernel` can compute it: sm_90's instructions, 16 bits, and whole narrow tiles."""
    return described and 90 <= device.capability < 100 and itemsize == 2 and not gated and n % NARROW.value == 0


def ring_slots(tile: GemmTile, k: int) -> int:
    """With roles, slots for weights; with less than two the tile does not fit. In 256 columns, whose ring those that
    multiply fill, what is loaded ahead, a step more of x, is never beyond the next tile."""
    return min(tile.num_stages, cdiv(k, tile.block_k) - 1) if tile.block_n == 256 else tile.num_stages


def staying_slots(tile: GemmTile, k: int) -> tuple[int, int]:
    """Where weights stay, slots for them, one for each step of K, and for x; (0, 0) where K has too many steps."""
    steps = cdiv(k, tile.block_k)
    return (steps, min(tile.num_stages, _STAYING_SLOTS - steps)) if 2 * steps <= _STAYING_SLOTS else (0, 0)


def staying_programs(tile: GemmTile, m: int, n: int, sm_count: int) -> tuple[int, int]:
    """Where weights stay, how many programs there are, and how many of the last rows of tiles are left for those that
    are over when each column of tiles has as many as the others. No program has more than its share of all tiles."""
    rows, columns = cdiv(m, tile.block_m), cdiv(n, tile.block_n)
    each, over = divmod(min(rows * columns, sm_count), columns)
    left = max(0, rows - each * cdiv(rows * columns, each * columns + over))
    if not left:
        return each * columns, 0
    return each * columns + cdiv(left * columns, cdiv(left * columns, over)), left


def wide_and_tail(tile: GemmTile) -> tuple[int, int]:
    """Where rows are columns of products: block_m as a power of two and what is left, for blocks have such sizes."""
    wide = 1 << (tile.block_m.bit_length() - 1)
    return wide, tile.block_m - wide


def column_tiles(m: int, n: int, sm_count: int, *, residual: bool) -> list[GemmTile]:
    """For 128 and 256 features the tile of the fewest rows that leaves no SM a second one, if they divide n; none where
    that is less than the least tile has, for there products are too short, and SMs wait in any tile. For 64 features
    the least, of which an SM holds two, where about as many as there are SMs do it: from half to nine eighths.

    With 256 features there are no registers for a residual."""
    found = []
    for features in (128,) if residual else (128, 256):
        programs = sm_count // (n // features) if n % features == 0 else 0
        rows = cdiv(m, programs) if programs else 0
        fitting = [size for size in _COLUMN_ROWS if size >= rows >= 64]
        if fitting:
            slots = 3 if features == 256 else 8 if fitting[0] < 96 else 5
            found.append(GemmTile(fitting[0], features, 64, features // 16, slots, tma=1, columns=True))
    least = _COLUMN_ROWS[0]
    if n % 64 == 0 and 4 * sm_count <= 8 * cdiv(m, least) * (n // 64) <= 9 * sm_count:
        found.append(GemmTile(least, 64, 64, 4, 5, tma=2, columns=True))
    return found


def shared_out(tile: GemmTile, m: int, n: int, k: int, sm_count: int) -> GemmTile | None:
    """The tile with so many parts of K that one round of programs does all; None where that leaves K whole, where K is
    short, or no number of whole steps."""
    steps, rest = divmod(k, tile.block_k)
    room = min(sm_count // (cdiv(m, tile.block_m) * cdiv(n, tile.block_n)), steps, _MOST_PARTS)
    if rest or steps < _LEAST_STEPS or room < 2:
        return None
    # No more parts than it takes for the longest to be as short.
    return replace(tile, parts=cdiv(steps, cdiv(steps, room)))


def may_share(
    tile: GemmTile, m: int, n: int, k: int, itemsize: int, device: Device, *, gated: bool, described: bool
) -> bool:  # fmt: skip
    """Whether the kernels of `linear_parts` can compute it with this tile: 16 bits, no gate, whole steps of K, at least
    one in each part, and what descriptors ask."""
    if itemsize != 2 or gated or k % tile.block_k or k // tile.block_k < tile.parts:
        return False
    return not (tile.roles or tile.staying) and (not tile.tma or (described and 90 <= device.capability < 100))


def check_statistics(tile: GemmTile) -> None:
    """Raises ValueError for a tile that would write partial row statistics of less columns than one has."""
    if tile.parts == 1 and tile.block_n % STATS_COLUMNS.value:
        raise ValueError(
            f"row statistics need tiles of a multiple of {STATS_COLUMNS.value} columns, got {tile.block_n}: {tile}"
        )
