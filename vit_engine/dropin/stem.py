"""From images to tokens in one launch, whoever's modules hold the parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..derived import DerivedCache
from ..encoder_block import Source, read
from .describe import Unsupported, class_name, dtype_name
from .structure import foreign_code, plain

__all__ = ["Stem", "check_images", "patch_convolution", "run_stem", "whole_patches"]


@dataclass(frozen=True)
class Stem:
    """conv: the patch projection. prefix: class and register tokens in their order, each [..., D].

    position: (height, width of the image) -> rows [L, D] for the patches or [R + L, D] for all tokens, None for none;
    computed again when one of `position_sources` changes, unless it is a view of one: then `derive` is False.
    """

    conv: nn.Conv2d
    prefix: tuple[Source, ...] = ()
    position: Callable[[int, int], Tensor] | None = None
    position_sources: tuple[Source, ...] = ()
    derive: bool = False

    def __post_init__(self) -> None:
        for module, name in (*self.prefix, *self.position_sources):
            tensor = getattr(module, name)
            if not plain(tensor):
                kind = type(tensor).__name__
                raise Unsupported(f"{name} is a {kind}, expected a plain Parameter", changed=True)
            if tensor.dtype != self.conv.weight.dtype:
                kinds = dtype_name(tensor.dtype), dtype_name(self.conv.weight.dtype)
                raise Unsupported(f"{name} is {kinds[0]}, the patch projection {kinds[1]}", changed=True)


def patch_convolution(parent: nn.Module, name: str) -> nn.Conv2d:
    """The child of that name, which must be a plain convolution whose stride is its kernel."""
    conv: Any = getattr(parent, name)
    if class_name(conv) != "torch.nn.modules.conv.Conv2d":
        changed = isinstance(conv, nn.Conv2d) or "Conv" not in class_name(conv)
        raise Unsupported(f"{name} is {class_name(conv)}, expected torch.nn.Conv2d", changed=changed)
    foreign = foreign_code(conv)
    if foreign is not None or conv._forward_hooks or conv._forward_pre_hooks or "forward" in vars(conv):
        raise Unsupported(f"{name}: {foreign or 'it has a hook or a forward() of its own'}", changed=True)
    if tuple(conv.weight.shape[2:]) != conv.kernel_size:
        size = tuple(conv.weight.shape[2:])
        raise Unsupported(f"{name} has weights of {size} pixels for its kernel_size {conv.kernel_size}", changed=True)
    padded = conv.padding not in ((0, 0), "valid")
    if conv.stride != conv.kernel_size or padded or conv.groups != 1 or conv.dilation != (1, 1):
        raise Unsupported(f"{name} must be a convolution of patches that touch and do not overlap, got {conv}")
    return conv


def check_images(images: Any, conv: nn.Conv2d, cast: bool = False) -> None:
    """TypeError or ValueError unless these are images for this projection. cast: the model casts them itself."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    channels = conv.weight.shape[1]  # what counts where somebody has put other weights in
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images must have shape [B, {channels}, H, W], got {tuple(images.shape)}")
    if not images.is_floating_point() and not cast:
        raise TypeError(f"images must be floating point and normalised, got {images.dtype}")
    weight = conv.weight
    if images.device != weight.device:
        raise ValueError(f"images must be on the model's device {weight.device}, got {images.device}")
    if images.dtype != weight.dtype and not cast and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(f"images must have the model's dtype {weight.dtype}, got {images.dtype}")


def whole_patches(images: Tensor, conv: nn.Conv2d) -> Tensor:
    """images without what is left behind the last whole patch."""
    (height, width), (ph, pw) = images.shape[-2:], conv.kernel_size
    if height % ph or width % pw:
        return images[:, :, : height // ph * ph, : width // pw * pw]
    return images


def run_stem(stem: Stem, images: Tensor, derived: DerivedCache, name: str) -> tuple[Tensor, Tensor]:
    """images [B, C, H, W] in the dtype of the parameters -> tokens [B, R + L, D] and their row statistics.

    What is left of an image behind the last whole patch is not looked at, as in a convolution.
    """
    conv = stem.conv
    height, width = images.shape[-2:]
    images = whole_patches(images, conv)
    position = None
    if stem.position is not None:
        build = stem.position
        if stem.derive:
            sources = [read(source) for source in stem.position_sources]
            size = height, width, conv.kernel_size
            position = derived.get(f"{name}.position", sources, lambda: (build(height, width),), size)[0]
        else:
            position = build(height, width)
    tokens, stats = ops.patch_embed(
        images, conv.weight, conv.bias, _prefix(stem, derived, name), position, emit_stats=True
    )
    return tokens, stats


def _prefix(stem: Stem, derived: DerivedCache, name: str) -> Tensor | None:
    """The prefix tokens as rows [R, D]."""
    tokens: list[Tensor] = [read(source) for source in stem.prefix]  # type: ignore[misc]
    if not tokens:
        return None
    width = tokens[0].shape[-1]
    if len(tokens) == 1:
        return tokens[0].reshape(-1, width)
    return derived.get(
        f"{name}.prefix", list(tokens), lambda: (torch.cat([token.reshape(-1, width) for token in tokens]),)
    )[0]
