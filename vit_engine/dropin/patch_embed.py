"""timm's PatchEmbed on its own: where the model puts tokens and positions together in its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..class_code import replaced
from .attached import TRACED_BY_FX, Attached, differentiable, traced_by_fx, wants_gradient
from .describe import Unsupported
from .stem import check_images, patch_convolution, whole_patches

__all__ = ["TIMM_PATCHES", "FusedPatchEmbed", "check_timm_images"]

TIMM_PATCHES = "timm.layers.patch_embed.PatchEmbed"


def check_timm_images(embed: Any, conv: nn.Conv2d, images: Any) -> None:
    """TypeError or ValueError unless these are images for this PatchEmbed, by timm's own rules."""
    check_images(images, conv)
    height, width = images.shape[-2:]
    if embed.img_size is None:
        return
    if embed.strict_img_size and (height, width) != tuple(embed.img_size):
        raise ValueError(f"images must be {tuple(embed.img_size)} pixels (H, W), got {(height, width)}")
    ph, pw = embed.patch_size
    if not embed.strict_img_size and not embed.dynamic_img_pad and (height % ph or width % pw):
        raise ValueError(f"images must have a size that patches of {(ph, pw)} divide, got {(height, width)}")


class FusedPatchEmbed(Attached):
    """Stands in for the forward() of timm's PatchEmbed, up to its norm."""

    def _conv(self) -> nn.Conv2d | str:
        if replaced(type(self.module)):
            return "PatchEmbed.forward was replaced on the class"
        try:
            return patch_convolution(self.module, "proj")
        except Unsupported as refusal:
            return str(refusal)

    def why_not(self, conv: nn.Conv2d, x: Tensor) -> str | None:
        embed: Any = self.module
        if embed.dynamic_img_pad:
            return "it pads images (dynamic_img_pad)"
        if not embed.flatten and str(embed.output_fmt.value) != "NHWC":
            return f"its output has the format {embed.output_fmt.value}"
        if embed.training and wants_gradient(embed, x):
            return "training: gradients"
        return self.unavailable(x, conv.weight)

    def __call__(self, x: Tensor) -> Tensor:
        embed: Any = self.module
        if traced_by_fx(x):
            return self.instead(TRACED_BY_FX, x)
        conv = self._conv()
        if isinstance(conv, str):
            return self.instead(conv, x)
        check_timm_images(embed, conv, x)
        why = self.why_not(conv, x)
        if why is not None:
            return self.instead(why, x)
        if torch.compiler.is_compiling():
            return embed.norm(self._tokens(conv, x))
        self.why = None
        if wants_gradient(embed, x):
            return differentiable(lambda images: embed.norm(self._tokens(conv, images)), self.original, embed, x)
        tokens = self.replays.run("patches", embed, (x,), lambda: (self._tokens(conv, x),))[0]
        return embed.norm(tokens)

    def _tokens(self, conv: nn.Conv2d, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> [B, N, D], or [B, H / Ph, W / Pw, D] where the model asks for the grid."""
        tokens = ops.patch_embed(whole_patches(images, conv), conv.weight, conv.bias)
        assert isinstance(tokens, Tensor)
        if self.module.flatten:
            return tokens
        (height, width), (ph, pw) = images.shape[-2:], conv.kernel_size
        return tokens.view(-1, height // ph, width // pw, tokens.shape[-1])

    def report(self) -> tuple[str, str | None]:
        conv = self._conv()
        if isinstance(conv, str):
            return "", conv
        return "patch_embed", self.why_not(conv, conv.weight) or self.why
