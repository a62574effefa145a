"""Attached objects that know how to run their module, and find it out anew whenever anything about it has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attached import Attached, State
from .describe import Unsupported
from .structure import Structure

__all__ = ["Described"]


class Described(Attached):
    """description: what describe() made of the module as it is, None where it has no kernels; refusal: why not."""

    def __init__(self, module: nn.Module, name: str, state: State) -> None:
        super().__init__(module, name, state)
        self.description: Any = None
        self.refusal = ""
        self._structure: Structure | None = None

    def describe(self) -> Any:
        """How to run the module on the kernels; Unsupported says why not."""
        raise NotImplementedError

    @torch.compiler.assume_constant_result
    def up_to_date(self) -> bool:
        """Describes the module anew if anything about it has changed; whether it can run on the kernels."""
        if self.description is not None and self.replays.unchanged():
            return True
        if self._structure is None or not self._structure.holds():
            try:
                self.description, self.refusal = self.describe(), ""
            except Unsupported as refusal:
                self.description, self.refusal = None, str(refusal)
            self._structure = Structure(self.module)
        return self.description is not None
