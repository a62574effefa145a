"""Syntax trees of source files as evidence sees them: without what cannot change a result."""

from __future__ import annotations

import ast
from typing import Any

_CHECKS = ("check_", "_check_")


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The same code, so that a change of its documentation alone is none."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return tree


def without_refusals(tree: ast.Module) -> ast.Module:
    """The same code without what can only refuse arguments, so that a launcher may become stricter, or its messages
    clearer, and what its kernel was shown to compute is still shown.

    Left out are `if ...: raise ...`, imports of functions named check_*, calls of them whose result nobody takes,
    loops and conditions around nothing else, and such functions themselves, where they return nothing. Run after
    `without_docstrings`.
    """
    return _Refusals().visit(tree)


class _Refusals(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | None:
        self.generic_visit(node)
        raises = all(isinstance(statement, ast.Raise) for statement in node.body)
        return None if raises and not node.orelse else node

    def visit_For(self, node: ast.For) -> ast.AST | None:
        self.generic_visit(node)
        return node if node.body or node.orelse else None

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        called = node.value.func if isinstance(node.value, ast.Call) else None
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        return None if name.startswith(_CHECKS) else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        returns = any(isinstance(part, ast.Return) and part.value is not None for part in ast.walk(node))
        if node.name.startswith(_CHECKS) and not node.decorator_list and not returns:
            return None
        return self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        node.names = [alias for alias in node.names if not alias.name.startswith(_CHECKS)]
        return node if node.names else None


def tree_text(node: Any) -> str:
    """A syntax tree as text that is the same under every version of Python: without fields that hold nothing, of which
    newer ones have more. (`ast.dump` shows them, or not, as its version likes.)"""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return f"{type(node).__name__}({', '.join(f'{name}={tree_text(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{', '.join(tree_text(member) for member in node)}]"
    return repr(node)
