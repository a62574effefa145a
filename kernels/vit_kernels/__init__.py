"""Triton kernels for Vision Transformers: patch embedding, attention and what queries and keys go through before it,
linear layers, norms and the MLP, all fused.

Every launcher takes PyTorch tensors on an NVIDIA GPU of compute capability 8.0 or newer (or, with TRITON_INTERPRET=1,
CPU tensors), in fp32, fp16 or bf16, accumulates in fp32 and supports every size. Importing this package touches no GPU.
"""

from .attention import attention
from .attention_packed import attention_packed
from .device import KNOWN_DEVICES, Device, UnsupportedDeviceError, device_of
from .folding import fold_norm
from .launch import accepts, interpreting
from .linear import linear
from .mlp import mlp
from .norm import layer_norm, row_stats
from .patch_embed import patch_embed
from .qk_rope import qk_rope
from .tuned import TunedFileError, forget_tuned, use_tuned

__all__ = [
    "KNOWN_DEVICES",
    "Device",
    "TunedFileError",
    "UnsupportedDeviceError",
    "accepts",
    "attention",
    "attention_packed",
    "device_of",
    "fold_norm",
    "forget_tuned",
    "interpreting",
    "layer_norm",
    "linear",
    "mlp",
    "patch_embed",
    "qk_rope",
    "row_stats",
    "use_tuned",
]
