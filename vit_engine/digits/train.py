"""Train the bundled digit classifier: ``python -m vit_engine.digits.train --seed 0 --out DIR``.

Two runs with one recipe. The first fits the training part and is judged on the validation part: that figure is what the
recipe below was chosen by. The second fits training and validation parts together and becomes the checkpoint; the
held-out part is classified once, at the very end.

Reproducible: one thread and deterministic algorithms, every random number from ``--seed``. On one machine and one
version of PyTorch the checkpoint comes out identical to the bit; other processors or versions round sums differently,
so there the weights differ, and the accuracies by an image or so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ..checkpoint import CONFIG_KEY, load_model
from ..config import ViTConfig
from ..vit import ViT
from . import CHECKPOINT, TRAINING, data

ARCHITECTURE: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "num_register_tokens": 1,
    "layer_scale": 0.5,
    "num_classes": 10,
}


@dataclass(frozen=True)
class Recipe:
    """How the model is trained. Lengths are in pixels of the 8 x 8 image, angles in degrees."""

    epochs: int = 80
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 5
    label_smoothing: float = 0.1
    average_decay: float = 0.99
    max_shift: float = 0.75
    max_rotation: float = 12.0
    max_scale: float = 0.12
    max_shear: float = 0.12
    noise: float = 0.05


def augment(images: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """Small random shifts, rotations, scalings and shears of [B, 1, H, W] images in [0, 1] (paper is 0), and noise."""

    def uniform(limit: float, *shape: int) -> torch.Tensor:
        return (torch.rand(len(images), *shape, generator=generator) * 2 - 1) * limit

    angle = uniform(math.radians(recipe.max_rotation))
    shear, scale = uniform(recipe.max_shear), torch.exp(uniform(math.log1p(recipe.max_scale), 2))
    cos, sin = torch.cos(angle), torch.sin(angle)
    matrix = torch.empty(len(images), 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = cos * scale[:, 0], (shear - sin) * scale[:, 1]
    matrix[:, 1, 0], matrix[:, 1, 1] = sin * scale[:, 0], cos * scale[:, 1]
    matrix[:, :, 2] = uniform(recipe.max_shift * 2 / images.shape[-1], 2)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="zeros", align_corners=False).clamp(0, 1)
    return (moved + torch.randn(images.shape, generator=generator) * recipe.noise).clamp(0, 1)


def fit(
    model: ViT,
    images: np.ndarray,
    labels: np.ndarray,
    recipe: Recipe,
    seed: int,
    report: Callable[[str], None] = lambda line: None,
) -> ViT:
    """Train on uint8 images [N, H, W]; the model ends with the moving average of its weights, in evaluation mode."""
    mean, std = model.patch_embed.mean, model.patch_embed.std
    assert mean is not None
    assert std is not None
    inputs, targets = torch.from_numpy(images).unsqueeze(1).float() / 255, torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout and stochastic depth draw from the global generator
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
    steps_per_epoch = math.ceil(len(inputs) / recipe.batch_size)
    total, warmup = recipe.epochs * steps_per_epoch, recipe.warmup_epochs * steps_per_epoch

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    average = [p.detach().clone() for p in model.parameters()]
    model.train()
    for epoch in range(recipe.epochs):
        losses = []
        for rows in torch.randperm(len(inputs), generator=generator).split(recipe.batch_size):
            batch = (augment(inputs[rows], recipe, generator) - mean[:, None, None]) / std[:, None, None]
            loss = F.cross_entropy(model(batch), targets[rows], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            for slow, parameter in zip(average, model.parameters(), strict=True):
                slow.lerp_(parameter.detach(), 1 - recipe.average_decay)
        if (epoch + 1) % 10 == 0:
            report(f"epoch {epoch + 1}/{recipe.epochs}  loss {sum(losses) / len(losses):.4f}")
    with torch.no_grad():
        for slow, parameter in zip(average, model.parameters(), strict=True):
            parameter.copy_(slow)
    return model.eval()


def build(images: np.ndarray, seed: int) -> ViT:
    """A new model, its input constants those of ``images``.

    Weights of the blocks are drawn after Glorot and Bengio (2010): at this width the usual deviation of 0.02 leaves the
    signal so small that training takes several times as long to get going.
    """
    mean, std = float(images.mean()) / 255, float(images.std()) / 255
    torch.manual_seed(seed)
    model = ViT(ViTConfig(**ARCHITECTURE, mean=round(mean, 4), std=round(std, 4)), backend="torch")
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return model


def count_wrong(model: ViT, images: np.ndarray, labels: np.ndarray) -> int:
    """How many uint8 images [N, H, W] the model classifies wrongly."""
    with torch.no_grad():
        found = model(torch.from_numpy(images).unsqueeze(1)).argmax(1)
    return int((found.numpy() != labels).sum())


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """One thread and deterministic algorithms: sums are then always taken in the same order."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@reproducible()
def train(out: Path, seed: int, recipe: Recipe, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Both runs; writes the checkpoint and ``training.json`` to ``out`` and returns what the latter holds."""
    images, labels = data.load()
    rows = data.split(labels)

    def judged(model: ViT, part: np.ndarray) -> dict[str, Any]:
        wrong = count_wrong(model, images[part], labels[part])
        return {"images": len(part), "wrong": wrong, "accuracy": round(1 - wrong / len(part), 6)}

    report(f"run 1: {len(rows.train)} images to train, {len(rows.validation)} to validate")
    model = fit(build(images[rows.train], seed), images[rows.train], labels[rows.train], recipe, seed, report)
    validation = judged(model, rows.validation)
    report(f"validation: {validation}")

    both = np.sort(np.concatenate([rows.train, rows.validation]))
    report(f"run 2: {len(both)} images to train")
    model = fit(build(images[rows.train], seed), images[both], labels[both], recipe, seed, report)
    out.mkdir(parents=True, exist_ok=True)
    path = out / CHECKPOINT.name
    # safetensors writes the strings of its header in a random order: with a single one, equal weights are equal files.
    save_file(model.state_dict(), path, metadata={CONFIG_KEY: json.dumps(model.config.to_dict())})
    heldout = judged(load_model(path, backend="torch"), rows.heldout)
    report(f"held out: {heldout}")

    summary: dict[str, Any] = {
        "data": "scikit-learn load_digits",
        "split_seed": data.SPLIT_SEED,
        "seed": seed,
        "train_images": len(rows.train),
        "validation": validation,
        "heldout": heldout,
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint_bytes": path.stat().st_size,
        "checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "config": model.config.to_dict(),
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "scikit-learn")},
        },
        "machine": platform.machine(),
    }
    (out / TRAINING.name).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Train the bundled digit classifier.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and training.json")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    train(options.out, options.seed, Recipe())
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
