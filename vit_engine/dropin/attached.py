"""What stands in for a method of a library's module: the kernels where they can run, the original code where not.

An `Attached` object is set on the instance, in front of the class's own method, so nothing else of the model changes:
class, parameters, hooks on the module itself, everything that calls it. Before every pass it asks whether the kernels
may run; whenever they may not, the original runs and `why` says what was in the way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any

from vit_kernels import launch

from ..derived import DerivedCache
from ..replay import ReplayCache

__all__ = ["Attached", "State", "differentiable", "wants_gradient"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NEEDS = "the kernels need an NVIDIA GPU of compute capability 8.0 or newer"


class State:
    """What the attached objects of one accelerated model share.

    fold: whether norms are folded into copies of the weights behind them. trusted: whether the code that runs between
    the attached modules is a library's own, which does not write into tokens in place. derived: the folded weights.
    """

    def __init__(self, fold: bool, trusted: bool) -> None:
        self.fold = fold
        self.trusted = trusted
        self.derived = DerivedCache()
        self.replays = ReplayCache()
        self._accepted: tuple[object, bool] | None = None
        self._last: tuple[weakref.ref[Tensor], int | None, Tensor] | None = None

    def clear(self) -> None:
        """Forgets everything that was derived from parameters."""
        self.derived.clear()
        self.replays.clear()
        self._last = None

    def accepts(self, device: torch.device) -> bool:
        """Whether the kernels can run on tensors of this device; asked of Triton once per device and driver."""
        key = (device, "interpreter" if launch.interpreting() else launch.active_driver())
        if self._accepted is None or self._accepted[0] != key:
            self._accepted = (key, launch.accepts(device))
        return self._accepted[1]

    def hand_over(self, tokens: Tensor, stats: Tensor) -> None:
        """Keeps the row statistics of tokens for whoever takes these very tokens next."""
        if not torch.compiler.is_compiling():
            self._last = weakref.ref(tokens), _version(tokens), stats

    def statistics_of(self, tokens: Tensor) -> Tensor | None:
        """Row statistics of tokens if they are the ones handed over last, unchanged; None otherwise.

        Tensors of inference mode do not count their changes: for those the code in between has to be trusted.
        """
        if torch.compiler.is_compiling():
            return None
        last = self._last
        if last is None or last[0]() is not tokens or last[1] != _version(tokens):
            return None
        return last[2] if last[1] is not None or self.trusted else None

    def __getstate__(self) -> dict[str, object]:
        return {"fold": self.fold, "trusted": self.trusted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["fold"], state["trusted"])


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class Attached:
    """Stands in for `module.<method>`. name: the module's name in the model."""

    method = "forward"

    def __init__(self, module: nn.Module, name: str, state: State) -> None:
        self.module = module
        self.name = name
        self.state = state
        self.why: str | None = None

    def attach(self) -> None:
        setattr(self.module, self.method, self)

    def detach(self) -> None:
        delattr(self.module, self.method)

    @property
    def original(self) -> Callable[..., Any]:
        """The class's own method, bound to the module."""
        return getattr(type(self.module), self.method).__get__(self.module)

    def instead(self, why: str, *args: Any, **kwargs: Any) -> Any:
        """The original, for this reason."""
        if not torch.compiler.is_compiling():
            self.why = why
        return self.original(*args, **kwargs)

    def unavailable(self, x: Tensor, weight: Tensor) -> str | None:
        """Why the kernels cannot take x beside this parameter, if they cannot."""
        if not torch.compiler.is_compiling():
            if type(x) not in (Tensor, nn.Parameter):
                return f"the input is a {type(x).__name__}"
            if weight.device.type == "meta" or not self.state.accepts(weight.device):
                return f"the model is on {str(weight.device)!r}: {NEEDS}"
        if x.device != weight.device:
            return f"the input is on {x.device}, the model on {weight.device}"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast: it mixes dtypes that the kernels do not mix; use model.to(dtype) instead"
        if weight.dtype not in DTYPES:
            return f"the model is {_short(weight.dtype)}: the kernels take float32, float16 and bfloat16"
        if x.dtype != weight.dtype:
            return f"the input is {_short(x.dtype)}, the model {_short(weight.dtype)}"
        return None

    def covers(self) -> list[nn.Module]:
        """The modules whose parts need no mention of their own in explain()."""
        return [self.module]

    def report(self) -> tuple[str, str | None]:
        """(kernels that run, reason why not), as things stand now; for explain()."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "name": self.name, "state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"], state["name"], state["state"])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wants_gradient(module: nn.Module, x: Tensor) -> bool:
    """Whether autograd would follow a pass of x through the module."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


def differentiable(
    run: Callable[[Tensor], Tensor], original: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor
) -> Tensor:
    """run(x), with the gradients of original(x), which is computed again if they are asked for."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return _Recomputed.apply(run, original, x, *parameters)  # type: ignore[no-any-return]


class _Recomputed(torch.autograd.Function):
    """The kernels forward; backward through PyTorch's own operators, from the saved input."""

    @staticmethod
    def forward(ctx: Any, run: Any, original: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.original = original
        ctx.save_for_backward(x, *parameters)
        return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_(ctx.needs_input_grad[2])
            y = ctx.original(x)
        wanted = [t for t, need in zip((x, *parameters), ctx.needs_input_grad[2:], strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, gradients, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in ctx.needs_input_grad[2:]))


def any_requires_grad(*values: Any) -> bool:
    """Whether a tensor among these arguments asks for a gradient."""
    return torch.is_grad_enabled() and tree_any(lambda v: isinstance(v, Tensor) and v.requires_grad, values)
