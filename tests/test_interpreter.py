"""What the tests take from Triton's interpreter to make it quicker is what it looks for itself."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


@pytest.mark.interpreted_only
@pytest.mark.parametrize(
    "home", [tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base], ids=lambda home: home.__name__
)
def test_all_builtins_are_remembered(home: Any) -> None:
    wanted = {name for name, member in inspect.getmembers(home) if tl.core.is_builtin(member)}
    scope = interpreter._LangPatchScope()
    try:
        interpreter._patch_builtin(home, interpreter.interpreter_builder, scope)
        assert wanted and {name for _, name, _ in scope._changes} == wanted
        assert not any(tl.core.is_builtin(getattr(home, name)) for name in wanted)
    finally:
        scope.restore()
