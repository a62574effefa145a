"""Python source with its syntax tree, and where the pieces of the tree lie in the text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .mutant import Edit

_GAP = re.compile(rb"(?:[\s)\\]|#[^\n]*)*")


@dataclass(frozen=True)
class Site:
    """A node, its parents from the inside out, and the function it stands in."""

    node: ast.AST
    parents: tuple[ast.AST, ...]
    function: str


class Source:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.tree = ast.parse(content)
        self._line_starts = [0]
        for line in content.splitlines(keepends=True):
            self._line_starts.append(self._line_starts[-1] + len(line))

    def start(self, node: ast.AST) -> int:
        return self._line_starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        return self._line_starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def text(self, node: ast.AST) -> str:
        return self.content[self.start(node) : self.end(node)].decode()

    def line(self, node: ast.AST) -> str:
        """The text of the line that the node begins on."""
        first = self._line_starts[node.lineno - 1]  # type: ignore[attr-defined]
        return self.content[first : self._line_starts[node.lineno]].decode().strip()  # type: ignore[attr-defined]

    def replace(self, node: ast.AST, text: str) -> Edit:
        return Edit(self.start(node), self.end(node), text)

    def operator(self, left: ast.AST, symbol: str) -> tuple[int, int]:
        """Where the operator behind `left` lies: behind closing parentheses, line breaks and comments."""
        match = _GAP.match(self.content, self.end(left))
        assert match is not None
        pattern = rb"\s+".join(re.escape(word) for word in symbol.encode().split())
        found = re.compile(pattern).match(self.content, match.end())
        assert found is not None, f"no {symbol!r} behind {self.text(left)!r}"
        return found.span()

    def sides(self, node: ast.BinOp, symbol: str) -> tuple[str, str]:
        """The texts of both operands with the parentheses around them."""
        first, last = self.operator(node.left, symbol)
        left, right = self.content[self.start(node) : first], self.content[last : self.end(node)]
        return left.decode().rstrip(), right.decode().lstrip()

    def squeezed(self, statement: ast.stmt, *edits: Edit) -> bytes:
        """A top-level statement after these edits, without white space: equal for edits that say the same."""
        offset = self.start(statement)
        text = self.content[offset : self.end(statement)]
        for edit in edits:
            text = text[: edit.start - offset] + edit.text.encode() + text[edit.end - offset :]
        return b"".join(text.split())

    def sites(self, statement: ast.stmt) -> Iterator[Site]:
        """Every node whose change could change what is computed: no annotations, no imports, no texts of errors."""
        yield from self._walk(statement, (), "module")

    def _walk(self, node: ast.AST, parents: tuple[ast.AST, ...], function: str) -> Iterator[Site]:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.JoinedStr):
            return
        yield Site(node, parents, function)
        if isinstance(node, ast.Raise):
            return
        inner = node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else function
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self._walk(child, (node, *parents), inner)
