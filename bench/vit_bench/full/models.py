"""Whole models against timm's, by the tolerance rule: PyTorch Image Models wrote the reference, not this project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vit_bench import tolerance
from vit_bench.draw import Draw
from vit_bench.whole_model import redraw
from vit_engine import ViT, ViTConfig

CLASSES = 1000
SHRUNKEN = ViTConfig(image_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=3, num_classes=10)


@dataclass
class Pair:
    """The same parameters in both, redrawn so that each of them matters, on the CPU and in one dtype."""

    ours: ViT
    theirs: torch.nn.Module
    config: ViTConfig
    dtype: torch.dtype

    def images(self, batch: int, seed: int = 1) -> torch.Tensor:
        """Normalised images [batch, C, H, W] ~ N(0, 1) on the CPU."""
        return Draw(self.dtype, "cpu", seed).normal(batch, self.config.in_channels, *self.config.image_hw)


def pair(name: str, dtype: torch.dtype, seed: int = 0) -> Pair:
    """Ours and timm's of that name in `dtype`, with a classifier whatever the preset has; "shrunken" is a small ViT."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    theirs: Any
    if name == "shrunken":
        config = SHRUNKEN
        theirs = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=3, num_classes=config.num_classes
        )
    else:
        config = ViTConfig.preset(name, num_classes=CLASSES)
        theirs = timm.create_model(name, num_classes=CLASSES)
    redraw(theirs, seed)
    theirs = theirs.eval().to(dtype)
    ours = ViT(config, backend="torch").eval().to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return Pair(ours, theirs, config, dtype)


def judge(models: Pair, logits: torch.Tensor, images: torch.Tensor, name: str) -> tolerance.Errors:
    """Our logits [B, classes] for `images` against timm in float64; AssertionError if they miss the tolerance.

    timm in the models' dtype sets the allowance; both references run on the CPU (see `vit_bench.cases.run_case`).
    timm's model is left in float64, because the largest one takes too much memory to be kept twice.
    """
    references = []
    for dtype in (models.dtype, torch.float64):
        theirs = models.theirs.to(dtype)
        with torch.inference_mode():
            references.append(theirs(images.to(dtype)))
    eager, truth = references
    return tolerance.check(logits.cpu(), eager, truth, name=name)


def parity(name: str, dtype: torch.dtype, device: str, backend: str) -> tolerance.Errors:
    """Logits of two images from our model on `backend`, judged."""
    models = pair(name, dtype)
    images = models.images(2)
    ours = models.ours.set_backend(backend).to(device)
    with torch.inference_mode():
        logits = ours(images.to(device))
    return judge(models, logits, images, f"{name}, backend {backend}")
