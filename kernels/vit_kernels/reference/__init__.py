"""The formulas of the kernels, written down in plain torch, one step a line.

For tests and verification only; no forward pass comes through here. Every function works in the dtype of its inputs:
called with float64 it is the truth, called with a model's own dtype it is what eager PyTorch would have returned,
rounded after each operation that eager rounds after and nowhere else. Weights are the unfolded ones of the model.
"""

from .attention import attention, attention_packed
from .linear import ACTIVATIONS, activate, linear
from .mlp import mlp
from .norm import layer_norm, row_stats
from .patch_embed import patch_embed
from .qk_rope import qk_rope

__all__ = [
    "ACTIVATIONS",
    "activate",
    "attention",
    "attention_packed",
    "layer_norm",
    "linear",
    "mlp",
    "patch_embed",
    "qk_rope",
    "row_stats",
]
