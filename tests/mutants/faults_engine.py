"""Named faults of the launch path and of what the engine builds on the kernels: see named.py."""

from __future__ import annotations

LAUNCH = {
    "no-device-guard": (
        "Triton launches on the current device, whatever its arguments say.",
        "with launching_on(on):",
        "with contextlib.nullcontext():",
    ),
    "guard-for-device-0": (
        "The first GPU instead of the tensor's own.",
        "return torch.cuda.device(tensor.device)",
        "return torch.cuda.device(0)",
    ),
}

CHECKS = {
    "tf32-by-default": (
        "fp32 products at 10 bits unless somebody forbids it.",
        'return "tf32" if tf32 and dtype == torch.float32',
        'return "tf32" if dtype == torch.float32',
    ),
}

DERIVED = {
    "stale-folded-weights": (
        "An optimizer step changes weights in place: same address, other values.",
        "return tensor.data_ptr(), version, tensor.shape",
        "return tensor.data_ptr(), tensor.shape",
    ),
}

POSITION = {
    "stale-positions": (
        "The same for interpolated position embeddings.",
        "return tensor.data_ptr(), tensor._version, ",
        "return tensor.data_ptr(), 0, ",
    ),
    "corners-aligned": (
        "Interpolation with other cell centres than the weights were trained with.",
        'mode="bicubic", align_corners=False, antialias=True',
        'mode="bicubic", align_corners=True',
    ),
}

FUSED = {
    "second-norm-is-the-first": (
        "fc1 folded with the norm of the attention.",
        "norm2=Norm(block.norm2)",
        "norm2=Norm(block.norm1)",
    ),
    "second-scale-is-the-first": (
        "LayerScale of the attention used twice.",
        "_gamma(block.ls2)",
        "_gamma(block.ls1)",
    ),
}

ENCODER_BLOCK = {
    "eps-of-the-wrong-library": (
        "PyTorch's default of 1e-5 where the model has its own.",
        "column_sum=column_sum, eps=norm.eps",
        "column_sum=column_sum, eps=1e-5",
    ),
    "statistics-one-layer-late": (
        "The norm of a block applied with the statistics of other rows.",
        "norm=norm.kind, stats=stats, column_sum",
        "norm=norm.kind, stats=stats.flip(2), column_sum",
    ),
    "zero-key-bias-in-the-wrong-rows": (
        "Biases of query and value put together without the zeros of the key.",
        "part = rows.new_zeros(rows.shape[0])",
        "continue",
    ),
}

OPS = {
    "fake-statistics-rounded-down": (
        "A traced graph allocates one partial too few.",
        "(columns + 63) // 64",
        "columns // 64",
    ),
    "fake-lse-transposed": (
        "A traced graph sees other axes than the kernel writes.",
        "(batch, heads, queries), dtype=torch.float32",
        "(batch, queries, heads), dtype=torch.float32",
    ),
    "fake-strides-of-the-input": (
        "The result of the kernel is contiguous whatever the strides of its inputs: the fake's must be, too.",
        "out = q.new_empty(q.shape)",
        "out = torch.empty_like(q)",
    ),
    "gradients-refused-by-nobody": (
        "A gradient through a kernel without a backward pass.",
        "_op.register_autograd(_refuse_gradient(_name))",
        "pass",
    ),
}

FAULTS = {
    "kernels/vit_kernels/launch.py": LAUNCH,
    "kernels/vit_kernels/checks.py": CHECKS,
    "vit_engine/derived.py": DERIVED,
    "vit_engine/position.py": POSITION,
    "vit_engine/fused.py": FUSED,
    "vit_engine/encoder_block.py": ENCODER_BLOCK,
    "vit_engine/ops.py": OPS,
}
