"""The correctness case of one tile, for running tiles that the tile choice would only pick for a large problem."""

from __future__ import annotations

from typing import Any

from vit_bench import attention_inputs
from vit_bench.case_inputs import head_inputs, linear_inputs, mlp_inputs, norm_inputs, patch_inputs
from vit_bench.cases import STATS, Case


def tile_case(kernel: str, tile: Any, width: int, gated: bool, *, added: bool = True) -> Case:
    """A case a little larger than one program's tile, with most of a kernel's options on.

    width: of an attention head or of the
    one-kernel MLP, which are compile-time constants of those kernels. added: a residual and statistics, without which
    the finishing warps of `linear_roles` have other code.
    """
    shape = " ".join(str(value) for value in vars(tile).values())
    name = f"tile {shape}"
    if kernel == "attention":
        if tile.whole:
            # Whole blocks of keys and what they leave over; more tiles than one program has.
            return Case(kernel, f"{name}, width {width}", attention_inputs.packed(2, 197, 2, width))
        if tile.roles:
            # Whole blocks of keys, half a block and what is left over; more than a tile of queries.
            return Case(kernel, f"{name}, width {width}", attention_inputs.packed(1, 2 * 128 + 64 + 5, 2, width))
        tokens = max(tile.block_m, tile.block_n) + 5
        return Case(
            kernel, f"{name}, width {width}", attention_inputs.packed(1, tokens, 1, width), {}, {"return_lse": True}
        )
    if kernel == "mlp":
        # With roles, slots are used again, and rows of the weights begin at multiples of 16 bytes.
        hidden = (tile.num_stages + 2) * tile.block_h + 8 if tile.roles else 2 * tile.block_h + 5
        inputs = mlp_inputs(tile.block_m + 3, width, hidden, gated=gated)
        options = {"activation": "swiglu" if gated else "gelu"}
        return Case(kernel, f"{name}, width {width}{', gated' * gated}", inputs, options, {"fused": True, **STATS})
    if kernel == "qk_rope":
        inputs = head_inputs(tile.heads + 1, tile.heads + 1, width, "layer", "all", tokens=tile.block_t + 5, prefix=2)
        return Case(kernel, f"{name}, width {width}", inputs, {"norm": "layer"})
    if kernel == "patch_embed" and tile.blocks:
        # Three blocks of 8 images, the last with one, and two tiles of features: programs have several.
        return Case(kernel, name, patch_inputs(17, 64, 16, 2 * tile.block_n, 1), {}, STATS)
    if kernel == "patch_embed":
        size = 16 * (1 + int(tile.block_m**0.5))
        return Case(kernel, name, patch_inputs(1, size, 16, tile.block_n + 8, 1), {}, STATS)
    if kernel == "linear":
        # With a step more or less in some parts than in others.
        steps = 3 if tile.parts == 1 else 2 * tile.parts + 1
        m, k, n = tile.block_m + 3, steps * tile.block_k, tile.block_n + 8
        if tile.roles and tile.parts == 1:
            # Five tiles in a row or a column, the last one not whole, for programs that walk from one to the next; in a
            # column from the last to the first, for K is longer than N.
            m, k, n = tile.block_m - 28, 3 * tile.block_k + 8, 5 * tile.block_n - 64
            if added:
                m, k, n = 5 * tile.block_m - 28, tile.block_n + 8, tile.block_n - 64
        if tile.staying:
            # Two columns of tiles, the second not whole, and five rows: programs go on to other columns, and one is
            # over. K of two lengths: more slots for x than steps, and as many.
            m, k, n = 5 * tile.block_m - 28, (6 if added else 3) * tile.block_k - 8, 2 * tile.block_n - 64
        if tile.columns:
            # Slots are used again, and neither rows nor steps are whole.
            m, k, n = tile.block_m + 3, (tile.num_stages + 2) * tile.block_k - 56, tile.block_n
        if not added:
            options = {"norm": "layer", "activation": "gelu"}
            inputs = linear_inputs(m, k, n, "norm", "bias")
            launch_options = {"partial_stats": True, "column_sums": True}
            return Case(kernel, f"{name}, nothing added", inputs, options, launch_options)
        if gated:
            return Case(
                kernel,
                f"{name}, gated",
                linear_inputs(m, k, n, "norm", "bias", gated=True),
                {"norm": "layer", "activation": "swiglu"},
            )
        parts = linear_inputs(m, k, n, "norm", "bias", "scale", "residual")
        return Case(kernel, name, parts, {"norm": "layer", "activation": "gelu"}, {"partial_stats": True, **STATS})
    rows, columns = tile.block_m + 1, min(tile.block_n, 1000)
    if kernel == "layer_norm":
        return Case(kernel, name, norm_inputs(rows, columns))
    return Case(kernel, name, lambda draw: {"x": draw.rows(rows, columns)})
