"""Tiny models of other libraries, redrawn so that every parameter matters, and how their outputs are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import timm.models.beit
import timm.models.eva
import timm.models.vision_transformer as timm_vit
import torch
import torchvision.models.vision_transformer as torchvision_vit
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vit_engine
from tests.engine.redraw import redraw
from tests.rung import DEVICE

transformers.logging.set_verbosity_error()

SIZE = 32  # pixels, in patches of 8
_TIMM: dict[str, Any] = {
    "img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7,
}  # fmt: skip
_TRANSFORMERS: dict[str, Any] = {
    "image_size": SIZE, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "attn_implementation": "eager",
}  # fmt: skip


def ready(model: nn.Module) -> Any:
    """In eval mode, redrawn, on the device of this run."""
    return redraw(model.eval()).to(DEVICE)


def timm_model(**more: Any) -> Any:
    return ready(timm_vit.VisionTransformer(**{**_TIMM, **more}))


def eva(**more: Any) -> Any:
    """Rotary embeddings, SwiGLU with a norm inside, no key bias."""
    given = {**_TIMM, "use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "mlp_ratio": 2.0, **more}
    return ready(timm.models.eva.Eva(**given))


def beit(**more: Any) -> Any:
    """Relative position bias."""
    given = {**_TIMM, "use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.5, **more}
    return ready(timm.models.beit.Beit(**given))


def torchvision_model(**more: Any) -> Any:
    given = {
        "image_size": SIZE, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64,
        "num_classes": 7,
    }  # fmt: skip
    return ready(torchvision_vit.VisionTransformer(**{**given, **more}))


def hf_vit(model: Any = transformers.ViTModel, **more: Any) -> Any:
    return ready(model(transformers.ViTConfig(**{**_TRANSFORMERS, **more})))


def hf_dinov2(model: Any = transformers.Dinov2Model, **more: Any) -> Any:
    return ready(model(transformers.Dinov2Config(**{**_TRANSFORMERS, "mlp_ratio": 2, **more})))


def hf_clip(**more: Any) -> Any:
    return ready(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**{**_TRANSFORMERS, **more})))


def hf_siglip(**more: Any) -> Any:
    return ready(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**{**_TRANSFORMERS, **more})))


TIMM: dict[str, Callable[..., Any]] = {"timm vit": timm_model, "timm eva": eva, "timm beit": beit}
HF: dict[str, Callable[..., Any]] = {"vit": hf_vit, "dinov2": hf_dinov2, "clip": hf_clip, "siglip": hf_siglip}
ALL: dict[str, Callable[..., Any]] = {**TIMM, "torchvision": torchvision_model, **HF}


def slow_but(names: Iterable[str], *quick: str) -> list[Any]:
    """The names as parameters of a test, marked slow but for the quick ones."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def images(batch: int = 2, size: int | tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    """Normalised images, N(0, 1)."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pair(build: Callable[..., Any], **more: Any) -> tuple[Any, Any]:
    """(the untouched model, an accelerated copy)."""
    model = build(**more)
    return model, vit_engine.accelerate(copy.deepcopy(model))


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output in order, whatever they are packed in."""
    if output is None or isinstance(output, str | bool | int | float):
        return []
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for value in values for t in tensors(value)]


def close(ours: Any, theirs: Any, relative: float = 1e-4) -> None:
    """Same structure, dtypes and shapes, and values within `relative` of the largest magnitude of each tensor."""
    assert type(ours) is type(theirs), (type(ours), type(theirs))
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
    ours, theirs = tensors(ours), tensors(theirs)
    assert theirs and len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (number, a.shape, b.shape, a.dtype, b.dtype)
        scale = b.double().abs().max().clamp_min(1e-30)
        error = (a.double() - b.double()).abs().max() / scale
        assert error <= relative, f"tensor {number} is off by {error:.2g} of its largest magnitude"


def differs(a: Tensor, b: Tensor) -> bool:
    """Whether a change shows: somewhere by more than a hundredth of the largest value, which no rounding of fp32 gives.
    Unlike a tolerance, a larger bound asks for more."""
    return bool((a - b).abs().max() > 1e-2 * b.abs().max())


def close_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """Of every parameter, as `close`, but for those that are 0 but for rounding: of the biases of keys."""
    largest = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
    compared = 0
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        if b.grad.abs().max() > 1e-5 * largest:
            close(a.grad, b.grad)
            compared += 1
    assert compared > 30


def reasons(model: nn.Module) -> dict[str, str]:
    """What explain() says of each module that runs the original code."""
    return {row.module: row.why for row in vit_engine.explain(model).rows if row.kernels == "PyTorch"}


def kernels(model: nn.Module) -> dict[str, str]:
    """What explain() says of each module that runs on kernels."""
    return {row.module: row.kernels for row in vit_engine.explain(model).rows if row.kernels != "PyTorch"}


def launches_of(run: Callable[[], Any]) -> list[str]:
    """Names of the kernels' operators that run() calls, in order."""
    return watched(run)[1]


def watched(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """(what run() returns, the names of the kernels' operators that it calls)."""
    with _Watch() as watch:
        result = run()
    return result, watch.seen


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vit_engine":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))
