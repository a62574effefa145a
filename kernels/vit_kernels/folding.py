"""LayerNorm folded into the linear layer that follows it.

With W' = W diag(gamma) (I - 1 1^T / K), c_n = sum_k W'_nk and d = W beta + b:

    LN(x) W^T + b = rstd (x W'^T - mean c) + d          (RMSNorm: W' = W diag(gamma), mean = 0)

so the matrix product runs on x itself and the normalisation is left to its epilogue. The rows of W' are centred, which
changes nothing in exact arithmetic, because x - mean is: so a common offset of a row of x is not in x W'^T in the first
place, and a kernel may round that product to 16 bits before it subtracts the rest of the offset, mean c. That is as
little as the rounding of W' leaves of c.
"""

from __future__ import annotations

import torch

from .checks import check_choice, check_floating, check_same_device, check_vector


def fold_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None = None,
    *,
    kind: str = "layer",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fold the affine part of a LayerNorm or RMSNorm into the weights of the linear layer behind it.

    weight [N, K], bias [N] or None; norm_weight (gamma) and norm_bias (beta) [K] or None; kind "layer" or "rms".
    Returns (W' [N, K] in the dtype of weight, c [N] fp32, d [N] fp32) for `linear(x, W', d, norm=kind, column_sum=c)`.

    c is summed from the *rounded* W': a common offset of a row of x then cancels exactly, as it does in LayerNorm.
    Raises TypeError or ValueError that names the argument.
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
    folded = (scaled - scaled.mean(1, keepdim=True) if kind == "layer" else scaled).to(weight.dtype)
    column_sum = folded.float().sum(1)
    shift = torch.zeros(n, device=weight.device) if norm_bias is None else wide @ norm_bias.float()
    return folded, column_sum, shift if bias is None else shift + bias.float()
