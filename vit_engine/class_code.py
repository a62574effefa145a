"""Whether a class still has the method that its library gave it: `Attention.forward = mine` reaches every instance."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

__all__ = ["constant_in_graphs", "replaced"]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """As torch.compiler.assume_constant_result, but without importing torch._dynamo, which takes its time."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def replaced(kind: type, name: str = "forward") -> bool:
    """Whether somebody has set another function as this method of a class, or of the base class that it is from.

    The method of a class has the class's module and qualified name, and the code of it and of its decorators comes
    from the package of that class or from torch (no_grad() and the like). functools.wraps() copies names, not code.
    """
    return _replaced(kind, name, getattr(kind, name))


@lru_cache(maxsize=1024)  # asked before every pass
def _replaced(kind: type, name: str, found: object) -> bool:
    owner = next((one for one in kind.__mro__ if name in vars(one)), kind)
    function: Any = vars(owner).get(name, found)
    package = _package(owner.__module__)
    while True:
        home = _package(getattr(function, "__globals__", {}).get("__name__"))
        if home != package and home != "torch":
            return True
        if not hasattr(function, "__wrapped__"):
            break
        function = function.__wrapped__
    if function.__module__ != owner.__module__:
        return True
    # In parts: a traced graph compares whole qualified names wrongly (PyTorch 2.14).
    home, _, own = function.__qualname__.rpartition(".")
    # torch.nn.Module's own forward(), which only raises, goes by another name.
    return own != "_forward_unimplemented" and (home != owner.__qualname__ or own != name)


def _package(module: Any) -> str:
    return str(module).partition(".")[0]
