"""What all layouts share: tensors under other names, some of them rows of one tensor of timm's, none of them lost."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["BLOCK", "Slot", "check", "gather", "refuse", "scatter", "with_leaves"]

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


class Slot(NamedTuple):
    """A tensor's place in timm's layout: the rows number `part` of `parts` equal shares of the tensor `name`."""

    name: str
    part: int = 0
    parts: int = 1


def with_leaves(table: Mapping[str, Any], leaves: tuple[str, ...] = ("weight", "bias")) -> dict[str, Any]:
    """The table of layers as a table of their tensors: each name and each value with each leaf behind it."""
    return {
        f"{name}.{leaf}": value._replace(name=f"{value.name}.{leaf}") if isinstance(value, Slot) else f"{value}.{leaf}"
        for name, value in table.items()
        for leaf in leaves
    }


def gather(
    tensors: Mapping[str, Tensor], place: Callable[[str], Slot | None]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """timm's tensors from those of another layout, and why others were left: by their names there.

    place(name) says where a tensor belongs, None if nowhere. Shares of a tensor are stacked once all of them are there
    and have the same shape; a tensor of several shares is a copy, any other is the one that was given.
    """
    left: dict[str, str] = {}
    found: dict[str, dict[Slot, str]] = {}
    for name in tensors:
        slot = place(name)
        if slot is None:
            left[name] = ""
            continue
        others = found.setdefault(slot.name, {})
        rival = next((theirs for other, theirs in others.items() if other == slot or other.parts != slot.parts), None)
        if rival is None:
            others[slot] = name
        else:
            left[name] = f"{rival} is in its place"
    gathered: dict[str, Tensor] = {}
    for target, sources in found.items():
        shares = [tensors[sources[slot]] for slot in sorted(sources)]
        wanted = next(iter(sources)).parts
        if wanted == 1:
            gathered[target] = shares[0]
        elif len(shares) < wanted or len({share.shape for share in shares}) > 1 or shares[0].dim() == 0:
            left |= dict.fromkeys(sources.values(), f"{target} needs {wanted} such tensors of one shape")
        else:
            gathered[target] = torch.cat(shares)
    return gathered, left


def scatter(
    tensors: Mapping[str, Tensor], place: Callable[[str], list[str] | None]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The other way: timm's tensors, each under the name place(name), its rows shared equally where there are several;
    and why others were left. Shares are copies, so that each owns its memory."""
    left: dict[str, str] = {}
    scattered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        targets = place(name)
        if targets is None:
            left[name] = ""
        elif len(targets) == 1:
            scattered[targets[0]] = tensor
        elif tensor.dim() == 0 or tensor.shape[0] % len(targets):
            left[name] = f"its shape {list(tensor.shape)} has no {len(targets)} equal shares of rows"
        else:
            for target, share in zip(targets, tensor.chunk(len(targets)), strict=True):
                scattered[target] = share.clone()
    return scattered, left


def check(function: str, state_dict: Mapping[str, Any]) -> None:
    """TypeError unless all of these are tensors under names."""
    if not isinstance(state_dict, Mapping):
        found: str | None = type(state_dict).__name__
    else:
        wrong = ((k, v) for k, v in state_dict.items() if not isinstance(k, str) or not isinstance(v, Tensor))
        found = next((f"{name!r}: {type(value).__name__}" for name, value in wrong), None)
    if found is not None:
        raise TypeError(
            f"{function}: state_dict must map names to tensors, got {found}; pass model.state_dict(), not a model or a "
            "whole training checkpoint"
        )


def refuse(function: str, layout: str, left: Mapping[str, str]) -> None:
    """ValueError with the name of everything that was left and why; nothing if nothing was."""
    if left:
        lines = "\n".join(f"  {name}" + (f" ({why})" if why else "") for name, why in sorted(left.items()))
        raise ValueError(f"{function}: {len(left)} of the tensors have no place in {layout}:\n{lines}")
