"""The layers of a ViT as plain PyTorch modules, under timm's parameter names.

Equation numbers are those of "An Image is Worth 16x16 Words" (arXiv 2010.11929), section 3.1. These forward methods are
the `torch` backend and the only path for training; the kernels read the same parameters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ViTConfig

__all__ = ["Attention", "Block", "DropPath", "LayerScale", "Mlp", "PatchEmbed", "activate", "init_linear"]


def init_linear(layer: nn.Linear) -> None:
    """Truncated normal weights of standard deviation 0.02 (cut at two deviations), zero bias."""
    nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def activate(x: Tensor, kind: str) -> Tensor:
    """The MLP's nonlinearity; "swiglu" halves the last dimension: silu(first half) * second half (arXiv 2002.05202)."""
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if kind == "silu":
        return F.silu(x)
    if kind == "swiglu":
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
    raise ValueError(f"activate: unknown activation {kind!r}")


class PatchEmbed(nn.Module):
    """Patches to tokens: x_p E + bias, the patch part of equation 1.

    Parameters: proj.weight [D, C, Ph, Pw], proj.bias [D].

    uint8 images are first brought to (pixel / 255 - mean) / std with the config's constants; float images are used as
    they are. mean and std are float32 buffers [C] (float64 in a float64 model) that are no part of the state_dict and
    that conversions to float16 or bfloat16 leave exact.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_hw = config.patch_hw
        self.proj = nn.Conv2d(config.in_channels, config.embed_dim, self.patch_hw, stride=self.patch_hw)
        # A convolution whose windows do not overlap is a linear layer: unit variance in, unit variance out.
        deviation = 1 / math.sqrt(config.in_channels * self.patch_hw[0] * self.patch_hw[1])
        nn.init.trunc_normal_(self.proj.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        nn.init.zeros_(_bias(self.proj))
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("std", None, persistent=False)
        self._set_constants()
        # load_state_dict(assign=True) may move the weight to another device.
        self.register_load_state_dict_post_hook(_set_constants_after_load)

    def _set_constants(self) -> None:
        weight = self.proj.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        for name, values in (("mean", self.config.mean), ("std", self.config.std)):
            if values is not None:
                setattr(self, name, torch.tensor(values, dtype=dtype, device=weight.device))

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # Made anew from the config: .half() and .bfloat16() would round them, .to_empty() would leave them unset.
        self._set_constants()
        return self

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(rows, columns) of patches in these images [B, C, H, W]."""
        return images.shape[-2] // self.patch_hw[0], images.shape[-1] // self.patch_hw[1]

    def check(self, images: Tensor) -> None:
        """Raises ValueError or TypeError, naming what came and what is allowed, unless forward() takes these images."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
        channels, weight, shape = self.config.in_channels, self.proj.weight, images.shape
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(f"images must be [B, {channels}, H, W], got {list(shape)}")
        height, width = shape[2:]
        patch_height, patch_width = self.patch_hw
        if height % patch_height or width % patch_width or not height or not width:
            raise ValueError(
                f"images of {height} x {width} pixels do not divide into patches of {patch_height} x {patch_width}: "
                f"height and width must be positive multiples of {patch_height} and {patch_width}; resize or crop them"
            )
        if images.device != weight.device:
            raise ValueError(
                f"images are on {images.device}, but the model is on {weight.device}: call images.to(device)"
            )
        if images.dtype == torch.uint8 or images.dtype == weight.dtype:
            return
        if not (images.is_floating_point() and torch.is_autocast_enabled(images.device.type)):
            raise TypeError(
                f"images must be {weight.dtype}, as the model's parameters are, or torch.uint8; got {images.dtype}"
            )

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W], uint8 or the parameters' dtype -> tokens [B, (H / Ph) * (W / Pw), D], row by row."""
        self.check(images)
        if images.dtype == torch.uint8:
            weight = self.proj.weight
            images = images.to(torch.float64 if weight.dtype == torch.float64 else torch.float32) / 255
            if self.mean is not None and self.std is not None:
                images = (images - self.mean[:, None, None]) / self.std[:, None, None]
            images = images.to(weight.dtype)
        return self.proj(images).flatten(2).transpose(1, 2)


class LayerScale(nn.Module):
    """x * gamma with one learned factor per channel (arXiv 2103.17239). Parameter: gamma [D]."""

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training mode, an image's whole branch is zeroed at this rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> x * keep / (1 - rate), keep drawn per image from Bernoulli(1 - rate); x itself in eval mode."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class Attention(nn.Module):
    """Multi-head self-attention, the MSA of equation 2 (appendix A: equations 5 to 8).

    Parameters: qkv.weight [3 D, D] (all query rows, then key, then value, each head by head), qkv.bias [3 D] or none,
    proj.weight [D, D], proj.bias [D].
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.scale = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.proj_drop = nn.Dropout(config.dropout)
        init_linear(self.qkv)
        init_linear(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> proj(softmax(q k^T / sqrt(D / H)) v) [B, N, D]."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, width)))


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), the MLP of equation 3.

    Parameters: fc1.weight [M, D], fc1.bias [M], fc2.weight [D, M], fc2.bias [D]. With "swiglu" the first M / 2 rows of
    fc1 give the gate and the others the value (timm's SwiGLUPacked), and fc2.weight is [D, M / 2].
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        inner = config.mlp_hidden // 2 if self.activation == "swiglu" else config.mlp_hidden
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_hidden)
        self.drop1 = nn.Dropout(config.dropout)
        self.fc2 = nn.Linear(inner, config.embed_dim)
        self.drop2 = nn.Dropout(config.dropout)
        init_linear(self.fc1)
        init_linear(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.drop2(self.fc2(self.drop1(activate(self.fc1(x), self.activation))))


class Block(nn.Module):
    """One encoder block, equations 2 and 3: z' = MSA(LN(z)) + z, then MLP(LN(z')) + z'.

    With LayerScale each branch is multiplied by its gamma before it is added; without, ls1 and ls2 are Identity.
    """

    def __init__(self, config: ViTConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.layer_scale
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, N, D] -> [B, N, D]."""
        z = z + self.drop_path1(self.ls1(self.attn(self.norm1(z))))
        return z + self.drop_path2(self.ls2(self.mlp(self.norm2(z))))


def _set_constants_after_load(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, PatchEmbed)
    module._set_constants()


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
