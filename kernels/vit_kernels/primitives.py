"""Device functions that several kernels share: activations, row moments, tile order."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter has no inline assembly: there tanh is exact, and rounding takes Triton's own conversions.
INLINE_ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret)

# Columns that one partial of the row statistics covers. Fixed, so that the format of the statistics does not depend on
# the tile that produced them; 64 is the narrowest tile of a producing GEMM.
STATS_COLUMNS = tl.constexpr(64)
# More partials of a row than this are not loaded at once: they would fill the registers.
MANY_PARTIALS = tl.constexpr(16)


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """First thing a kernel does (but for `fetch_ahead`): waits until the launch before has ended, results and all.

    OVERLAP: the launch was allowed to begin before that (programmatic dependent launch, sm_90 and newer), so that the
    next one is being set up while this one runs; the next may now begin likewise. As every kernel waits before it
    reads or writes memory, nothing else changes.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """tanh(x) in fp32. FAST: the hardware's tanh.approx, 2^-11 relative by the PTX manual."""
    if FAST and INLINE_ASSEMBLY:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    # exp overflows to inf for large x, and 1 - 2 / inf is the right limit.
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in fp32 -> (x rounded to DTYPE, that value in fp32 again).

    Two bf16 numbers are the halves of two fp32 ones. Left to itself, ptxas converts them one by one, on a unit with an
    eighth of the throughput.
    """
    if INLINE_ASSEMBLY and DTYPE == tl.bfloat16:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
            "=r,=&r,=r,f,f",
            [x],
            dtype=(tl.bfloat16, tl.float32),
            is_pure=True,
            pack=2,
        )
    y = x.to(DTYPE)
    return y, y.to(tl.float32)


@triton.jit
def widened(x):
    """x in fp32. Two bf16 numbers side by side are the halves of two fp32 ones: an instruction each, where Triton's own
    conversion takes two for every second one."""
    if INLINE_ASSEMBLY and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=&r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return x.to(tl.float32)


@triton.jit
def erf(x):
    """erf(x) in fp32 within 1.1 units in the last place (numpy, two million points), without a branch.

    |x| <= 1: x (1 + P(x^2)); beyond: 1 - 2^(-|x| Q(|x|)), which is 1 to the last bit from 4 on. P and Q are
    least-squares fits to float64 values at Chebyshev nodes. The library's erf branches, and Triton 3.8 compiles
    shared-memory stores that all threads of a warp must reach together (stmatrix) into its branches on sm_90.
    """
    s = tl.minimum(x * x, 1.0)
    p = 7.84725912e-05
    p = tl.fma(s, p, -8.00818932e-04)
    p = tl.fma(s, p, 5.18809889e-03)
    p = tl.fma(s, p, -2.68536911e-02)
    p = tl.fma(s, p, 1.12835822e-01)
    p = tl.fma(s, p, -3.76126256e-01)
    p = tl.fma(s, p, 1.28379166e-01)
    t = tl.minimum(tl.abs(x), 4.0)
    q = 4.84653878e-06
    q = tl.fma(t, q, -3.75593682e-05)
    q = tl.fma(t, q, -2.17805981e-04)
    q = tl.fma(t, q, 4.63943974e-03)
    q = tl.fma(t, q, -3.33933668e-02)
    q = tl.fma(t, q, 1.52523746e-01)
    q = tl.fma(t, q, 9.16663815e-01)
    q = tl.fma(t, q, 1.62823358)
    large = 1.0 - tl.exp2(-t * q)
    return tl.where(t <= 1.0, tl.fma(x, p, x), tl.where(x < 0.0, -large, large))


@triton.jit
def accumulate(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. In fp32 each product is summed on its own first: one running sum over a long K would round K times.

    Written as a multiply-add by one, because the compiler turns a plain sum back into the running one.
    """
    if a.dtype == tl.float32:
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)
    return tl.dot(a, b, acc)


@triton.jit
def gelu(x):
    """x Phi(x)"""
    return 0.5 * x * (1.0 + erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))"""
    return 0.5 * x * (1.0 + tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x), False))


@triton.jit
def sigmoid_times(x, slope: tl.constexpr):
    """x sigmoid(slope x): SiLU with slope 1, quick GELU with slope 1.702."""
    return x / (1.0 + tl.exp(-slope * x))


@triton.jit
def activate_fast(half, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The named activation of x in fp32, given x / 2, with the error that rounding to DTYPE, of 16 bits, hides.

    All of them are x/2 + x/2 tanh(u(x)); what scales and shifts x in front of it halves it for nothing. gelu is a tanh
    form fitted to the erf form. For fp16, within 2.7e-5 of it for every x at a quarter of the cost: with
    s = min(x^2, 36), u = x (0.7975 + s (0.0370 - 0.00035 s)). The clamp keeps the polynomial inside the range it was
    fitted on; past it the tanh is 1 to the last bit. For bf16, whose last bit is eight times as large, within 2.8e-4:
    u = x (0.80016 + 0.034701 x^2), two instructions less of seven, behind the largest of products.
    """
    if ACTIVATION == "gelu" and tl.bfloat16 == DTYPE:
        u = half * (2 * 0.80016 + half * half * (8 * 0.034701))
    elif ACTIVATION == "gelu":
        s = tl.minimum(half * half, 9.0)
        u = half * (2 * 0.7975 + s * (8 * 0.0370 - s * (32 * 0.00035)))
    elif ACTIVATION == "gelu_tanh":
        u = half * (2 * 0.7978845608028654 + half * half * (8 * 0.035677408136300125))
    elif ACTIVATION == "quick_gelu":
        u = half * 1.702
    else:
        u = half
    return tl.fma(half, tanh(u, True), half)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr):
    """The named activation, elementwise in fp32. FAST allows the error that rounding to DTYPE, of 16 bits, hides."""
    if ACTIVATION == "none":
        return x
    if FAST:
        return activate_fast(0.5 * x, ACTIVATION, DTYPE)
    if ACTIVATION == "gelu":
        x = gelu(x)
    elif ACTIVATION == "gelu_tanh":
        x = gelu_tanh(x)
    elif ACTIVATION == "quick_gelu":
        x = sigmoid_times(x, 1.702)
    else:
        x = sigmoid_times(x, 1.0)
    return x


@triton.jit
def tiles_over(n, BLOCK: tl.constexpr):
    """Blocks that cover n >= 1 elements; the usual (n + BLOCK - 1) // BLOCK overflows close below 2^31."""
    return (n - 1) // BLOCK + 1


@triton.jit
def grouped_tile(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The (row, column) tile of a program: GROUP_M row tiles at a time (0: all), so that the weights they share stay in
    L2."""
    tiles_m = tiles_over(M, BLOCK_M)
    if GROUP_M == 0:
        return pid % tiles_m, pid // tiles_m
    tiles_n = tiles_over(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return first_m + inside % rows, inside // rows


@triton.jit
def product(a, b):
    """a b, rounded before anything is added to it.

    A sum across lanes adds each lane's product to its neighbour's. Contracted into a multiply-add, the two lanes would
    round differently and disagree in the last bit about a value that both go on to use.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def row_moments(values, keep, count, AXIS: tl.constexpr):
    """Mean and sum of squared deviations (M2) along the last axis, AXIS, over the kept columns, in two passes.

    Masked columns enter neither: a padded zero would pull the variance towards the mean squared.
    """
    mean = tl.sum(tl.where(keep, values, 0.0), AXIS) / count
    deviation = tl.where(keep, values - tl.expand_dims(mean, AXIS), 0.0)
    return mean, tl.sum(product(deviation, deviation), AXIS)


@triton.jit
def load_moments(stats_ptr, rows, M, PARTIALS: tl.constexpr):
    """The partials [2, PARTIALS, M] of the rows, all below M, as a tuple: a mean and an M2 after the other."""
    at = stats_ptr + rows
    partials = (tl.load(at), tl.load(at + tl.full((), PARTIALS, tl.int64) * M))
    for t in tl.static_range(1, PARTIALS):  # type: ignore[reportGeneralTypeIssues]
        mean = tl.load(at + tl.full((), t, tl.int64) * M)
        partials += (mean, tl.load(at + tl.full((), PARTIALS + t, tl.int64) * M))
    return partials


@triton.jit
def merge_loaded(partials, columns, PARTIALS: tl.constexpr):
    """Mean and M2 of whole rows from what `load_moments` loaded (Chan's formula)."""
    mean = partials[0]
    m2 = partials[1]
    for t in tl.static_range(1, PARTIALS):  # type: ignore[reportGeneralTypeIssues]
        before = t * STATS_COLUMNS
        count = STATS_COLUMNS if t < PARTIALS - 1 else columns - before
        share = count / (before + count)
        apart = partials[2 * t] - mean
        mean += apart * share
        m2 += partials[2 * t + 1] + apart * apart * (before * share)
    return mean, m2


@triton.jit
def merge_moments(stats_ptr, rows, M, columns, PARTIALS: tl.constexpr):
    """Mean and M2 of whole rows, all below M, from the partials [2, PARTIALS, M] of their columns (Chan's formula).

    One partial after the other, each thread for its own rows: a reduction along the partials would go through shared
    memory and five barriers.
    """
    if PARTIALS <= MANY_PARTIALS:
        return merge_loaded(load_moments(stats_ptr, rows, M, PARTIALS), columns, PARTIALS)
    # Eight at a time: with all their loads under way at once, the partials would fill the registers.
    at = stats_ptr + rows
    mean = tl.load(at)
    m2 = tl.load(at + tl.full((), PARTIALS, tl.int64) * M)
    for first in range(1, PARTIALS, 8):
        for i in tl.static_range(8):  # type: ignore[reportGeneralTypeIssues]
            t = tl.full((), i, tl.int64) + first
            keep = (rows >= 0) & (t < PARTIALS)
            before = t * STATS_COLUMNS
            # Past the last partial the count is 0, and nothing is added.
            count = tl.maximum(tl.minimum(columns - before, STATS_COLUMNS), 0).to(tl.float32)
            share = count / (before + count)
            apart = tl.load(at + t * M, mask=keep, other=0.0) - mean
            mean += apart * share
            m2 += tl.load(at + (t + PARTIALS) * M, mask=keep, other=0.0) + apart * apart * (before * share)
    return mean, m2


@triton.jit
def shift_and_scale(mean, m2, columns, eps, NORM: tl.constexpr):
    """(mean to subtract, 1 / scale) of LayerNorm or RMSNorm from a row's moments."""
    if NORM == "rms":
        return mean * 0.0, tl.rsqrt(m2 / columns + mean * mean + eps)
    return mean, tl.rsqrt(m2 / columns + eps)


@triton.jit
def store_partial_moments(
    stats_ptr, values, rows, keep_rows, first_column, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Writes the moments of a tile of finished values into stats [2, ceil(N / 64), M], one partial per 64 columns.

    first_column is a multiple of 64; a tile narrower than 64 must end the row.
    """
    group: tl.constexpr = min(BLOCK_N, STATS_COLUMNS)
    parts: tl.constexpr = BLOCK_N // group
    part = first_column // STATS_COLUMNS + tl.arange(0, parts)
    counts = tl.maximum(tl.minimum(N - part * STATS_COLUMNS, group), 0)
    keep = (tl.arange(0, group)[None, :] < counts[:, None])[None, :, :]
    # A group beyond N has no columns: dividing by one keeps its (never stored) mean finite.
    divisor = tl.maximum(counts, 1).to(tl.float32)[None, :]
    mean, m2 = row_moments(tl.reshape(values, (BLOCK_M, parts, group)), keep, divisor, 2)
    partials = tl.cdiv(N, STATS_COLUMNS)
    keep = keep_rows[:, None] & (part < partials)[None, :]
    tl.store(stats_ptr + part[None, :].to(tl.int64) * M + rows[:, None], mean, mask=keep)
    tl.store(stats_ptr + (part[None, :] + partials).to(tl.int64) * M + rows[:, None], m2, mask=keep)
