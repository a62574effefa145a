"""Forward-mode differentiation (torch.autograd.forward_ad, torch.func.jvp), which the kernels have no formulas for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["any_tangent", "without_tangents"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def any_tangent(tensors: Iterable[object]) -> bool:
    """Whether a tensor among these is a dual one: it carries a tangent that an operator would have to take along."""
    # Outside of a level there are none, and asking costs next to nothing.
    return forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def _check_devices(function: str, names: Iterable[str], given: Iterable[object]) -> None:
    """Raises ValueError where one tensor has values and another is on the meta device."""
    named = [(name, x) for name, x in zip(names, given, strict=True) if isinstance(x, Tensor)]
    first, device = named[0][0], named[0][1].device
    for name, x in named:
        if (x.device.type == "meta") != (device.type == "meta"):
            raise ValueError(
                f"vit_engine.ops.{function}: {name} must be on the device of {first}, {device}; got {x.device}"
            )


def without_tangents(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function of vit_engine.ops that raises NotImplementedError for dual tensors, and ValueError for a tensor on the
    meta device beside others.

    Both would be taken without a word. To autograd, a custom operator without a formula is a constant, and the tangent
    is dropped; to PyTorch's dispatcher, one meta tensor is enough to ask the operator's fake, whose result is memory
    that nobody wrote.
    """
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        given = (*args, *kwargs.values())
        for x in given:
            if isinstance(x, Tensor) and x.is_meta:  # or a fake tensor, whose device is another
                _check_devices(function.__name__, (*names[: len(args)], *kwargs), given)
                break
        if any_tangent(given):
            raise NotImplementedError(
                f"vit_engine.ops.{function.__name__} has no formula for forward-mode differentiation: call it without "
                "dual tensors, or use the 'torch' backend"
            )
        return function(*args, **kwargs)

    return checked
