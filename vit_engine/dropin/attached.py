"""What stands in for a method of a library's module: the kernels where they can run, the original code where not.

An `Attached` object is set on the instance, in front of the class's own method, so nothing else of the model changes:
class, parameters, hooks on the module itself, everything that calls it. Before every pass it asks whether the kernels
may run; whenever they may not, the original runs and `why` says what was in the way.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any

from vit_kernels import launch

from ..class_code import constant_in_graphs
from ..derived import DerivedCache, transformed
from ..replay import ReplayCache
from .describe import dtype_name
from .structure import listens

__all__ = ["TRACED_BY_FX", "Attached", "State", "counting_changes", "differentiable", "traced_by_fx", "wants_gradient"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRACED_BY_FX = "torch.fx traces the model"
NEEDS = "the kernels need an NVIDIA GPU of compute capability 8.0 or newer, and Triton 3.7.1 on 10.x and 11.x"


class State:
    """What the attached objects of one accelerated model share.

    fold: whether norms are folded into copies of the weights behind them. derived: the folded weights. Threads may
    share it: what one hands over is looked at as a whole, and taken for no tokens but those it belongs to.
    """

    def __init__(self, fold: bool) -> None:
        self.fold = fold
        self.derived = DerivedCache()
        self.fallbacks = 0  # how often any part has run the original
        self._accepted: tuple[object, bool] | None = None
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def clear(self) -> None:
        """Forgets everything that was derived from parameters."""
        self.derived.clear()
        self._last = None

    def accepts(self, device: torch.device) -> bool:
        """Whether the kernels can run on tensors of this device; asked of Triton once per device and driver."""
        key = (device, "interpreter" if launch.interpreting() else _driver())
        if self._accepted is None or self._accepted[0] != key:
            self._accepted = (key, launch.accepts(device))
        return self._accepted[1]

    def hand_over(self, tokens: Tensor, stats: Tensor) -> None:
        """Keeps the row statistics of tokens for whoever takes these very tokens next."""
        if not torch.compiler.is_compiling() and not tokens.is_inference():
            self._last = weakref.ref(tokens), tokens._version, stats

    def forget_statistics(self) -> None:
        """Has the next block compute the statistics of its tokens."""
        self._last = None

    def statistics_of(self, tokens: Tensor) -> Tensor | None:
        """Row statistics of tokens if they are the ones handed over last, unchanged; None otherwise."""
        if torch.compiler.is_compiling():
            return None
        last = self._last
        if last is None or last[0]() is not tokens or last[1] != tokens._version:
            return None
        return last[2]

    def __getstate__(self) -> dict[str, object]:
        return {"fold": self.fold}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["fold"])


@constant_in_graphs
def _accepts(device: torch.device) -> bool:
    return launch.accepts(device)


def _driver() -> object:
    """Triton's driver, None where there is no GPU for one."""
    try:
        return launch.active_driver()
    except RuntimeError:
        return None


def counting_changes(run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """run(), whose results count their changes even under torch.inference_mode(): code in between may write to them."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return run()
    with torch.inference_mode(False), torch.no_grad():
        return run()


class Attached:
    """Stands in for `module.<method>`. name: the module's name in the model."""

    method = "forward"

    def __init__(self, module: nn.Module, name: str, state: State) -> None:
        self.module = module
        self.name = name
        self.state = state
        self.why: str | None = None
        self._fallbacks = 0
        self.replays = ReplayCache(listens=listens)

    def attach(self) -> None:
        """Unless somebody else has put a method of that name on the instance: theirs stays."""
        if self.method not in vars(self.module):
            setattr(self.module, self.method, self)

    def detach(self, module: nn.Module, place: str) -> None:
        """From where it is found: a shallow copy of its module has it, too, and Hugging Face accelerate's hooks put it
        away under another name, where they want a method."""
        if place == self.method:
            delattr(module, place)
        else:
            setattr(module, place, MethodType(self._function, module))

    def forget(self) -> None:
        """Forgets what was kept of earlier passes."""
        self.replays.clear()

    @property
    def original(self) -> Callable[..., Any]:
        """The class's own method with its module.

        No bound method: torch.compile looks that up by its name on the module, and finds what stands in for it.
        """
        return partial(self._function, self.module)

    @property
    def _function(self) -> Callable[..., Any]:
        return getattr(type(self.module), self.method)  # type: ignore[no-any-return]

    # Whoever looks at forward() as at a method (torch.export, Trainer) sees the library's.
    @property
    def __name__(self) -> str:
        return self.method

    @property
    def __code__(self) -> CodeType:
        return self._function.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def __globals__(self) -> dict[str, Any]:
        # TorchScript asks for this first of all.
        raise AttributeError(
            f"torch.jit.script compiles the source of {self.method}(), for which an accelerated model has an object: "
            "call vit_engine.restore(model) before it"
        )

    def instead(self, why: str, *args: Any, **kwargs: Any) -> Any:
        """The original, for this reason."""
        if not torch.compiler.is_compiling():
            self.why = why
            self.state.fallbacks += 1
        return self.original(*args, **kwargs)

    def taken(self, parts: Callable[[], Iterable[nn.Module]]) -> None:
        """Notes that a pass goes to the kernels, and that so do these parts: they are not called one by one, or, in a
        repeated pass, not at all, so why an earlier pass fell back is forgotten for them, too."""
        self.why = None
        if self._fallbacks == self.state.fallbacks:
            return
        self._fallbacks = self.state.fallbacks
        for part in parts():
            for found in vars(part).values():
                if isinstance(found, Attached):
                    found.why = None

    def unavailable(self, x: Tensor, weight: Tensor) -> str | None:
        """Why the kernels cannot take x beside this parameter, if they cannot."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            if type(x) not in (Tensor, nn.Parameter):
                return f"the input is a {type(x).__name__}"
            if torch.jit.is_tracing():  # type: ignore[reportPrivateImportUsage]
                # The trace would keep today's folded weights as constants.
                return "torch.jit.trace is at work"
            if transformed():
                return "a transform of torch.func or forward-mode differentiation is at work"
        # What is exported may be for another machine.
        exporting = compiling and torch.compiler.is_exporting()
        if not (exporting or (_accepts(weight.device) if compiling else self.state.accepts(weight.device))):
            return f"the model is on {str(weight.device)!r}: {NEEDS}"
        if x.device != weight.device:
            return f"the input is on {x.device}, the model on {weight.device}"
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            return "autocast: it mixes dtypes that the kernels do not mix; use model.to(dtype) instead"
        if x.device.type == "cpu" and weight.dtype == torch.bfloat16 and launch.interpreting():
            return "Triton's interpreter computes bfloat16 wrongly: use float32 or float16 with it"
        if weight.dtype not in DTYPES:
            return f"the model is {dtype_name(weight.dtype)}: the kernels take float32, float16 and bfloat16"
        if x.dtype != weight.dtype:
            return f"the input is {dtype_name(x.dtype)}, the model {dtype_name(weight.dtype)}"
        if compiling and not exporting and wants_gradient(self.module, x):
            return "gradients are enabled while a graph is compiled; call it under torch.no_grad()"
        return None

    def covers(self) -> list[nn.Module]:
        """The modules whose parts need no mention of their own in explain()."""
        return [self.module]

    def report(self) -> tuple[str, str | None] | None:
        """(kernels that run, reason why not), as things stand now, None for nothing to say; for explain()."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "name": self.name, "state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"], state["name"], state["state"])


def traced_by_fx(x: object) -> bool:
    """Whether x stands for a tensor in a graph that torch.fx is making, as timm's and torchvision's extractors do."""
    return isinstance(x, torch.fx.Proxy)


def wants_gradient(module: nn.Module, x: Tensor) -> bool:
    """Whether autograd would follow a pass of x through the module."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


def differentiable(
    run: Callable[[Tensor], Tensor], original: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor
) -> Tensor:
    """run(x), with the gradients of original(x), which is computed again if they are asked for."""
    parameters = list(module.parameters())
    if not all(type(p) is nn.Parameter for p in parameters):
        # torch.func.functional_call has put tensors in their place, and takes them away before the backward pass.
        return original(x)
    before = [(p, p.requires_grad, p._version) for p in parameters if not p.is_inference()]

    def again(tokens: Tensor) -> Tensor:
        if any(p.requires_grad is not wanted or p._version != version for p, wanted, version in before):
            raise RuntimeError(
                f"a parameter of {type(module).__name__} was changed between forward and backward pass: its gradients "
                "are computed from the values at the forward pass"
            )
        return original(tokens)

    return _Recomputed.apply(run, again, x, *(p for p in parameters if p.requires_grad))  # type: ignore[no-any-return]


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
        twice = torch.is_grad_enabled()  # somebody differentiates the gradients, too
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x = x if twice else x.detach().requires_grad_(ctx.needs_input_grad[2])
            y = ctx.original(x)
        wanted = [t for t, need in zip((x, *parameters), ctx.needs_input_grad[2:], strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, gradients, create_graph=twice, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in ctx.needs_input_grad[2:]))


def any_requires_grad(*values: Any) -> bool:
    """Whether a tensor among these arguments asks for a gradient."""
    return torch.is_grad_enabled() and tree_any(lambda v: isinstance(v, Tensor) and v.requires_grad, values)
