"""Tile choice of the GEMM-shaped operations, `linear` and `patch_embed`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .device import INTERPRETED, Device
from .linear_roles_ring import NARROW, ROWS
from .tiles import (
    FP32_RATE,
    TENSOR_MEMORY,
    TENSOR_RATE,
    cdiv,
    interpreted_block,
    nearest,
    next_power_of_2,
    tuned_first,
)


@dataclass(frozen=True)
class GemmTile:
    """One program computes block_m x block_n results in steps of block_k; group_m row tiles share weights in L2 (0: all
    of them, for small batches: with one division less before the first load).

    chunk: columns that are finished at a time behind the product. tma: operands come through tensor descriptors, and
    so many programs an SM walk the tiles (0: through pointers, one program a tile). roles: the warps have roles
    (`linear_roles`): four of them multiply 64 rows of a tile, as many the next ones, and others load; num_stages
    is the slots of their ring. parts: so many programs a tile share K (`linear_parts`), and a second launch
    adds up what they summed.
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


_SMALL_TILES = (GemmTile(64, 64, 64, 4, 4), GemmTile(32, 64, 64, 4, 4), GemmTile(16, 64, 64, 4, 4))
_HALF_TILES = (GemmTile(128, 128, 32, 4, 4, chunk=64), GemmTile(64, 128, 64, 4, 3, chunk=64), *_SMALL_TILES)
# With roles, a wide tile reads less and a narrow one leaves fewer SMs without work; its ring is longer, for an SM gets
# no more from memory than it has asked for. Without, two programs an SM, so that one multiplies while the other
# finishes its tile. The small ones are for small batches, which wait for data more than for anything else.
_TMA_TILES = (
    GemmTile(192, 192, 64, 4, 4, tma=1, roles=True),
    GemmTile(128, 256, 64, 4, 4, tma=1, roles=True),
    GemmTile(128, 128, 64, 4, 6, tma=1, roles=True),
    GemmTile(128, 128, 64, 4, 3, chunk=64, tma=2),
    GemmTile(64, 128, 128, 4, 4, group_m=0, chunk=64, tma=1),
    GemmTile(64, 64, 128, 4, 6, group_m=0, chunk=64, tma=1),
    GemmTile(64, 64, 128, 4, 3, group_m=0, chunk=64, tma=2),
    *_HALF_TILES,
)
# Gated activations sum two products: half the tile, or twice the threads, for the same registers.
_GATED_TILES = (GemmTile(64, 128, 64, 8, 3), *_SMALL_TILES)
_GATED_TMA_TILES = (GemmTile(128, 64, 64, 4, 3, chunk=64, tma=2), *_GATED_TILES)
# For fewer tiles than SMs, with as many parts of K as that leaves room for (`shared_out`). Operands of 16 bits.
_SHARED_TILES = (GemmTile(64, 128, 64, 4, 3), GemmTile(64, 64, 64, 4, 4))
_SHARED_TMA_TILES = (GemmTile(64, 128, 64, 4, 6, tma=1),)
SHARED_TILES = (*_SHARED_TILES, *_SHARED_TMA_TILES)
# What adds up the parts, so many rows and columns a program: all at once at batch 8 of ViT-B.
SUM_ROWS, SUM_COLUMNS = 16, 64
_FLOAT_TILES = (
    GemmTile(64, 64, 32, 8, 3),
    GemmTile(32, 64, 32, 8, 3),
    GemmTile(16, 64, 32, 4, 3),
)
# Never chosen by the model: it sees them a few per cent behind or ahead, which is less than it can tell. `vit-engine
# tune` measures them beside the others.
TO_MEASURE = (
    GemmTile(128, 256, 64, 8, 3, chunk=64, tma=1),
    GemmTile(256, 128, 64, 8, 3, chunk=64, tma=1),
    GemmTile(128, 256, 64, 8, 3, chunk=64),
    GemmTile(256, 128, 32, 8, 3, chunk=64),
)

# What the model below adds to the work of the units, in cycles of an SM. Set by hand against a cycle-by-cycle
# simulation of the compiled kernels (665 launches of ViT GEMMs, 50 to 12,608 rows, without halved tiles): without
# _LAUNCH, on sm_90, 80 and 89, 6, 10 and 7 % off on average, and its choice 1, 1 and 2 % slower than the best. With it,
# of 52 launches on an H100 in tiles that sm_90 may get, 6 to 9 % off, by kind of tile.
_STEP = 50  # a step of the K loop: barriers, and what a wait for data takes beyond it
_FILL = 500  # before the first step: the launch of a program and the first loads
_EPILOGUE = 4000  # behind the last: waits for row statistics and vectors, conversion of layouts
_EARLY_EPILOGUE = 2000  # the same where all of that was loaded before the product
_RESIDUAL = 3000  # more behind the last where a residual is loaded there: seen on an H100, 8 launches
_LAUNCH = 5000  # once, until code, descriptors and the first data are there: seen on an H100
_SLOTS = 16  # issue slots an element behind the product
_SHORT = 1.12  # before sm_90, the products of a tile of 32 rows: a warp has few at a time
# What a slot of a ring takes from being asked for to being full, where warps have no roles, beside its bytes' way from
# L2: 24 launches of ViT-B at batch 1 on an H100, with rings of 3 to 6 slots of 16 to 48 KB. So a step takes that time
# by the number of slots.
_ROUND_TRIP = 1700
# The same where warps have roles, fitted to 35 launches of ViT-S, B and L at batches 8 and 64 on an H100 (Triton 3.6,
# cold L2, 1.75 GHz assumed; 7 % off on average, small products of ViT-S up to 30 %): what a step waits, and how much of
# what follows the last one nobody multiplies under, in a tile of 128 x 256. Narrower ones take their share of the
# residual, and the square of it of the rest, because their ring goes on; a third warpgroup takes its turn on the same
# units, and has its own copy of the code to fetch.
_ROLES_STEP = 25
_ROLES_EPILOGUE = 6000
_ROLES_RESIDUAL = 2000
_ROLES_THIRD = 3000
# What a program takes for a part of K beside its steps, simulated on sm_90 and 80 for 64x64 to 128x256.
_PART = 1500
_STORED_BYTES_PER_CLOCK = 32
_LEAST_STEPS = 16  # a shorter K is not shared out: the second launch takes longer
_MOST_PARTS = 8
# What a second launch must promise: the model cannot tell less.
_WORTH_A_LAUNCH = 1.25
_SHARED_BYTES_PER_CLOCK = 128
# From L2 to one SM with all of them busy: a fit to measured kernels on sm_90, a guess elsewhere.
_L2_BYTES_PER_CLOCK = {80: 40, 86: 24, 90: 48, 120: 24}
_ROLES_L2_BYTES_PER_CLOCK = 44  # fitted with the figures of roles above: these ask for more of it than others
_REGISTERS = 65536


def gemm_shared_bytes(tile: GemmTile, itemsize: int, operands: int = 1) -> int:
    """Shared memory: num_stages slices of x and of one or two weight tiles, and a chunk on its way out."""
    slices = tile.num_stages * (tile.block_m + operands * tile.block_n) * tile.block_k * itemsize
    if tile.roles:
        # Twice the vectors that finish a tile, as long as powers of two, and the barriers. Results leave from the ring,
        # but those of a third warpgroup.
        third = 64 * tile.block_n * itemsize if tile.block_m > 128 else 0
        return slices + third + 2 * (2 * tile.block_m + 3 * next_power_of_2(tile.block_n)) * 4 + 128
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
    return tile.tma > 0 and tile.block_m >= 128 and not tile.roles


def halved_tiles(tile: GemmTile, m: int, n: int, sm_count: int) -> int:
    """How many of the last tiles are shared out as two halves: all beyond a multiple of the SMs, where these are at
    most half as many. Whole, they would keep so few SMs busy for a whole tile's time; halved, all for half of it."""
    left_over = cdiv(m, tile.block_m) * cdiv(n, tile.block_n) % sm_count
    return left_over if may_halve(tile) and 2 * left_over <= sm_count else 0


def roles_blocks(tile: GemmTile) -> tuple[int, int, int]:
    """Of a tile whose warps have roles: rows that are multiplied together, columns at once (all, or 128 of 192, before
    the others), and columns of a block of results. Of 256 columns, two warpgroups go together; their blocks are half as
    wide and twice as high."""
    if tile.block_n > 192:
        return 2 * ROWS.value, tile.block_n, tile.block_n // 2
    width = 1 << tile.block_n.bit_length() - 1
    return ROWS.value, width, width


def split_tiles(tile: GemmTile, m: int, n: int, sm_count: int) -> int:
    """With roles, how many of the last tiles are shared out in narrow pieces: all beyond a multiple of the SMs, where
    each SM then gets one piece at most. Less than one round is not split: other tiles are better there."""
    rounds, left_over = divmod(cdiv(m, tile.block_m) * cdiv(n, tile.block_n), sm_count)
    return left_over if rounds and left_over * (tile.block_n // NARROW.value) <= sm_count else 0


def may_have_roles(n: int, itemsize: int, device: Device, *, gated: bool, described: bool) -> bool:
    """Whether `linear_roles_kernel` can compute it: sm_90's instructions, 16 bits, and whole narrow tiles."""
    return described and 90 <= device.capability < 100 and itemsize == 2 and not gated and n % NARROW.value == 0


def shared_out(tile: GemmTile, m: int, n: int, k: int, sm_count: int) -> GemmTile | None:
    """The tile with so many parts of K that one round of programs does all; None where that leaves K whole, where K is
    short, or no number of whole steps."""
    steps, rest = divmod(k, tile.block_k)
    room = min(sm_count // (cdiv(m, tile.block_m) * cdiv(n, tile.block_n)), steps, _MOST_PARTS)
    if rest or steps < _LEAST_STEPS or room < 2:
        return None
    # No more parts than it takes for the longest to be as short.
    return replace(tile, parts=cdiv(steps, cdiv(steps, room)))


def parts_cycles(tile: GemmTile, m: int, n: int, k: int, device: Device) -> float:
    """Modelled SM cycles of the launch that sums the parts of K, operands of 16 bits."""
    programs = cdiv(m, tile.block_m) * cdiv(n, tile.block_n) * tile.parts
    step = step_cycles(tile, 2, device, busy_sms=min(programs, device.sm_count))
    step = max(step + _STEP, _turn_cycles(tile, 2, device))
    part = cdiv(cdiv(k, tile.block_k), tile.parts) * step + _PART
    part += 4 * tile.block_m * tile.block_n / _STORED_BYTES_PER_CLOCK
    return _LAUNCH + cdiv(programs, device.sm_count) * part


def sum_cycles(parts: int, m: int, n: int, device: Device) -> float:
    """Modelled SM cycles of the launch that adds the parts up: the way of sums, residual and results through L2."""
    return _LAUNCH + (4 * parts + 4) * m * n / device.sm_count / nearest(_L2_BYTES_PER_CLOCK, device.capability)


def may_share(
    tile: GemmTile, m: int, n: int, k: int, itemsize: int, device: Device, *, gated: bool, described: bool
) -> bool:  # fmt: skip
    """Whether the kernels of `linear_parts` can compute it with this tile: 16 bits, no gate, whole steps of K, at least
    one in each part, and what descriptors ask."""
    if itemsize != 2 or gated or k % tile.block_k or k // tile.block_k < tile.parts:
        return False
    return not tile.roles and (not tile.tma or (described and 90 <= device.capability < 100))


def _roles_cycles(
    tile: GemmTile, m: int, n: int, k: int, itemsize: int, device: Device, *, residual: bool
) -> float:  # fmt: skip
    """`gemm_cycles` where warps have roles: the busiest SM does its whole tiles and then its narrow ones."""
    steps, tiles = cdiv(k, tile.block_k), cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    split = split_tiles(tile, m, n, device.sm_count)
    busy_sms = min(tiles + 3 * split, device.sm_count)
    cycles = float(_LAUNCH)
    for columns, number in ((tile.block_n, tiles - split), (NARROW.value, split * tile.block_n // NARROW.value)):
        step = step_cycles(replace(tile, block_n=columns), itemsize, device, busy_sms=busy_sms) + _ROLES_STEP
        share = columns / 256
        finish = (_ROLES_EPILOGUE * share**2 + _ROLES_RESIDUAL * residual * share) * tile.block_m / 128
        finish += _ROLES_THIRD * (tile.block_m == 192)
        cycles += cdiv(number, device.sm_count) * (steps * step + finish)
    return cycles


def step_cycles(
    tile: GemmTile, itemsize: int, device: Device, *, operands: int = 1, tf32: bool = False,
    busy_sms: float | None = None,
) -> float:  # fmt: skip
    """Cycles that a step of the K loop keeps the busiest unit of an SM: matrix unit, shared memory or the way from L2.

    busy_sms: how many SMs share L2, all by default; however few, shared memory takes in 64 bytes a clock at most.
    Shared memory takes each operand in once and gives it out again: to warpgroup products (sm_90, 64 rows and more) x
    once and the weights per 64 rows, to the older ones x and weights once per column and row of warps.
    """
    warpgroups = 90 <= device.capability < 100 and tile.block_m >= 64
    rate: float = nearest(TENSOR_RATE if itemsize == 2 or tf32 else FP32_RATE, device.capability)
    if tf32 and itemsize == 4:
        rate /= 2  # tf32 runs at half the rate of 16-bit operands
    if tile.block_m < 64 and device.capability >= 90:
        rate /= 2  # short tiles use the older instructions
    elif tile.block_m == 32 and itemsize == 2:
        rate /= _SHORT
    columns = operands * tile.block_n
    taken_in = (tile.block_m + columns) * tile.block_k * itemsize
    if warpgroups:
        # 192 columns are multiplied in two goes, each of which takes x.
        goes = 2 if columns == 192 else 1
        given_out = (goes * tile.block_m + tile.block_m // 64 * columns) * tile.block_k * itemsize
    else:
        warps_m = 1 if tile.block_m <= 16 else max(2, tile.num_warps // 2)
        warps_n = tile.num_warps // warps_m
        given_out = (tile.block_m * warps_n + columns * warps_m) * tile.block_k * itemsize
    from_l2: float = _ROLES_L2_BYTES_PER_CLOCK if tile.roles else nearest(_L2_BYTES_PER_CLOCK, device.capability)
    from_l2 *= device.sm_count / (busy_sms or device.sm_count)
    return max(
        2 * tile.block_m * columns * tile.block_k / rate,
        (taken_in + given_out) / _SHARED_BYTES_PER_CLOCK,
        taken_in / from_l2,
    )


def _turn_cycles(tile: GemmTile, itemsize: int, device: Device, operands: int = 1) -> float:
    """A step's share of the time that a slot takes to fill, its weights and x cold: known for sm_90 only."""
    if not 90 <= device.capability < 100:
        return 0.0
    slot = (tile.block_m + operands * tile.block_n) * tile.block_k * itemsize
    return (_ROUND_TRIP + slot / _L2_BYTES_PER_CLOCK[90]) / tile.num_stages


def gemm_cycles(
    tile: GemmTile, m: int, n: int, k: int, itemsize: int, device: Device, *, operands: int = 1, tf32: bool = False,
    residual: bool = False,
) -> float:  # fmt: skip
    """Modelled SM cycles of a GEMM [m, k] x [k, n * operands]: waves of tiles times the cycles of a tile.

    The busiest SM computes ceil(tiles / SMs) tiles, as many at a time as it holds, and last a half (`halved_tiles`).
    Those at a time share its units: a step takes the longer of all their work and of one program's work and wait; the
    same goes for what follows the last step.
    """
    if tile.parts > 1:
        return parts_cycles(tile, m, n, k, device) + sum_cycles(tile.parts, m, n, device)
    if tile.roles:
        return _roles_cycles(tile, m, n, k, itemsize, device, residual=residual)
    steps, tiles = cdiv(k, tile.block_k), cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    halved = halved_tiles(tile, m, n, device.sm_count)
    resident = resident_programs(tile, itemsize, device, operands)
    # Where a few SMs have a tile more than the others, they may have more of L2, too.
    busy_sms = min((tiles + halved) / max(1, min(cdiv(tiles - halved, device.sm_count), resident)), device.sm_count)
    early = tile.tma > 0 and loads_early(tile, gated=operands > 1)
    waits = _EARLY_EPILOGUE if early else _EPILOGUE + _RESIDUAL * residual

    def together(*shapes: GemmTile) -> float:
        busy = [step_cycles(t, itemsize, device, operands=operands, tf32=tf32, busy_sms=busy_sms) for t in shapes]
        finish = [t.block_m * t.block_n * _SLOTS / 128 for t in shapes]
        step = max(sum(busy), max(busy) + _STEP, _turn_cycles(tile, itemsize, device, operands))
        return steps * step + max(sum(finish), max(finish) + waits) + _FILL

    rounds, rest = divmod(cdiv(tiles - halved, device.sm_count), resident)
    last = [tile] * rest + [replace(tile, block_m=tile.block_m // 2)] * (halved > 0)
    return _LAUNCH + rounds * together(*[tile] * resident) + (together(*last) if last else 0.0)


def _interpreted_gemm(m: int, n: int, k: int) -> GemmTile:
    return GemmTile(interpreted_block(m), max(64, interpreted_block(n)), interpreted_block(k), 4, 1)


@tuned_first(GemmTile)
def choose_gemm(
    m: int,
    n: int,
    k: int,
    itemsize: int,
    device: Device,
    *,
    gated: bool = False,
    tf32: bool = False,
    described: bool = False,
    residual: bool = False,
) -> GemmTile:
    """The candidate with the least modelled time for x [m, k] times weights [n, k] (twice [n, k] when gated).

    described: x, the weights and a residual can be loaded through tensor descriptors.
    """
    if device == INTERPRETED:
        return _interpreted_gemm(m, n, k)
    operands = 2 if gated else 1
    if itemsize == 4:
        table = _FLOAT_TILES
    elif described and 90 <= device.capability < 100:
        table = _GATED_TMA_TILES if gated else _TMA_TILES
    else:
        table = _GATED_TILES if gated else _HALF_TILES
    if n % 16 and itemsize == 2:
        # Rows of y begin anywhere: results are stored one by one, and their addresses fill the registers of large
        # tiles.
        table = _SMALL_TILES
    elif itemsize == 2 and not gated:
        few = _SHARED_TMA_TILES if table is _TMA_TILES else _SHARED_TILES
        shared = [shared_out(tile, m, n, k, device.sm_count) for tile in few]
        table = (*table, *(tile for tile in shared if tile is not None))
    if not may_have_roles(n, itemsize, device, gated=gated, described=described):
        table = tuple(t for t in table if not t.roles)
    # What tiles with roles take is known to the byte.
    room = [device.shared_memory - (0 if t.roles else 2048) for t in table]
    candidates = [t for t, most in zip(table, room, strict=True) if gemm_shared_bytes(t, itemsize, operands) <= most]

    def cost(t: GemmTile) -> float:
        cycles = gemm_cycles(t, m, n, k, itemsize, device, operands=operands, tf32=tf32, residual=residual)
        return cycles * (_WORTH_A_LAUNCH if t.parts > 1 else 1.0)

    return min(candidates, key=cost)


# Within 10 % of the fastest of twelve, simulated for ViT-B at batches 1, 8 and 64 on sm_80, 89 and 90; the fastest of
# four at batches 1, 8 and 64 on an H100.
_PATCH_TILES_HALF = (GemmTile(64, 128, 64, 8, 3), GemmTile(64, 64, 32, 4, 3), GemmTile(32, 64, 64, 4, 4))
_PATCH_TILES_FLOAT = (GemmTile(32, 64, 16, 4, 2), GemmTile(16, 64, 32, 4, 2))


@tuned_first(GemmTile)
def choose_patch_embed(m: int, n: int, k: int, itemsize: int, device: Device, *, tf32: bool = False) -> GemmTile:
    """The largest of a few tiles that gives every SM one, or, but for sm_90, two if it is a wide one, of which a second
    for some would take long; they leave registers for the gathered addresses of pixels."""
    if device == INTERPRETED:
        return _interpreted_gemm(m, n, k)
    candidates = _PATCH_TILES_HALF if itemsize == 2 else _PATCH_TILES_FLOAT
    if device.capability in TENSOR_MEMORY:
        candidates = candidates[1:]
    for tile in candidates:
        each = 2 if tile.block_n > 64 and not 90 <= device.capability < 100 else 1
        if cdiv(m, tile.block_m) * cdiv(n, tile.block_n) >= each * device.sm_count:
            return tile
    return candidates[-1]
