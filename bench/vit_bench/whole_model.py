"""A whole ViT as a correctness case: class logits through the kernels against the same model in float64."""

from __future__ import annotations

import copy

import torch

from vit_bench import tolerance
from vit_bench.draw import Draw
from vit_engine import ViT, ViTConfig

# Small enough for the interpreter, and with everything that ViTs have: registers, LayerScale, a width with a tail.
SMALL = ViTConfig(
    image_size=32,
    patch_size=8,
    embed_dim=96,
    depth=2,
    num_heads=3,
    num_register_tokens=2,
    layer_scale=0.5,
    num_classes=10,
)


# How the libraries name their tokens and position embeddings, which are as large as what they are added to.
_TOKENS = ("token", "pos_embed", "pos_embedding", "position_embedding", "class_embedding", "probe", "latent")


@torch.no_grad()
def redraw(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter values that matter (see `vit_bench.draw`), in place."""
    draw = Draw(torch.float32, "cpu", seed)
    for name, parameter in sorted(model.named_parameters()):
        if name.rpartition(".")[2].removesuffix("s").endswith(_TOKENS) or "position_embedding" in name:
            value = draw.normal(*parameter.shape)
        elif name.endswith(".bias"):
            value = draw.bias(parameter.shape[0])
        elif name.endswith(".gamma"):
            value = draw.layer_scale(parameter.shape[0])
        elif parameter.dim() == 1:
            value = draw.gamma(parameter.shape[0])
        else:
            value = draw.weight(*parameter.shape)
        parameter.copy_(value)


@torch.inference_mode()
def run_model(
    config: ViTConfig, dtype: torch.dtype, device: str | torch.device, backend: str, batch: int = 2, seed: int = 0
) -> tolerance.Errors:
    """Logits [batch, num_classes] on `backend`, judged by the tolerance rule; AssertionError if they miss it.

    Eager PyTorch in the same dtype sets the allowance, the same model in float64 is the truth, both on the CPU.
    """
    model = ViT(config, backend="torch").eval()
    redraw(model, seed)
    model = model.to(dtype)
    truth_model = copy.deepcopy(model).double()
    images = Draw(dtype, "cpu", seed + 1).normal(batch, config.in_channels, *config.image_hw)
    eager, truth = model(images), truth_model(images.double())
    ours = model.set_backend(backend).to(device)(images.to(device))
    return tolerance.check(ours.cpu(), eager, truth, name=f"ViT of width {config.embed_dim}, depth {config.depth}")
