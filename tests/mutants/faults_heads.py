"""Named faults of qk_rope: see named.py."""

from __future__ import annotations

KERNEL = {
    "turned-the-other-way": (
        "The sign of the rotation: scores of neighbours look the same, trained weights know the other.",
        "first * cos_first - second * sin_first",
        "first * cos_first + second * sin_first",
    ),
    "partner-already-turned": (
        "The second column of a pair is made from the first one's result instead of its input.",
        "second * cos_second + first * sin_second",
        "second * cos_second + turned_first * sin_second",
    ),
    "prefix-turned": (
        "Class and register tokens are multiplied by the zeros that the tables have for them.",
        "turned = keep & (at >= 0)",
        "turned = keep",
    ),
    "tables-not-shifted": (
        "Patches take the angles of the patch that lies `prefix` further on.",
        "at = token - prefix",
        "at = token - 0 * prefix",
    ),
    "padding-in-the-variance": (
        "A width that is no power of two: every padded column adds the squared mean to the variance.",
        "second = tl.where(keep_second, second - mean, 0.0)",
        "second = second - mean",
    ),
    "keys-with-the-queries-heads": (
        "Fewer key heads than query heads: the last groups write past the keys.",
        "min(first_head + heads_each, heads_k), heads_k",
        "min(first_head + heads_each, heads_q), heads_k",
    ),
    "first-table-for-all-heads": (
        "Tables of each head, and programs of several heads that read one.",
        "heads_each = 1 if own_tables else tile.heads",
        "heads_each = tile.heads",
    ),
    "int32-head-offset": (
        "Offsets past 2^31 elements wrap.",
        "tl.cast(head, tl.int64) * stride_h",
        "tl.cast(head, tl.int32) * stride_h",
    ),
}

CHECKS = {
    "sin-taken-for-cos": (
        "timm packs sin before cos, Hugging Face returns cos before sin.",
        'return _expanded("cos", cos, shape, own), _expanded("sin", sin, shape, own)',
        'return _expanded("sin", sin, shape, own), _expanded("cos", cos, shape, own)',
    ),
    "one-head-is-not-expanded": (
        "Keys of more heads than queries read the table of a head that does not exist.",
        "shape = (batch, max(heads, k.shape[2]), tokens - prefix, width)",
        "shape = (batch, heads, tokens - prefix, width)",
    ),
}

FAULTS = {
    "kernels/vit_kernels/qk_rope.py": KERNEL,
    "kernels/vit_kernels/qk_rope_checks.py": CHECKS,
}
