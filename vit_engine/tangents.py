"""Forward-mode differentiation (torch.autograd.forward_ad, torch.func.jvp), which the kernels have no formulas for."""

from __future__ import annotations

import functools
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


def without_tangents(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function of vit_engine.ops that raises NotImplementedError for dual tensors.

    Autograd would drop their tangents without a word: to it, a custom operator without a formula is a constant.
    """

    @functools.wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if any_tangent((*args, *kwargs.values())):
            raise NotImplementedError(
                f"vit_engine.ops.{function.__name__} has no formula for forward-mode differentiation: call it without "
                "dual tensors, or use the 'torch' backend"
            )
        return function(*args, **kwargs)

    return checked
