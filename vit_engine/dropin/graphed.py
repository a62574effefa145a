"""accelerate(model, graphs=True): a library's model in CUDA graphs, in front of everything else that was attached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..graphs import GraphCache
from .attached import Attached, State
from .describe import class_name
from .parts import FusedBlock
from .structure import listens
from .transformers_blocks import collecting_outputs

__all__ = ["Graphed", "whole_models"]

_LIBRARIES = ("timm.models.", "torchvision.models.", "transformers.models.")


def whole_models(model: nn.Module, blocks: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules of a library's own classes that hold blocks, and their names: what a graph is made of.

    A class of the user's is left out, because its forward() may do anything; so are blocks on their own.
    """
    found: list[str] = []
    for name, part in model.named_modules():
        inside = any(not outer or name == outer or name.startswith(f"{outer}.") for outer in found)
        if inside or name in blocks or not class_name(part).startswith(_LIBRARIES):
            continue
        if any(not name or block.startswith(f"{name}.") for block in blocks):
            found.append(name)
            yield name, part


class Graphed(Attached):
    """Stands in for the forward() of a whole model, and for what accelerate() had put there.

    limit: graphs it keeps at most. inner: what was attached to forward() before, None for the class's own method.
    """

    def __init__(self, module: nn.Module, name: str, state: State, limit: int, inner: Attached | None = None) -> None:
        super().__init__(module, name, state)
        self.inner = inner
        self.graphs = GraphCache(limit, listens, self._reasons)

    def attach(self) -> None:
        found = vars(self.module).get(self.method)
        if found is None or isinstance(found, Attached):
            self.inner = found
            setattr(self.module, self.method, self)

    def detach(self, module: nn.Module, place: str) -> None:
        super().detach(module, place)
        if self.inner is not None:
            setattr(module, place, self.inner)

    def forget(self) -> None:
        self.graphs.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner: Any = self.original if self.inner is None else self.inner
        if torch.compiler.is_compiling():
            return inner(*args, **kwargs)
        if collecting_outputs():
            self.graphs.why = "a model around it collects outputs through hooks"
            return inner(*args, **kwargs)
        return self.graphs.run(self.module, inner, args, kwargs, self._objection)

    def _objection(self) -> str | None:
        """The code of an adapter may depend on what no fingerprint knows, so every block must have run on kernels."""
        for part in self.module.modules():
            block = vars(part).get("forward")
            if isinstance(block, FusedBlock) and block.why is not None:
                return f"{block.name} runs the original code: {block.why}"
        return None

    def _reasons(self) -> list[tuple[Attached, str | None]]:
        found = [
            value for part in self.module.modules() for value in vars(part).values() if isinstance(value, Attached)
        ]
        return [(attached, attached.why) for attached in found if attached is not self]

    def recall(self) -> None:
        """Where a graph was replayed last, the parts give the reasons that they had in its pass: they have not been
        called since, and another pass may have been made in between."""
        if self.graphs.why is None:
            for attached, why in self.graphs.noted or ():
                attached.why = why
                self.state.fallbacks += why is not None

    def report(self) -> tuple[str, str | None]:
        return "CUDA graphs", self.graphs.why

    def lines(self) -> list[str]:
        """What explain() says of the graphs."""
        graphs, name = self.graphs, self.name or "the model"
        shapes = "; ".join(graphs.captured) or "none"
        found = [f"{name}: CUDA graphs, at most {graphs.limit}: {shapes}"]
        if graphs.why is not None:
            found.append(f"{name}: the last pass was not replayed from a graph: {graphs.why}")
        found += [f"{name}: no graph for {shape}: {why}" for shape, why in graphs.refused.items()]
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "limit": self.graphs.limit, "inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"], state["name"], state["state"], state["limit"], state["inner"])
