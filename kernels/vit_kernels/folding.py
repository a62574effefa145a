"""LayerNorm folded into the linear layer that follows it.

With W' = W diag(gamma) (I - 1 1^T / K), c_n = sum_k W'_nk and d = W beta + b:

    LN(x) W^T + b = rstd (x W'^T - mean c) + d          (RMSNorm: W' = W diag(gamma), mean = 0)

so the matrix product runs on x itself and the normalisation is left to its epilogue. The rows of W' are centred, which
changes nothing in exact arithmetic, because x - mean is: so a common offset of a row of x is not in x W'^T in the first
place, and a kernel may round that product to 16 bits before it subtracts the rest of the offset, mean c. That is as
little as the rounding of W' leaves of c. With a few elements of W' rounded the other way nothing is left of c, and a
kernel has nothing to subtract.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from .checks import check_choice, check_floating, check_same_device, check_vector


@overload
def fold_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None = None,
    *,
    kind: str = "layer",
    sums: Literal[True] = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


@overload
def fold_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None = None,
    *,
    kind: str = "layer",
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]: ...


def fold_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None = None,
    *,
    kind: str = "layer",
    sums: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Fold the affine part of a LayerNorm or RMSNorm into the weights of the linear layer behind it.

        norm(x) weight^T + bias = rstd (x W'^T - mean c) + d        (RMSNorm: without mean)
        W' = weight diag(gamma) (I - 1 1^T / K)                     (RMSNorm: weight diag(gamma))
        c_n = sum_k W'_nk, d = weight beta + bias

    weight [N, K], bias [N] or None; norm_weight (gamma) and norm_bias (beta) [K] or None; kind "layer" or "rms".
    Returns (W' [N, K] in the dtype of weight, c [N] fp32, d [N] fp32) for `linear(x, W', d, norm=kind, column_sum=c)`.

    c is summed from the *rounded* W': a common offset of a row of x then cancels exactly, as it does in LayerNorm.
    sums=False: W' is rounded so that c is nothing (`balanced`), and None is returned for it, with which kernels have
    less to do, unless `keeps_sums`. It takes a quarter of a second for fc1 of ViT-B on one core of a CPU, so it is for
    weights that are folded once.
    Raises TypeError or ValueError that names the argument. It runs on any device: it is PyTorch's operators.
    Source: derived from arXiv 1607.06450, equations 3 and 4, at the top of this file; no paper has it.
    """
    check_choice("kind", kind, ("layer", "rms"))
    check_floating("weight", weight, 2)
    n, k = weight.shape
    check_vector("bias", bias, n, "N, the rows of weight")
    check_vector("norm_weight", norm_weight, k, "K, the columns of weight")
    check_vector("norm_bias", norm_bias, k, "K, the columns of weight")
    check_same_device("weight", weight, {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias})
    wide = weight.float()
    # Contiguous, because the order of a sum, and so its last bit, depends on the layout.
    scaled = (wide if norm_weight is None else wide * norm_weight.float()).contiguous()
    exact = scaled - scaled.mean(1, keepdim=True) if kind == "layer" else scaled
    folded, column_sum = exact.to(weight.dtype), None
    if sums or (kind == "layer" and keeps_sums(k, weight.dtype)):
        column_sum = folded.float().sum(1)
    elif kind == "layer" and weight.dtype != torch.float32:
        folded = balanced(exact, weight.dtype)
    shift = torch.zeros(n, device=weight.device) if norm_bias is None else wide @ norm_bias.float()
    return folded, column_sum, shift if bias is None else shift + bias.float()


# Elements of a row that may be rounded the other way: a few take its sum below the largest step, and each one more
# takes a bit of what is left. Of 512 random rows, at most 1e-4 of the norm is left for K = 64, 3e-6 for 768.
_MOVED = 32
_FEWEST = 64
_MOST_HALF = 1024


def keeps_sums(k: int, dtype: torch.dtype) -> bool:
    """Whether folded LayerNorms over K columns keep their sums: in 16 bits for K < 64, where there are too few elements
    to choose from, and in fp16 for K > 1024, because the compiler spills two registers of a kernel for sm_100 that
    merges so many partial statistics and has nothing to subtract."""
    return dtype != torch.float32 and (k < _FEWEST or (dtype == torch.float16 and k > _MOST_HALF))


def balanced(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """exact [N, K], fp32, in rows that sum to zero, rounded to fp16 or bf16 so that rows still sum to next to nothing.

    Rounded to the nearest, they would sum to about sqrt(K) / 4 steps of an element. Here up to 32 elements of a row are
    one step from the nearest: of those with the largest step that what is left of the sum allows, the one that is
    nearest to the middle between two steps.
    """
    rounded = exact.to(dtype)
    # In float64, which holds sums of 16-bit numbers exactly. All that follows is exact in fp32.
    left = rounded.sum(1, keepdim=True, dtype=torch.float64)
    # The next number on the side where the sum becomes less; zeros stay.
    away = (rounded > 0) == (left < 0)
    moved = (rounded.view(torch.int16) + torch.where(away, 1, -1).to(torch.int16)).view(dtype)
    moved = torch.where((rounded == 0) | ~torch.isfinite(moved), rounded, moved)
    change = moved.float() - rounded.float()
    step = change.abs()
    # What an element has over on that side. Steps are powers of two, so that a quarter of it decides only between equal
    # ones; where it is on the other side, an element comes behind those of half and a quarter of its step.
    over = (exact - rounded.float()) * change.sign()
    worth = torch.where(over < 0, 0.125, 1.0) * step + 0.25 * over
    left = left.abs().float()
    for _ in range(_MOVED):
        best, place = torch.where(step <= left, worth, 0.0).max(1, keepdim=True)
        taken = best > 0
        left = left - torch.where(taken, step.gather(1, place), 0.0)
        rounded.scatter_(1, place, torch.where(taken, moved.gather(1, place), rounded.gather(1, place)))
        step.scatter_(1, place, float("inf"))
    return rounded
