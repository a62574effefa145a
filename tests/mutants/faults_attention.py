"""Named faults of attention: see named.py."""

from __future__ import annotations

ATTENTION = {
    "no-guard-for-an-empty-sum": (
        "1 / 0 times 0 is NaN for a query without any allowed key.",
        "inverse = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)",
        "inverse = 1.0 / row_sum",
    ),
    "exp2-without-log2e": (
        "exp replaced by exp2, the factor log2(e) forgotten: a softmax of another temperature.",
        "scale * LOG2_E.value,\n        WIDTH=",
        "scale,\n        WIDTH=",
    ),
    "lse-in-base-2": (
        "A backward pass that expects the natural logarithm gets log2.",
        "lse = row_max * LN_2 + tl.log(row_sum)",
        "lse = row_max + tl.log2(row_sum)",
    ),
    "causal-aligned-top-left": (
        "PyTorch and FlashAttention disagreed about this for years: query i sees keys up to i + Nk - Nq here.",
        "diagonal = keys - queries",
        "diagonal = 0",
    ),
    "lengths-only-to-whole-blocks": (
        "Keys past the length but inside its last block take part.",
        "length = stop",
        "length = keys",
    ),
    "lengths-ignored": (
        "Padding tokens of a batch take part.",
        "HAS_LENGTHS=lengths is not None and not",
        "HAS_LENGTHS=False and not",
    ),
    "grouped-heads-interleaved": (
        "Query head h reads key head h mod Hk instead of h / group.",
        "head_k = (head // GROUP).to(tl.int64)",
        "head_k = (head % (heads // GROUP)).to(tl.int64)",
    ),
    "mask-taken-as-dense": (
        "The strides of a broadcast mask are ignored: other images and heads read past it.",
        "mask_ptr += image * stride_mask_b + head.to(tl.int64) * stride_mask_h",
        "mask_ptr += (image * heads + head) * queries * keys",
    ),
    "units-counted-as-elements": (
        "Strides handed over in units of 8 elements and taken for elements.",
        ".to(tl.int64)[:, None] * stride_qn * UNIT",
        ".to(tl.int64)[:, None] * stride_qn",
    ),
    "a-unit-that-does-not-divide": (
        "Strides that 8 does not divide, cut off.",
        "return 8 if gains and all(stride % 8 == 0",
        "return 8 if gains and any(stride % 8 == 0",
    ),
    "int32-image-offset": (
        "The same for the image: batch 64 of 12 heads at 4096 tokens is past it.",
        "image = (tl.program_id(0) // tiles_m // heads).to(tl.int64)",
        "image = tl.program_id(0) // tiles_m // heads",
    ),
    "no-launch-guard-for-nothing": (
        "A batch of 0 is launched as a grid of 0 programs.",
        "if q.numel() > 0:",
        "if True:",
    ),
    "no-block-for-the-rest": (
        "The keys that whole blocks leave over are left out.",
        "    if REST:",
        "    if False:",
    ),
    "rest-beside-the-loop-of-masked-blocks": (
        "With lengths or causal order the last keys are added twice, by the first block and by the loop.",
        "REST=0 if last_by_loop else attention_tiles",
        "REST=attention_tiles",
    ),
    "keys-of-the-longest-sequence": (
        "Every packed sequence attends to as many keys as the longest has: to its neighbours'.",
        "        keys = queries\n        if tile",
        "        if tile",
    ),
    "packed-values-of-the-first-sequence": (
        "The rows of a packed sequence are counted from the first row of all.",
        "        v_ptr += first * stride_vn * UNIT",
        "        v_ptr += 0",
    ),
    "int32-offset-of-a-sequence": (
        "The offset of a packed sequence wraps past 2^31 elements.",
        "first = tl.load(lengths_ptr + image).to(tl.int64)",
        "first = tl.load(lengths_ptr + image).to(tl.int32)",
    ),
    "bounds-taken-for-key-lengths": (
        "Cumulative lengths cut keys off as key lengths do.",
        "HAS_LENGTHS=lengths is not None and not packed",
        "HAS_LENGTHS=lengths is not None",
    ),
    "every-block-the-first": (
        "The loop forgets what the block before it accumulated.",
        "MASK, CAUSAL, False, False, PRECISION, BLOCK_N,",
        "MASK, CAUSAL, False, True, PRECISION, BLOCK_N,",
    ),
}

BLOCK = {
    "masked-keys-are-zero": (
        "A published ViT kernel pads the keys with 0 instead of -inf: 3 % mean row error, hidden by an MSE test.",
        's = tl.where(keep_key[None, :], s, float("-inf"))',
        "s = tl.where(keep_key[None, :], s, 0.0)",
    ),
    "padded-keys-not-masked": (
        "Zero-filled keys past the end get the weight of a score of 0.",
        's = tl.where(keep_key[None, :], s, float("-inf"))',
        "s = s",
    ),
    "forbidden-keys-are-zero": (
        "A boolean mask that multiplies scores instead of removing keys.",
        's = tl.where(allowed, s, float("-inf"))',
        "s = tl.where(allowed, s, 0.0)",
    ),
    "accumulator-not-rescaled": (
        "Online softmax without the factor 2^(m_old - m_new): right only while the first block holds the maximum.",
        "        acc = acc * rescale[:, None]",
        "        acc = acc * 1.0",
    ),
    "tail-not-rescaled": (
        "The same in the second part of the head width alone.",
        "acc_tail = acc_tail * rescale[:, None]",
        "acc_tail = acc_tail * 1.0",
    ),
    "row-sum-not-rescaled": (
        "The denominator keeps terms of an older maximum.",
        "row_sum = row_sum * rescale",
        "row_sum = row_sum * 1.0",
    ),
    "maximum-of-the-block-alone": (
        "Without a running maximum the rescaling overflows when scores fall along the keys.",
        "new_max = tl.maximum(row_max, new_max)",
        "new_max = new_max + 0.0",
    ),
    "no-guard-for-empty-rows": (
        "-inf - -inf is NaN for a query that has met no allowed key.",
        'offset = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED or MASK != "none" else new_max',
        "offset = new_max",
    ),
    "bias-without-log2e": (
        "The same for the additive mask alone.",
        "bias.to(tl.float32) * LOG2_E",
        "bias.to(tl.float32)",
    ),
    "bias-scaled": (
        "The additive mask is added before the scale instead of after it.",
        "s = s * logit_scale + bias.to(tl.float32) * LOG2_E",
        "s = (s + bias.to(tl.float32)) * logit_scale",
    ),
    "foreign-keys-read": (
        "Rows past the end are another image's: their weight is 0, but 0 x NaN is NaN.",
        "return tl.load(at, mask=n_keep[:, None], other=0.0)",
        "return tl.load(at)",
    ),
    "int32-key-offset": (
        "Offsets past 2^31 elements wrap.",
        "k_row = k_ptr + tl.cast(start, tl.int64) * stride_kn",
        "k_row = k_ptr + start * stride_kn",
    ),
    "int32-offset-inside-a-block": (
        "The same between the keys of one block.",
        "stride_kn * UNIT + n.to(tl.int64)[:, None]",
        "stride_kn * UNIT + n[:, None]",
    ),
    "input-precision-dropped": (
        "Triton's default for fp32 products is tf32.",
        "s = tl.dot(q, k.T, input_precision=PRECISION)",
        "s = tl.dot(q, k.T)",
    ),
}

CHECKS = {
    "rows-of-other-tensors-not-compared": (
        "Keys shorter than the queries are read past their end.",
        "if tensor.shape[0] != q.shape[0]:",
        "if False:",
    ),
    "scale-forgotten": (
        "The default scale is 1 instead of D^-0.5.",
        "1 / math.sqrt(width) if scale is None",
        "1.0 if scale is None",
    ),
    "boolean-mask-inverted": (
        "True means masked in half of the libraries.",
        "mask.view(torch.uint8).expand(shape)",
        "(~mask).view(torch.uint8).expand(shape)",
    ),
}

TILES = {
    "rest-cut-off": (
        "A block for the rest that is narrower than the rest.",
        "return max(next_power_of_2(rest), 16)",
        "return max(next_power_of_2(rest) // 2, 16)",
    ),
}

FAULTS = {
    "kernels/vit_kernels/attention_tiles.py": TILES,
    "kernels/vit_kernels/attention.py": ATTENTION,
    "kernels/vit_kernels/attention_block.py": BLOCK,
    "kernels/vit_kernels/attention_checks.py": CHECKS,
}
