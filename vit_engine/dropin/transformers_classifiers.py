"""transformers' image classifiers whose head reads the class token alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..class_code import replaced
from .attached import Attached
from .describe import class_name, norms_rows
from .parts import CLASS_TOKEN_ALONE, FusedBlock, first_token_of
from .structure import only_listens

__all__ = ["TRANSFORMERS_CLASSIFIERS", "FusedClassifier"]

# Where the backbone is, and its class.
TRANSFORMERS_CLASSIFIERS = {
    f"transformers.models.{name}.modeling_{name}.{prefix}ForImageClassification": (name, f"{prefix}Model")
    for name, prefix in (("vit", "ViT"), ("deit", "DeiT"))
}


class FusedClassifier(Attached):
    """Stands in for the forward() of a classifier: transformers' own, whose last layer computes the class token only.

    The layer itself has the last word: with a mask, gradients, or hidden states asked for it computes all tokens.
    """

    def _last_layer(self) -> nn.Module | None:
        """The layer of whose tokens the head will read the first one, None if others may look at them."""
        model: Any = self.module
        attribute, kind = TRANSFORMERS_CLASSIFIERS[class_name(model)]
        backbone: Any = getattr(model, attribute)
        if class_name(backbone) != class_name(model).rpartition(".")[0] + f".{kind}" or backbone.pooler is not None:
            return None
        if replaced(type(model)) or not norms_rows(backbone.layernorm):
            return None
        for part in (backbone, backbone.layernorm):
            own = vars(part).get("forward")
            listening = only_listens(part._forward_hooks) and only_listens(part._forward_pre_hooks)
            if not listening or not (own is None or isinstance(own, Attached)) or replaced(type(part)):
                return None
        layers = getattr(backbone, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return None
        # A layer is named by its module: one that stands in several places would leave out tokens in all of them.
        return layers[-1] if sum(layer is layers[-1] for layer in layers) == 1 else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # Graphs know nothing of contexts: there all tokens are computed.
            return self.original(*args, **kwargs)
        before = first_token_of.set(self._last_layer())
        try:
            return self.original(*args, **kwargs)
        finally:
            first_token_of.reset(before)

    def covers(self) -> list[nn.Module]:
        return []

    def report(self) -> tuple[str, str | None] | None:
        last = self._last_layer()
        fused = None if last is None else vars(last).get("forward")
        if not isinstance(fused, FusedBlock) or fused.report()[1] is not None:
            return None
        return CLASS_TOKEN_ALONE, None
