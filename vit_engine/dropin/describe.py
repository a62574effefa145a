"""Recognising modules exactly: by the full name of their class, so that a subclass or a wrapper is never taken for it.

Libraries are named by strings here and imported nowhere: a model of one of them has imported it already.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..encoder_block import AttentionInputs, BlockPlan, Norm, Source, Stack

__all__ = [
    "Block",
    "Made",
    "Unsupported",
    "activation",
    "check_head_dim",
    "class_name",
    "dropout",
    "dtype_name",
    "expect",
    "gamma",
    "linear",
    "norm",
    "norm_of",
    "norms_rows",
    "required_norm",
    "source",
    "unknown_arguments",
]


class Unsupported(Exception):
    """Why a module cannot run on the kernels.

    changed: True if it is of a known architecture that somebody changed (a hook, an adapter, a replaced layer), so that
    the original code has to run; False if the architecture itself is not supported.
    """

    def __init__(self, reason: str, changed: bool = False) -> None:
        super().__init__(reason)
        self.changed = changed


@dataclass(frozen=True)
class Made:
    """A tensor computed from parameters, to be kept until one of `sources` changes. size: see `DerivedCache.get`."""

    key: str
    sources: list[Tensor | None]
    build: Callable[[], Tensor]
    size: Hashable = None


@dataclass(frozen=True)
class Block:
    """How to run one block. arguments: of the library's forward() -> (tokens, what the attention gets) or (tokens, a
    bias to be made for it), or a string that says why these arguments need the original; random: parts that act at
    random in training mode; rotary: whether it takes rotary position embeddings."""

    plan: BlockPlan
    arguments: Callable[..., tuple[Tensor, AttentionInputs | Made] | str]
    random: tuple[nn.Module, ...] = ()
    rotary: bool = False


def class_name(module: Any) -> str:
    """Full name of a module's class, as "timm.layers.mlp.Mlp"."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def dtype_name(dtype: torch.dtype) -> str:
    """As "float16"."""
    return str(dtype).removeprefix("torch.")


def expect(parent: nn.Module, name: str, *classes: str) -> Any:
    """The child of that name, which must be of one of these classes; Unsupported names it otherwise."""
    child = parent
    for part in name.split("."):
        child = getattr(child, part)
    found = class_name(child)
    if found not in classes:
        raise Unsupported(f"{name} is {found}, expected {' or '.join(classes)}")
    return child


_LINEAR = ("torch.nn.modules.linear.Linear", "torch.nn.modules.linear.NonDynamicallyQuantizableLinear")
_IDENTITY = "torch.nn.modules.linear.Identity"
_NORMS = {
    "torch.nn.modules.normalization.LayerNorm": "layer",
    "timm.layers.norm.LayerNorm": "layer",
    "torch.nn.modules.normalization.RMSNorm": "rms",
    "timm.layers.norm.RmsNorm": "rms",
}
_ACTIVATIONS = {
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
    "torch.nn.modules.activation.SiLU": "silu",
}
_RANDOM = (
    "torch.nn.modules.dropout.Dropout",
    "timm.layers.drop.DropPath",
    "transformers.models.beit.modeling_beit.BeitDropPath",
    "transformers.models.dinov2.modeling_dinov2.Dinov2DropPath",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersDropPath",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.Dinov3ViTDropPath",
)


def source(module: nn.Module, name: str) -> Source | None:
    """Where a tensor is, None if there is none."""
    return None if getattr(module, name, None) is None else (module, name)


def linear(parent: nn.Module, *names: str) -> Stack:
    """Linear layers of one input. A replaced one (an adapter, a quantised layer) makes the block `changed`."""
    layers = []
    for name in names:
        child = parent
        for part in name.split("."):
            child = getattr(child, part)
        if class_name(child) not in _LINEAR:
            if _quantised(child):
                raise Unsupported(f"{name} is {class_name(child)}, with quantised weights: expected torch.nn.Linear")
            raise Unsupported(f"{name} is {class_name(child)}, expected torch.nn.Linear", changed=True)
        layers.append(child)
    return Stack(tuple((layer, "weight") for layer in layers), tuple(source(layer, "bias") for layer in layers))


def _quantised(layer: nn.Module) -> bool:
    """Whether a layer in the place of a linear one has a weight of whole numbers, or a packed object for one."""
    weight = getattr(layer, "weight", None)
    packed = callable(weight) and not isinstance(weight, Tensor)
    return packed or (isinstance(weight, Tensor) and not weight.is_floating_point())


def norm(parent: nn.Module, name: str) -> Norm | None:
    """A LayerNorm or RMSNorm over the last dimension, None for Identity."""
    return norm_of(getattr(parent, name), name)


def norm_of(module: Any, name: str) -> Norm | None:
    """The same for the module itself. name: what Unsupported calls it."""
    found = class_name(module)
    if found == _IDENTITY:
        return None
    if found not in _NORMS:
        raise Unsupported(f"{name} is {found}, expected a LayerNorm or RMSNorm")
    if len(module.normalized_shape) != 1 or module.eps is None:
        raise Unsupported(f"{name} must normalise the last dimension with an eps of its own, got {module!r}")
    return Norm(module, _NORMS[found])


def norms_rows(module: Any) -> bool:
    """Whether it is known to treat every token on its own: a LayerNorm or RMSNorm over the features, or Identity."""
    try:
        norm_of(module, "it")
    except Unsupported:
        return False
    return True


def required_norm(parent: nn.Module, name: str) -> Norm:
    found = norm(parent, name)
    if found is None:
        raise Unsupported(f"{name} is Identity, expected a LayerNorm or RMSNorm")
    return found


def activation(module: Any, name: str) -> str:
    """The kernels' name for an activation module."""
    found = class_name(module)
    if found == "torch.nn.modules.activation.GELU":
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if found == "transformers.activations.GELUActivation" and getattr(module.act, "__name__", "") != "gelu":
        raise Unsupported(f"{name} is a GELU in Python operators, expected torch's own")
    if found not in _ACTIVATIONS:
        raise Unsupported(f"{name} is {found}, expected GELU (erf or tanh), QuickGELU or SiLU")
    return _ACTIVATIONS[found]


def dropout(parent: nn.Module, *names: str) -> tuple[nn.Module, ...]:
    """Those of the named children that act at random in training mode: dropout and stochastic depth with a rate."""
    random = []
    for name in names:
        child: Any = parent
        for part in name.split("."):
            child = getattr(child, part)
        if class_name(child) == _IDENTITY:
            continue
        if class_name(child) not in _RANDOM:
            raise Unsupported(f"{name} is {class_name(child)}, expected Dropout, DropPath or Identity")
        if getattr(child, "p", getattr(child, "drop_prob", None)) != 0:
            random.append(child)
    return tuple(random)


def gamma(parent: nn.Module, name: str, *classes: str, tensor: str = "gamma") -> Source | None:
    """The factors of a LayerScale module of one of these classes, None for Identity."""
    module = getattr(parent, name)
    if class_name(module) == _IDENTITY:
        return None
    if class_name(module) not in classes:
        raise Unsupported(f"{name} is {class_name(module)}, expected {' or '.join(classes)} or Identity")
    return (module, tensor)


def check_head_dim(head_dim: int) -> int:
    if head_dim > 128:
        raise Unsupported(f"attention heads are {head_dim} wide, the kernel takes at most 128")
    return head_dim


def unknown_arguments(rest: tuple[Any, ...], more: dict[str, Any]) -> str | None:
    """Why what forward() was given beside its known arguments needs the original code, which knows it or raises."""
    return f"arguments that are not known here: {list(more) or len(rest)}" if rest or more else None
