"""The least time that arithmetic and memory allow: FLOP and bytes of each launch over the peaks of a GPU's datasheet.

FLOP are those of matrix products, a multiply-add being two, over what the result needs: no padding, no elementwise work
(published figures for models count the same). Bytes count every operand once: activations, weights, statistics,
results, each as if it came from and went to the GPU's memory. What stays in the L2 cache from one launch to the next
is cheaper than that, so a launch whose operands fit there may beat its memory time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vit_kernels.device import A100, B200, H100, H200, RTX_3090, RTX_4090, RTX_5090, Device


@dataclass(frozen=True)
class Peaks:
    """half: dense FLOP/s of fp16 and bf16 products with fp32 sums, on tensor cores; single: FLOP/s of fp32 without
    them; bandwidth: bytes/s of the GPU's memory."""

    half: float
    single: float
    bandwidth: float


PEAKS = {
    # NVIDIA A100 datasheet, 80 GB SXM
    A100: Peaks(312e12, 19.5e12, 2.039e12),
    # NVIDIA Ampere GA102 whitepaper, GeForce RTX 3090
    RTX_3090: Peaks(71e12, 35.6e12, 0.936e12),
    # NVIDIA Ada whitepaper, GeForce RTX 4090
    RTX_4090: Peaks(165.2e12, 82.6e12, 1.008e12),
    # NVIDIA H100 datasheet, SXM: 1,979 TFLOP/s with sparsity
    H100: Peaks(989.4e12, 66.9e12, 3.35e12),
    # NVIDIA H200 datasheet, SXM
    H200: Peaks(989.4e12, 66.9e12, 4.8e12),
    # NVIDIA HGX B200 datasheet, one GPU: 4.5 PFLOP/s with sparsity
    B200: Peaks(2250e12, 75e12, 7.7e12),
    # NVIDIA RTX Blackwell whitepaper, GeForce RTX 5090
    RTX_5090: Peaks(209.5e12, 104.8e12, 1.792e12),
}


@dataclass(frozen=True)
class Roofline:
    """Least seconds for `flops` and for `bytes`; bound: "compute" or "memory", whichever takes longer."""

    flops: int
    bytes: int
    compute_s: float
    memory_s: float

    @property
    def bound(self) -> str:
        return "compute" if self.compute_s > self.memory_s else "memory"

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.compute_s, self.memory_s)


def gemm_flops(m: int, n: int, k: int) -> int:
    """x [m, k] times weights [k, n]."""
    return 2 * m * n * k


def attention_flops(batch: int, heads: int, queries: int, keys: int, width: int) -> int:
    """Scores q k^T and results p v of every head."""
    return 2 * gemm_flops(queries, keys, width) * batch * heads


def mlp_flops(m: int, width: int, hidden: int, *, gated: bool = False) -> int:
    """fc1 (twice `hidden` outputs when gated) and fc2."""
    return gemm_flops(m, hidden, width) * (3 if gated else 2)


def operand_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of these tensors, one that is given twice counted once; a view counts its own elements."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def roofline(flops: int, size: int, dtype: torch.dtype, device: Device) -> Roofline:
    """Both times of work of `flops` FLOP in `dtype` and `size` bytes. Raises ValueError for a GPU without peaks."""
    if device not in PEAKS:
        raise ValueError(f"device must be one of {', '.join(d.name for d in PEAKS)}; got {device.name!r}")
    peaks = PEAKS[device]
    rate = peaks.single if dtype == torch.float32 else peaks.half
    return Roofline(flops, size, flops / rate, size / peaks.bandwidth)


PRODUCTS = (
    "linear_kernel", "linear_tma_kernel", "linear_roles_kernel", "linear_staying_kernel", "linear_columns_kernel",
    "linear_parts_kernel",
)  # fmt: skip


def launch_flops(kernel: str, arguments: Mapping[str, Any]) -> int:
    """FLOP of one launch, from the kernel's name and its arguments as they were passed.

    Raises ValueError for a kernel that has no formula here.
    """
    a = arguments
    gated = a.get("ACTIVATION") == "swiglu"
    if kernel in PRODUCTS:
        return gemm_flops(a["M"], a["N"] * (2 if gated else 1), a["K"])
    if kernel == "patch_embed_kernel":
        # The class and register tokens of each image are no patches.
        return gemm_flops(a["M"] // a["T"] * (a["T"] - a["PREFIX"]), a["N"], a["K"])
    if kernel == "patch_embed_blocks_kernel":
        return gemm_flops(a["batch"] * a["grid_h"] * a["grid_w"], a["N"], a["K"])
    if kernel == "attention_kernel":
        batch, queries, heads, width = a["q_ptr"].shape
        return attention_flops(batch, heads, queries, a["keys"], width)
    if kernel in ("attention_whole_kernel", "attention_roles_kernel"):
        batch, queries, columns = a["q_desc"].shape
        return attention_flops(batch, a["heads"], queries, a["keys"], columns // a["heads"])
    if kernel in ("mlp_kernel", "mlp_roles_kernel"):
        return mlp_flops(a["M"], a["WIDTH"], a["HIDDEN"], gated=gated)
    if kernel in ("layer_norm_kernel", "linear_sum_kernel", "row_stats_kernel", "qk_rope_kernel"):
        return 0
    raise ValueError(f"kernel {kernel!r} has no formula for its FLOP in vit_bench.roofline")
