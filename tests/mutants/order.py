"""Which tests to try first on a fault in a module: those that are likely to notice, quickest first."""

from __future__ import annotations

KERNELS = "tests/kernels"
LARGE = f"{KERNELS}/test_large_offsets.py"

# Beginnings of node ids. A module's first files are its quick tests; whatever they let through meets all default tests.
QUICK: dict[str, tuple[str, ...]] = {
    "attention": (
        f"{KERNELS}/test_attention.py", f"{KERNELS}/test_attention_packed.py", f"{KERNELS}/test_launching.py",
        f"{KERNELS}/test_attention_errors.py",
        f"{LARGE}::test_attention_reads", f"{LARGE}::test_attention_packed_reads",
        f"{LARGE}::test_attention_reads_mask", f"{LARGE}::test_attention_writes",
    ),
    "attention_block": (
        f"{KERNELS}/test_attention.py", f"{KERNELS}/test_launching.py", f"{LARGE}::test_attention_reads",
        f"{LARGE}::test_attention_reads_mask", f"{LARGE}::test_attention_writes",
    ),
    "attention_checks": (
        f"{KERNELS}/test_attention_errors.py", f"{KERNELS}/test_attention.py", f"{KERNELS}/test_attention_packed.py",
    ),
    "attention_tiles": (f"{KERNELS}/test_attention.py",),
    "checks": (
        f"{KERNELS}/test_errors.py", f"{KERNELS}/test_attention_errors.py", f"{KERNELS}/test_launching.py",
        f"{KERNELS}/test_linear.py",
    ),
    "folding": (f"{KERNELS}/test_folding.py", f"{KERNELS}/test_errors.py", f"{KERNELS}/test_linear.py"),
    "launch": (f"{KERNELS}/test_launching.py", f"{KERNELS}/test_norm.py", "tests/engine/test_replay.py"),
    "linear": (
        f"{KERNELS}/test_linear.py", f"{KERNELS}/test_launching.py", f"{KERNELS}/test_errors.py",
        f"{KERNELS}/test_linear_columns.py", f"{KERNELS}/test_linear_staying.py",
        f"{LARGE}::test_linear_reads", f"{LARGE}::test_linear_writes_rows",
    ),
    "linear_epilogue": (
        f"{KERNELS}/test_linear.py", f"{LARGE}::test_linear_reads", f"{LARGE}::test_linear_writes_rows",
    ),
    "linear_kernels": (
        f"{KERNELS}/test_linear.py", f"{LARGE}::test_linear_reads", f"{LARGE}::test_linear_writes_rows",
    ),
    "linear_parts": (f"{KERNELS}/test_linear_parts.py",),
    "mlp": (
        f"{KERNELS}/test_mlp.py", f"{KERNELS}/test_launching.py", f"{KERNELS}/test_errors.py",
        f"{LARGE}::test_mlp_reads", f"{LARGE}::test_mlp_writes_rows",
    ),
    "norm": (
        f"{KERNELS}/test_norm.py", f"{KERNELS}/test_launching.py", f"{KERNELS}/test_errors.py",
        f"{LARGE}::test_layer_norm_reads", f"{LARGE}::test_layer_norm_writes_rows",
    ),
    "patch_embed": (
        f"{KERNELS}/test_patch_embed.py", f"{KERNELS}/test_launching.py", f"{KERNELS}/test_errors.py",
        f"{LARGE}::test_patch_embed_reads_images", f"{LARGE}::test_patch_embed_reads_parameters",
    ),
    "primitives": (
        f"{KERNELS}/test_linear.py", f"{KERNELS}/test_norm.py", f"{KERNELS}/test_mlp.py",
        f"{LARGE}::test_linear_reads_statistics", f"{LARGE}::test_linear_writes_statistics",
    ),
    "qk_rope": (
        f"{KERNELS}/test_qk_rope.py", f"{KERNELS}/test_launching.py", f"{KERNELS}/test_attention_errors.py",
        f"{LARGE}::test_qk_rope_reads", f"{LARGE}::test_qk_rope_writes",
    ),
    "qk_rope_checks": (f"{KERNELS}/test_attention_errors.py", f"{KERNELS}/test_qk_rope.py"),
    "fused": ("tests/engine/test_fused.py",),
    "encoder_block": ("tests/engine/test_fused.py", "tests/dropin/test_parity.py"),
    "attached": ("tests/dropin/test_modes.py",),
    "structure": ("tests/dropin/test_user_changes.py",),
    "parts": ("tests/dropin/test_modes.py",),
    "timm_blocks": ("tests/dropin/test_parity.py",),
    "transformers_blocks": ("tests/dropin/test_transformers_calls.py",),
    "stem": ("tests/dropin/test_timm_methods.py", "tests/dropin/test_transformers_calls.py"),
    "transformers_stems": ("tests/dropin/test_parity.py",),
    "fingerprint": ("tests/engine/test_fingerprint.py", "tests/engine/test_replay.py", "tests/dropin/test_replays.py"),
    "passes": ("tests/engine/test_passes.py",),
    "repeated": ("tests/dropin/test_repeated.py",),
    "derived": ("tests/engine/test_fused.py",),
    "ops": ("tests/engine/test_ops.py", "tests/engine/test_fused.py"),
    "position": ("tests/engine/test_position.py", "tests/engine/test_fused.py"),
}  # fmt: skip
# Within the quick tests: many features at once, on small tensors.
EAGER = (
    f"{KERNELS}/test_attention.py::test_conditions_add_up",
    f"{KERNELS}/test_attention.py::test_the_smallest_tile",
    f"{KERNELS}/test_attention.py::test_masks_over_many_tiles",
    f"{KERNELS}/test_attention.py::test_grouped_heads",
    f"{KERNELS}/test_attention.py::test_queries_and_keys_of_different_number",
    f"{KERNELS}/test_attention.py::test_odd_head_widths",
    f"{KERNELS}/test_linear.py::test_the_smallest_tile",
    f"{KERNELS}/test_linear.py::test_walks_over_tiles_through_tensor_descriptors",
    f"{KERNELS}/test_linear.py::test_swiglu_with_everything",
    f"{KERNELS}/test_linear.py::test_foreign_values_change_no_bit",
    f"{KERNELS}/test_mlp.py::test_the_smallest_tile",
    f"{KERNELS}/test_mlp.py::test_foreign_values_change_no_bit",
    f"{KERNELS}/test_norm.py::test_strides_and_foreign_values_change_no_bit",
    f"{KERNELS}/test_patch_embed.py::test_the_smallest_tile",
    f"{KERNELS}/test_patch_embed.py::test_foreign_values_change_no_bit",
    f"{KERNELS}/test_patch_embed.py::test_bytes",
    f"{KERNELS}/test_qk_rope.py::test_every_option",
    f"{KERNELS}/test_qk_rope.py::test_heads_of_different_number",
    f"{KERNELS}/test_launching.py",
)
# All default tests, but for those that notice any change of the source and so catch nothing: whether a mutant still
# applies, and whether the evidence in the README is that of the source at hand.
ALL = (
    "--ignore=tests/mutants",
    "--deselect=tests/bench/test_dropin_table.py::test_the_committed_readme_is_fresh",
)
ALL_FIRST = (*EAGER, KERNELS, "tests/engine/test_fused.py", "tests/engine/test_ops.py", "tests/engine/test_vit.py")
