"""Named faults of accelerated models: what stands in for a library's code, and when it must not."""

from __future__ import annotations

ATTACHED = {
    "statistics-of-other-values": (
        "A hook or a loop writes into tokens between two blocks.",
        "last[0]() is not tokens or last[1] != tokens._version",
        "last[0]() is not tokens",
    ),
    "autocast-unseen": (
        "float32 results where the library's are in the dtype of autocast.",
        "if x.device.type != \"meta\" and torch.is_autocast_enabled(x.device.type):",
        "if False:",
    ),
}

STRUCTURE = {
    "hooks-inside-a-block-left-out": (
        "A hook on the attention or the MLP of a block that runs as a whole.",
        "if not listens(hook):",
        "if False:",
    ),
}

PARTS = {
    "dropout-left-out": (
        "Training with dropout through kernels that have none.",
        "if any(part.training for part in block.random):\n            return",
        "if False:\n            return",
    ),
}

TIMM_BLOCKS = {
    "neighbours-for-halves": (
        "DINOv3 turns halves of a head, EVA-02 neighbours.",
        "interleaved=not attn.rotate_half",
        "interleaved=attn.rotate_half",
    ),
    "sine-for-cosine": (
        "timm keeps the sine in front of the cosine.",
        "sin, cos = rope.chunk(2, dim=-1)",
        "cos, sin = rope.chunk(2, dim=-1)",
    ),
    "gate-and-value-swapped": (
        "SwiGLU with its two layers the other way round.",
        'linear(block, "mlp.fc1_g", "mlp.fc1_x")',
        'linear(block, "mlp.fc1_x", "mlp.fc1_g")',
    ),
}

TRANSFORMERS_BLOCKS = {
    "attentions-left-out": (
        "output_attentions=True gives an empty tuple.",
        'return f"output_{wanted[0]}: they are not computed by the kernels" if wanted else None',
        "return None",
    ),
}

STEM = {
    "positions-of-the-first-size": (
        "Images of another size get the positions that were resized for the first.",
        "size = height, width, conv.kernel_size",
        "size = (conv.kernel_size,)",
    ),
}

TRANSFORMERS_STEMS = {
    "positions-for-registers": (
        "DINOv2's register tokens have no positions: those of the patches are not theirs.",
        "table.new_zeros(registers, table.shape[1])",
        "table[1 : 1 + registers]",
    ),
}

FINGERPRINT = {
    "hooks-left-out-of-replays": (
        "A hook added after a pass of that shape was noted.",
        "            and self._hooks_hold()\n",
        "",
    ),
    "modes-left-out-of-replays": (
        "model.train() after a pass of that shape was noted.",
        "            and list(map(_mode, self._attributes)) == self._modes\n",
        "",
    ),
}

PASSES = {
    "random-numbers-kept": (
        "ViTMAE hides the same patches in every repeated pass.",
        "if is_random(func, args, kwargs) or any(",
        "if any(",
    ),
    "shapes-that-depend-on-values": (
        "Another mask of VideoMAE leaves another number of patches.",
        "if _depends_on_values(func, args):",
        "if False:",
    ),
    "buffers-written-in-silence": (
        "A counter in a library's code stands still.",
        "elif all(tensor.untyped_storage()._cdata in self._fresh for tensor in written_by(func, args, kwargs)):",
        "elif True:",
    ),
}

REPEATED = {
    "statistics-of-the-noted-pass": (
        "The row statistics that a stem hands over are no argument of the loop over the blocks.",
        "        self.state.forget_statistics()\n",
        "",
    ),
    "originals-repeated": (
        "What a part that runs its original code depends on is not known.",
        "if isinstance(found, Attached) and found is not self and found.why is not None:",
        "if False:",
    ),
}

FAULTS = {
    "vit_engine/dropin/attached.py": ATTACHED,
    "vit_engine/dropin/structure.py": STRUCTURE,
    "vit_engine/dropin/parts.py": PARTS,
    "vit_engine/dropin/timm_blocks.py": TIMM_BLOCKS,
    "vit_engine/dropin/transformers_blocks.py": TRANSFORMERS_BLOCKS,
    "vit_engine/dropin/stem.py": STEM,
    "vit_engine/dropin/transformers_stems.py": TRANSFORMERS_STEMS,
    "vit_engine/fingerprint.py": FINGERPRINT,
    "vit_engine/passes.py": PASSES,
    "vit_engine/dropin/repeated.py": REPEATED,
}
