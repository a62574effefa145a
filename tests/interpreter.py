"""Triton's interpreter without a search that takes much of its time."""

from __future__ import annotations

import inspect
from typing import Any


def remember_builtins() -> None:
    """From here on the interpreter knows which members of triton.language are builtins.

    It puts its own in their place around every launch, and in every call of a device function, where they are there
    already, and looks through all members for them each time. Called before anything was interpreted.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    homes = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    names = {
        id(home): [name for name, member in inspect.getmembers(home) if tl.core.is_builtin(member)] for home in homes
    }
    everywhere = interpreter._patch_builtin

    def patch_builtin(home: Any, builder: Any, scope: Any) -> None:
        if id(home) not in names:
            everywhere(home, builder, scope)
            return
        for name in names[id(home)]:
            member = getattr(home, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(home, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
