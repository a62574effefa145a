"""What evidence leaves out of a syntax tree: what cannot change a result, and nothing else."""

from __future__ import annotations

import ast
import textwrap
from typing import Any

import pytest

from vit_bench.trees import tree_text, without_refusals


def test_a_tree_reads_the_same_under_every_version_of_python() -> None:
    """Python 3.12 gave functions type parameters, 3.13 stopped showing fields that hold nothing."""
    tree = ast.parse("def f(x): return x + 1")
    text = tree_text(tree)
    assert text == (
        "Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='x')]), body=[Return(value=BinOp("
        "left=Name(id='x', ctx=Load()), op=Add(), right=Constant(value=1)))])])"
    )
    function: Any = tree.body[0]
    function.type_params, function._fields = [], (*function._fields, "type_params")
    assert tree_text(tree) == text


def left(source: str) -> str:
    return tree_text(without_refusals(ast.parse(textwrap.dedent(source))))


@pytest.mark.parametrize(
    ("source", "same"),
    [
        ("if x < 0:\n    raise ValueError(x)\ny = 1", "y = 1"),
        ("if a:\n    raise ValueError(x)\nelif b:\n    raise TypeError(x)\ny = 1", "y = 1"),
        ("for x in xs:\n    if x is not None:\n        check_vector(x)\ny = 1", "y = 1"),
        ("checks.check_vector(x)\ny = 1", "y = 1"),
        ("from .checks import check_vector, short", "from .checks import short"),
        ("from .checks import check_vector\ny = 1", "y = 1"),
        ("def _check_all(x):\n    if x:\n        return\n    z = 2\n    raise ValueError(z)\ny = 1", "y = 1"),
    ],
)
def test_what_only_refuses_is_left_out(source: str, same: str) -> None:
    assert left(source) == left(same)


@pytest.mark.parametrize(
    ("source", "other"),
    [
        ("y = check_tf32(x)", "y = 1"),
        ("def check_tf32(x):\n    return x", ""),
        ("def check_tf32(x):\n    return x", "def check_tf32(x):\n    return 2 * x"),
        ("@triton.jit\ndef check_bounds(x):\n    tl.store(x, 1)", ""),
        ("def prepare(x):\n    x += 1", ""),
        ("prepare(x)", ""),
        ("if x:\n    y = 1\n    raise ValueError(x)", ""),
        ("if x:\n    raise ValueError(x)\nelse:\n    y = 1", "if x:\n    raise ValueError(x)\nelse:\n    y = 2"),
        ("try:\n    f()\nexcept E:\n    raise", "try:\n    f()\nexcept E:\n    pass"),
        ("from .checks import short", "from .checks import long"),
    ],
)
def test_what_can_change_a_result_stays(source: str, other: str) -> None:
    assert left(source) != left(other)
