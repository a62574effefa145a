"""Models whose own code calls the blocks: of shapes seen before, what it came to is repeated without it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..class_code import replaced
from ..derived import transformed
from ..graph_keys import key_of
from ..passes import PLAIN
from ..replay import ReplayCache
from .attached import Attached, State
from .describe import class_name
from .parts import first_token_of
from .structure import listens
from .transformers_blocks import attention_in_use, outputs_are_collected

__all__ = ["TIMM_LOOPS", "Repeated", "RepeatedEncoder", "RepeatedFeatures", "encoders", "image_models"]

TIMM_LOOPS = ("timm.models.eva.Eva", "timm.models.beit.Beit")
# Methods beside forward() that models and their stems call, and that somebody may have replaced.
_METHODS = ("interpolate_pos_encoding", "_pos_embed")
# Whether a model is being run that is repeated as a whole, or will be.
_repeated_around: ContextVar[bool] = ContextVar("repeated_around", default=False)


def image_models(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The innermost modules of transformers' own classes that take images and hold blocks, and their names."""
    found: list[tuple[str, nn.Module]] = []
    for name, part in model.named_modules():
        holds = any(not name or block.startswith(f"{name}.") for block in blocks)
        if not holds or name in blocks or not class_name(part).startswith("transformers.models."):
            continue
        if list(inspect.signature(type(part).forward).parameters)[1:2] != ["pixel_values"]:
            continue
        found = [(outer, other) for outer, other in found if outer and not name.startswith(f"{outer}.")]
        found.append((name, part))
    yield from found


def encoders(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of transformers' own classes whose forward() goes through a list of blocks, and their names."""
    for name in dict.fromkeys(block.rpartition(".")[0] for block in blocks):
        outer = name.rpartition(".")[0]
        part = model.get_submodule(outer)
        if isinstance(model.get_submodule(name), nn.ModuleList) and class_name(part).startswith("transformers.models."):
            yield outer, part


class Repeated(Attached):
    """Stands in for the forward() of a vision model of transformers: its own, or the same launches and operators again
    (see `ReplayCache`)."""

    def __init__(self, module: nn.Module, name: str, state: State) -> None:
        super().__init__(module, name, state)
        self.replays = ReplayCache(listens=listens, operators=True, settings=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        inputs = [value for value in values if isinstance(value, Tensor)]
        beside = None if torch.compiler.is_compiling() else self._beside(values, inputs)
        if beside is None:
            return self.original(*args, **kwargs)
        self.taken(self.module.modules)
        kind = (*key_of(args, kwargs), *beside)
        before = _repeated_around.set(not self.replays.refuses(kind))
        try:
            return self.replays.run(
                kind, self.module, inputs, lambda: self.original(*args, **kwargs), self._objection
            )  # fmt: skip
        finally:
            _repeated_around.reset(before)

    def _beside(self, values: tuple[Any, ...], inputs: list[Tensor]) -> tuple[Any, ...] | None:
        """What a pass depends on beside the module and its arguments; None if it is to run as written."""
        if not inputs or not all(isinstance(value, (Tensor, *PLAIN)) for value in values):
            return None
        if torch.is_grad_enabled() or transformed() or outputs_are_collected():
            return None
        device = inputs[0].device
        if device.type == "meta" or any(x.device != device for x in inputs):
            return None
        if torch.is_autocast_enabled(device.type) or not self.state.accepts(device):
            return None
        model = self.module
        for part in (model, *model.children()):
            if any(name in vars(part) or (hasattr(part, name) and replaced(type(part), name)) for name in _METHODS):
                return None
        if replaced(type(model), self.method):
            return None
        return attention_in_use(model), first_token_of.get()

    def _objection(self) -> str | None:
        """The code of somebody else, and what ran its original code, may depend on what no fingerprint knows."""
        for name, part in self.module.named_modules():
            own = vars(part).get("forward")
            if replaced(type(part)) or not (own is None or isinstance(own, Attached)):
                return f"{name} has a forward() of somebody's own"
            for found in vars(part).values():
                if isinstance(found, Attached) and found is not self and found.why is not None:
                    return f"{found.name or 'the model'} runs the original code: {found.why}"
        return None

    def covers(self) -> list[nn.Module]:
        return []

    def report(self) -> None:
        return None


class RepeatedEncoder(Repeated):
    """The same for the loop over the blocks, where the model around it is not repeated: because somebody has a hook in
    it, say, or because it reads numbers back from the GPU (SigLIP 2)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _repeated_around.get():
            return self.original(*args, **kwargs)
        # Row statistics that the stem has handed over would be an input that nobody sees.
        self.state.forget_statistics()
        return super().__call__(*args, **kwargs)


class RepeatedFeatures(Repeated):
    """The same for the forward_features() of timm's models that have code of their own around the blocks."""

    method = "forward_features"
