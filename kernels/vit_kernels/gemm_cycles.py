"""Modelled time of a product in cycles of an SM, by its tile: what `gemm_tiles` chooses by."""

from __future__ import annotations

from dataclasses import replace

from .device import Device
from .gemm_tile import GemmTile, halved_tiles, loads_early, resident_programs, split_tiles
from .linear_roles_ring import NARROW
from .tiles import FP32_RATE, TENSOR_RATE, cdiv, nearest

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
# Where warps have roles: fitted to 32 launches of ViT-S, B and L at batches 8 and 64 on an H100, each in both such
# tiles (Triton 3.6, cold L2, 1.75 GHz assumed), 7 % off on average. What a step waits beside 256 columns, whose ring
# has three slots; from the last product of 256 columns to the first of the next tile; what 64 x 64 results take the
# finishing warps, more with an activation, and more with residual and statistics.
_ROLES_STEP = 90
_ROLES_HAND_OVER = 930
_ROLES_PIECE = 1130
_ROLES_ACTIVATION = 520
_ROLES_RESIDUAL = 970
# Where weights stay: fitted to seven launches of ViT-S and Ti at batches 64 and 256 on an H100 (Triton 3.6, cold L2,
# 1.755 GHz assumed), 3 % off on average. Until the weights are there, and behind the last tile; what a tile takes
# beside the tensor cores' time; and more with residual and statistics.
_STAYING_ENDS = 2000
_STAYING_TILE = 2300
_STAYING_RESIDUAL = 3400
# What a program takes for a part of K beside its steps, simulated on sm_90 and 80 for 64x64 to 128x256.
_PART = 1500
_STORED_BYTES_PER_CLOCK = 32
# Where rows are columns of products: fitted to 23 launches of ViT-S, B and L at batches 1 to 32 on an H100 (Triton 3.6,
# cold L2, 1.755 GHz assumed), 6 % off. From the last product to the first results; what 64 x 64 results of each
# warpgroup take, more with an activation; and a residual, which then comes from memory, by its bytes.
_COLUMNS_FINISH = 700
_COLUMNS_PIECE = 1030
_COLUMNS_ACTIVATION = 130
_COLUMNS_RESIDUAL = 0.08
_COLUMNS_L2_BYTES_PER_CLOCK = 46
# What a program saves that has room beside one of the launch before: in ViT-B at batch 1, from begin to begin of
# launches, qkv took 5.1 us for 5.6 and fc1 5.6 for 6.5. What they take alone would not have chosen it for fc1.
_COLUMNS_BESIDE = 2500
_SHARED_BYTES_PER_CLOCK = 128
# From L2 to one SM with all of them busy: a fit to measured kernels on sm_90, a guess elsewhere.
_L2_BYTES_PER_CLOCK = {80: 40, 86: 24, 90: 48, 120: 24}
_ROLES_L2_BYTES_PER_CLOCK = 42  # fitted with the figures of roles above: these ask for more of it than others


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
    from_l2: float = nearest(_L2_BYTES_PER_CLOCK, device.capability)
    if tile.roles or tile.blocks:
        from_l2 = _ROLES_L2_BYTES_PER_CLOCK
    from_l2 *= device.sm_count / (busy_sms or device.sm_count)
    return max(
        2 * tile.block_m * columns * tile.block_k / rate,
        (taken_in + given_out) / _SHARED_BYTES_PER_CLOCK,
        taken_in / from_l2,
    )


def _turn_cycles(tile: GemmTile, itemsize: int, device: Device, operands: int = 1) -> float:
    """A step's share of the time that a slot takes to fill, weights and x cold: known of descriptors on sm_90 only."""
    if not tile.tma or not 90 <= device.capability < 100:
        return 0.0
    slot = (tile.block_m + operands * tile.block_n) * tile.block_k * itemsize
    return (_ROUND_TRIP + slot / _L2_BYTES_PER_CLOCK[90]) / tile.num_stages


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


def _roles_cycles(
    tile: GemmTile, m: int, n: int, k: int, itemsize: int, device: Device, *, activated: bool, residual: bool
) -> float:  # fmt: skip
    """`gemm_cycles` where warps have roles: the busiest SM does its whole tiles and then a narrow one, each under what
    finishes the one before; the last is finished under nothing."""
    steps, tiles = cdiv(k, tile.block_k), cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    split = split_tiles(tile, m, n, device.sm_count)
    busy_sms = min(tiles + 3 * split, device.sm_count)
    piece = _ROLES_PIECE + _ROLES_ACTIVATION * activated + _ROLES_RESIDUAL * residual

    waits = _ROLES_STEP if tile.block_n == 256 else 0

    def multiply(columns: int) -> float:
        step = step_cycles(replace(tile, block_n=columns), itemsize, device, busy_sms=busy_sms) + waits
        return steps * step + _ROLES_HAND_OVER * columns / 256

    last = NARROW.value if split else tile.block_n
    whole = multiply(tile.block_n)
    finished = 2 * tile.block_n // NARROW.value * piece
    cycles = whole + (cdiv(tiles - split, device.sm_count) - 1) * max(whole, finished)
    if split:
        cycles += max(multiply(last), finished)
    ends = 2 * last // NARROW.value
    if tile.blocks and last <= 128:
        # Those that multiplied finish half of it.
        ends //= 2
    return _LAUNCH + cycles + ends * piece


def _staying_cycles(tile: GemmTile, m: int, n: int, k: int, device: Device, *, residual: bool) -> float:
    """`gemm_cycles` where weights stay: the busiest program does its tiles, which wait for nothing out of L2."""
    tiles = cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    most = cdiv(tiles, min(tiles, device.sm_count))
    product = 2 * tile.block_m * tile.block_n * cdiv(k, tile.block_k) * tile.block_k
    each = product / nearest(TENSOR_RATE, device.capability) + _STAYING_TILE + _STAYING_RESIDUAL * residual
    return _LAUNCH + _STAYING_ENDS + most * each


def _columns_cycles(
    tile: GemmTile, m: int, n: int, k: int, itemsize: int, device: Device, *, activated: bool, residual: bool
) -> float:
    """`gemm_cycles` where rows are columns of products: one tile a program, finished by those that multiplied it, and
    as many programs an SM as it says."""
    programs = cdiv(m, tile.block_m) * (n // tile.block_n)
    rounds = cdiv(programs, tile.tma * device.sm_count)
    together = min(tile.tma, cdiv(programs, device.sm_count))
    slot = (tile.block_m + tile.block_n) * tile.block_k * itemsize
    # Weights are given out for the power of two and for the tail, x to each 64 features.
    given_out = (2 * tile.block_n + tile.block_n // 64 * tile.block_m) * tile.block_k * itemsize
    step = max(
        together * 2 * tile.block_m * tile.block_n * tile.block_k / nearest(TENSOR_RATE, device.capability),
        together * (slot + given_out) / _SHARED_BYTES_PER_CLOCK,
        together * slot / 64,
        min(programs / device.sm_count, together) * slot / _COLUMNS_L2_BYTES_PER_CLOCK,
        _turn_cycles(tile, itemsize, device),
    )
    pieces = tile.block_m * tile.block_n / NARROW.value**2
    finish = _COLUMNS_FINISH + pieces * (_COLUMNS_PIECE + _COLUMNS_ACTIVATION * activated)
    finish += residual * _COLUMNS_RESIDUAL * tile.block_m * tile.block_n * itemsize
    begin = _LAUNCH + _FILL - (_COLUMNS_BESIDE if tile.tma > 1 else 0)
    return begin + rounds * (cdiv(k, tile.block_k) * step + finish)


def gemm_cycles(
    tile: GemmTile, m: int, n: int, k: int, itemsize: int, device: Device, *, operands: int = 1, tf32: bool = False,
    activated: bool = False, residual: bool = False,
) -> float:  # fmt: skip
    """Modelled SM cycles of a GEMM [m, k] x [k, n * operands]: waves of tiles times the cycles of a tile.

    The busiest SM computes ceil(tiles / SMs) tiles, as many at a time as it holds, and last a half (`halved_tiles`).
    Those at a time share its units: a step takes the longer of all their work and of one program's work and wait; the
    same goes for what follows the last step.
    """
    if tile.parts > 1:
        return parts_cycles(tile, m, n, k, device) + sum_cycles(tile.parts, m, n, device)
    if tile.staying:
        return _staying_cycles(tile, m, n, k, device, residual=residual)
    if tile.columns:
        return _columns_cycles(tile, m, n, k, itemsize, device, activated=activated, residual=residual)
    if tile.roles or tile.blocks:
        return _roles_cycles(tile, m, n, k, itemsize, device, activated=activated, residual=residual)
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
