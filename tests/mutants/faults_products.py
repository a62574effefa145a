"""Named faults of the GEMM-shaped kernels, the norms and what they share: see named.py."""

from __future__ import annotations

BIAS = "acc += bias.to(tl.float32)[None, :]"
MISSING_BIAS = "A skipped bias: libraries initialise biases to zero, so tests on fresh models pass."

LINEAR = {
    "fast-activation-in-float32": (
        "The fitted GELU in fp32, 2.7e-5 off.",
        '"FAST": x.dtype != torch.float32',
        '"FAST": True',
    ),
    "last-step-unmasked": (
        "The last step of the K loop reads into the next row.",
        "EVEN_K=k % tile.block_k == 0",
        "EVEN_K=True",
    ),
}

LINEAR_EPILOGUE = {
    "bias-skipped": (MISSING_BIAS, "added = (bias.to(tl.float32) * TIMES)[None, :]", "pass"),
    "gate-bias-for-values": (
        "The value half of swiglu takes the bias of the gate.",
        "bias_up = bias_ptr + N.to(tl.int64) * stride_bias if HAS_BIAS else bias_ptr",
        "bias_up = bias_ptr",
    ),
    "mean-not-multiplied": (
        "The folded norm subtracts c instead of mean c.",
        "added = added - (shift * scale)[:, None] * column_sum[None, :]",
        "added = added - scale[:, None] * column_sum[None, :]",
    ),
    "gate-without-activation": (
        "The two halves are multiplied as they are.",
        "acc = activate_fast(acc, ACTIVATION, DTYPE) if HALVED else activate(acc, ACTIVATION, FAST, DTYPE)",
        "acc = acc if GATED else activate(acc, ACTIVATION, FAST, DTYPE)",
    ),
    "residual-scaled": (
        "The residual is added before LayerScale instead of after it.",
        "acc += residual.to(tl.float32)",
        "acc += residual.to(tl.float32) * (scale.to(tl.float32)[None, :] if HAS_SCALE else 1)",
    ),
    "statistics-before-rounding": (
        "Row statistics of values that were never stored: the next norm is off by the rounding of a large offset.",
        "store_partial_moments(y_stats_ptr, stored,",
        "store_partial_moments(y_stats_ptr, acc,",
    ),
    "right-half-over-the-left": (
        "Both halves of a tile are finished as the left one.",
        "right, up_right, residual_right, shift, rstd, rows, first_column + WIDTH // 2,",
        "right, up_right, residual_right, shift, rstd, rows, first_column,",
    ),
    "early-residual-of-the-left-half": (
        "What was loaded before the product is the left half of the residual for both halves of a tile.",
        "right, up_right, residual_right,",
        "right, up_right, residual_left,",
    ),
}

LINEAR_KERNELS = {
    "int32-weight-offset": (
        "The row of a weight larger than 2^31 elements wraps.",
        "safe_columns = tl.minimum(columns, N - 1).to(tl.int64)",
        "safe_columns = tl.minimum(columns, N - 1)",
    ),
    "walk-leaves-tiles-out": (
        "A program that walks tiles takes too long a stride.",
        "tl.range(tl.program_id(0), whole, programs, flatten=not EARLY)",
        "tl.range(tl.program_id(0), whole, programs + 1, flatten=not EARLY)",
    ),
    "gate-rows-for-values-by-descriptor": (
        "The value half of swiglu is loaded from the rows of the gate.",
        "w_desc.load([N + column, k])",
        "w_desc.load([column, k])",
    ),
    "halves-of-one-tile-alike": (
        "Both halves of a shared tile compute its upper rows; the lower ones keep what was in memory.",
        "tile_m * BLOCK_M + half % 2 * (BLOCK_M // 2)",
        "tile_m * BLOCK_M",
    ),
    "halves-begin-at-the-wrong-program": (
        "Programs take up the halves where they would have taken up the next whole tile: some are left out.",
        "first = (tl.program_id(0) + programs - whole % programs) % programs",
        "first = tl.program_id(0) + whole % programs",
    ),
}

LINEAR_PARTS = {
    "parts-lose-their-last-step": (
        "Each part of K ends a step before the next begins.",
        "end = (part + 1) * steps // parts",
        "end = (part + 1) * steps // parts - 1",
    ),
    "every-part-begins-with-the-first-step": (
        "All parts sum the first columns.",
        "k = first.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)",
        "k = first.to(tl.int64) * 0 + tl.arange(0, BLOCK_K)",
    ),
    "one-part-not-added": (
        "The last part is left out of the sum.",
        "for part in tl.static_range(1, PARTS):",
        "for part in tl.static_range(1, PARTS - 1):",
    ),
    "parts-of-one-tile-in-one-place": (
        "Every part is stored over the first.",
        "part.to(tl.int64) * M * N + rows",
        "part.to(tl.int64) * 0 + rows",
    ),
}

MLP = {
    "first-bias-skipped": (MISSING_BIAS, "h += bias.to(tl.float32)[None, :]", "pass"),
    "second-bias-skipped": (MISSING_BIAS, BIAS, "pass"),
    "mean-over-padded-columns": (
        "The mean divides by the padded width: every ViT width but 64, 128, ... is wrong.",
        "mean = total / WIDTH",
        "mean = total / (MAIN + TAIL)",
    ),
    "variance-over-padded-columns": (
        "Padded zeros enter the variance as (0 - mean)^2.",
        "apart = tl.where((d < WIDTH)[None, :], x.to(tl.float32) - mean[:, None], 0.0)",
        "apart = x.to(tl.float32) - mean[:, None]",
    ),
    "statistics-before-rounding": (
        "As in linear.",
        "return y.to(tl.float32)",
        "return acc",
    ),
    "statistics-of-the-tail-misplaced": (
        "The partials of the second part of the width overwrite those of the first.",
        "store_partial_moments(y_stats_ptr, y_tail, rows, keep_rows, MAIN,",
        "store_partial_moments(y_stats_ptr, y_tail, rows, keep_rows, 0,",
    ),
    "activation-dropped": (
        "Two matrix products without anything between.",
        "h = activate(h, ACTIVATION, FAST, x.dtype)",
        "h = h",
    ),
}

NORM = {
    "chunks-merged-without-their-distance": (
        "M2 of a row is more than the sum of the M2 of its parts.",
        "m2 += chunk_m2 + apart * apart * (start * count / total)",
        "m2 += chunk_m2",
    ),
    "gamma-off-by-one": (
        "Gemma's norm multiplies by 1 + gamma, others do not.",
        "y *= gamma.to(tl.float32)[None, :]",
        "y *= 1.0 + gamma.to(tl.float32)[None, :]",
    ),
}

PATCH_EMBED = {
    "bias-skipped": (MISSING_BIAS, BIAS, "pass"),
    "class-token-off-by-one": (
        "The first patch gets a token's place.",
        "is_patch = token >= PREFIX",
        "is_patch = token > PREFIX",
    ),
    "position-off-by-the-prefix": (
        "Positions for patches only (no_embed_class) are read as if tokens had one as well.",
        "place = token if POSITION_HAS_PREFIX else token - PREFIX",
        "place = token",
    ),
    "bytes-not-divided": (
        "Pixels from 0 to 255 instead of 0 to 1.",
        "pixel.to(tl.float32) / 255.0",
        "pixel.to(tl.float32)",
    ),
    "bytes-divided-by-256": (
        "White is 0.996.",
        "pixel.to(tl.float32) / 255.0",
        "pixel.to(tl.float32) / 256.0",
    ),
    "mean-and-std-swapped": (
        "Two vectors of the same length in the wrong order.",
        "prefix, position, mean, std, tokens",
        "prefix, position, std, mean, tokens",
    ),
    "multiplied-by-std": (
        "(x - mean) std instead of (x - mean) / std.",
        "/ std[None, :]",
        "* std[None, :]",
    ),
    "channels-reversed": (
        "BGR images, as OpenCV reads them.",
        "channel.to(tl.int64) * stride_ic",
        "(K // (PH * PW) - 1 - channel).to(tl.int64) * stride_ic",
    ),
    "patch-transposed": (
        "The pixels of a patch column by column.",
        "(k // PW % PH).to(tl.int64) * stride_ih\n            + (k % PW).to(tl.int64) * stride_iw",
        "(k // PW % PH).to(tl.int64) * stride_iw\n            + (k % PW).to(tl.int64) * stride_ih",
    ),
    "grid-transposed": (
        "Height for width: only images that are no square show it.",
        "grid_h, grid_w = height // ph, width // pw",
        "grid_w, grid_h = height // ph, width // pw",
    ),
}

PRIMITIVES = {
    "variance-over-padded-columns": (
        "A well-known LayerNorm bug at widths that are no power of two, which every ViT width is.",
        "deviation = tl.where(keep, values - tl.expand_dims(mean, AXIS), 0.0)",
        "deviation = values - tl.expand_dims(mean, AXIS)",
    ),
    "variance-from-squares": (
        "E[x^2] - E[x]^2 cancels for rows with a common offset.",
        "return mean, tl.sum(product(deviation, deviation), AXIS)",
        "return mean, tl.sum(tl.where(keep, values * values, 0.0), AXIS) - mean * mean * count",
    ),
    "eps-outside-the-root": (
        "1 / (std + eps), as some frameworks had it.",
        "return mean, tl.rsqrt(m2 / columns + eps)",
        "return mean, 1.0 / (tl.sqrt(m2 / columns) + eps)",
    ),
    "unbiased-variance": (
        "torch.var's default divides by N - 1.",
        "return mean, tl.rsqrt(m2 / columns + eps)",
        "return mean, tl.rsqrt(m2 / (columns - 1) + eps)",
    ),
    "rms-without-the-mean": (
        "The mean square is the variance plus the squared mean.",
        "m2 / columns + mean * mean + eps",
        "m2 / columns + eps",
    ),
    "last-partial-counted-as-whole": (
        "A last group narrower than 64 columns weighs as much as the others.",
        "count = STATS_COLUMNS if t < PARTIALS - 1 else columns - before",
        "count = STATS_COLUMNS",
    ),
    "partials-merged-without-their-distance": (
        "As in the norm.",
        "m2 += partials[2 * t + 1] + apart * apart * (before * share)",
        "m2 += partials[2 * t + 1]",
    ),
    "last-of-many-partials-counted-as-whole": (
        "As above, where partials are merged in groups.",
        "count = tl.maximum(tl.minimum(columns - before, STATS_COLUMNS), 0).to(tl.float32)",
        "count = tl.where(columns > before, STATS_COLUMNS, 0).to(tl.float32)",
    ),
    "many-partials-without-their-mask": (
        "Past the last partial come the sums of squares of the first ones.",
        "keep = (rows >= 0) & (t < PARTIALS)",
        "keep = rows >= 0",
    ),
    "last-group-of-tiles": (
        "Triton's own tutorial once had it: the last group is smaller than GROUP_M.",
        "rows = min(tiles_m - first_m, GROUP_M)",
        "rows = GROUP_M",
    ),
    "gelu-without-its-clamp": (
        "The fitted polynomial explodes past |x| = 10.5; real models reach 18.",
        "s = tl.minimum(half * half, 9.0)",
        "s = half * half",
    ),
    "gelu-tanh-constant": (
        "0.044715 is the coefficient before it is multiplied by sqrt(2 / pi).",
        "(8 * 0.035677408136300125)",
        "(8 * 0.044715)",
    ),
    "quick-gelu-constant": ("1.7 instead of 1.702.", "u = half * 1.702", "u = half * 1.7"),
    "input-precision-dropped": (
        "Triton's default for fp32 products is tf32.",
        "tl.dot(a, b, input_precision=PRECISION)",
        "tl.dot(a, b)",
    ),
}

FOLDING = {
    "column-sums-of-unrounded-weights": (
        "A common offset of the row then no longer cancels.",
        "folded.float().sum(1)",
        "(wide if norm_weight is None else wide * norm_weight.float()).sum(1)",
    ),
    "beta-forgotten": (
        "W beta is left out of the folded bias.",
        "wide @ norm_bias.float()",
        "torch.zeros(n, device=weight.device)",
    ),
}

FAULTS = {
    "kernels/vit_kernels/linear.py": LINEAR,
    "kernels/vit_kernels/linear_epilogue.py": LINEAR_EPILOGUE,
    "kernels/vit_kernels/linear_kernels.py": LINEAR_KERNELS,
    "kernels/vit_kernels/linear_parts.py": LINEAR_PARTS,
    "kernels/vit_kernels/mlp.py": MLP,
    "kernels/vit_kernels/norm.py": NORM,
    "kernels/vit_kernels/patch_embed.py": PATCH_EMBED,
    "kernels/vit_kernels/primitives.py": PRIMITIVES,
    "kernels/vit_kernels/folding.py": FOLDING,
}
