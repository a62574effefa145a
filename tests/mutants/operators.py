"""Mutation operators: small changes of an expression or a statement, each of a kind that people make by mistake.

An operator takes the source and a place in it and yields replacements. Everything is done on the text by the positions
of the syntax tree, because Triton reads the text of a kernel: the rest of a file stays byte for byte as it was.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from .mutant import Edit
from .source import Site, Source

Operator = Callable[[Source, Site], Iterator[Edit]]

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),  # codespell:ignore notin
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"),
}  # fmt: skip
ALIKE = {
    "tl.minimum": "tl.maximum", "tl.maximum": "tl.minimum", "min": "max", "max": "min", "tl.max": "tl.min",
    "tl.exp2": "tl.exp", "tl.exp": "tl.exp2", "tl.rsqrt": "tl.sqrt", "tl.log": "tl.log2", "tl.sum": "tl.max",
}  # fmt: skip
# Keywords of calls that have a default, besides those of the launchers themselves.
OPTIONAL_KEYWORDS = {
    "mask", "other", "input_precision", "num_warps", "num_stages", "norm", "stats", "column_sum", "eps", "activation",
    "layer_scale", "residual", "emit_stats", "tf32", "gated", "described", "masked", "always", "stats_optional",
}  # fmt: skip


def comparison(source: Source, site: Site) -> Iterator[Edit]:
    """< for <=, == for !=, is for is not."""
    node = site.node
    if isinstance(node, ast.Compare):
        for left, op in zip([node.left, *node.comparators], node.ops, strict=False):
            old, new = COMPARISONS[type(op)]
            yield Edit(*source.operator(left, old), new)


def condition_dropped(source: Source, site: Site) -> Iterator[Edit]:
    """One side of `a & b`, `a and b`, `a or b` alone."""
    node = site.node
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        for side in source.sides(node, "&"):
            yield source.replace(node, side)
    if isinstance(node, ast.BoolOp):
        word = "and" if isinstance(node.op, ast.And) else "or"
        gaps = [source.operator(value, word) for value in node.values[:-1]]
        starts = [source.start(node), *(end for _, end in gaps)]
        ends = [*(start for start, _ in gaps), source.end(node)]
        pieces = [source.content[a:b].decode().strip() for a, b in zip(starts, ends, strict=True)]
        for left_out in range(len(pieces)):
            kept = pieces[:left_out] + pieces[left_out + 1 :]
            yield source.replace(node, f" {word} ".join(kept))


def other(source: Source, site: Site) -> Iterator[Edit]:
    """Another value for masked elements of a load."""
    node = site.node
    if isinstance(node, ast.keyword) and node.arg == "other":
        yield source.replace(node.value, "1.0" if source.text(node.value) in ("0", "0.0") else "0.0")


def constant(source: Source, site: Site) -> Iterator[Edit]:
    """n + 1 for n, 1.0 for 0.0, one percent more for other numbers, False for True, 0.0 for -inf."""
    node, parent = site.node, site.parents[0] if site.parents else None
    if isinstance(node, ast.Call) and source.text(node.func) == "float" and isinstance(node.args[0], ast.Constant):
        yield source.replace(node, "0.0")
    if not isinstance(node, ast.Constant) or (isinstance(parent, ast.keyword) and parent.arg == "other"):
        return
    if isinstance(node.value, bool):
        yield source.replace(node, str(not node.value))
    elif isinstance(node.value, int):
        yield source.replace(node, str(node.value + 1))
    elif isinstance(node.value, float):
        yield source.replace(node, "1.0" if node.value == 0.0 else repr(round(node.value * 1.01, 15)))


def arithmetic(source: Source, site: Site) -> Iterator[Edit]:
    """- for +, * for /, // for %."""
    node = site.node
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        old, new = ARITHMETIC[type(node.op)]
        left, right = source.sides(node, old)
        yield source.replace(node, f"({left} {new} {right})" if old == "*" else f"{left} {new} {right}")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield source.replace(node, source.text(node.operand))


def term_dropped(source: Source, site: Site) -> Iterator[Edit]:
    """One operand of a sum, product or quotient alone."""
    node = site.node
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = source.sides(node, ARITHMETIC[type(node.op)][0])
        yield source.replace(node, left)
        if isinstance(node.op, ast.Add | ast.Mult):
            yield source.replace(node, right)


def axis(source: Source, site: Site) -> Iterator[Edit]:
    """[None, :] for [:, None]; the other axis of a sum, a stride, a shape."""
    node = site.node
    if isinstance(node, ast.Subscript):
        index = source.text(node.slice)
        if index in (":, None", "None, :"):
            yield source.replace(node.slice, ", ".join(reversed(index.split(", "))))
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[-1], ast.Constant):
        name, last = source.text(node.func).split(".")[-1], node.args[-1]
        if name in ("sum", "max", "stride") and type(last.value) is int:
            yield source.replace(last, str(1 - last.value))


def stride(source: Source, site: Site) -> Iterator[Edit]:
    """The stride of another axis: the sibling in the kernel's signature with the longest common name."""
    node = site.node
    if not (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id.startswith("stride_")):
        return
    function = next(parent for parent in site.parents if isinstance(parent, ast.FunctionDef))
    names = [arg.arg for arg in function.args.args if arg.arg.startswith("stride_") and arg.arg != node.id]

    def common(name: str) -> int:
        return next((i for i, (a, b) in enumerate(zip(name, node.id, strict=False)) if a != b), len(name))

    if names:
        yield source.replace(node, max(names, key=common))


def cast_dropped(source: Source, site: Site) -> Iterator[Edit]:
    """x for x.to(dtype) and x.float()."""
    node = site.node
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "float"):
        receiver = source.content[source.start(node) : source.end(node.func)].decode()
        yield source.replace(node, receiver[: -len(node.func.attr)].rstrip().removesuffix("."))


def function(source: Source, site: Site) -> Iterator[Edit]:
    """max for min, exp for exp2."""
    node = site.node
    if isinstance(node, ast.Call) and source.text(node.func) in ALIKE:
        yield source.replace(node.func, ALIKE[source.text(node.func)])


def assignment_dropped(source: Source, site: Site) -> Iterator[Edit]:
    """Nothing for `x += y`."""
    if isinstance(site.node, ast.AugAssign):
        yield source.replace(site.node, "pass")


def condition_negated(source: Source, site: Site) -> Iterator[Edit]:
    """`not c` for the condition of an if; the branches of a where exchanged."""
    node = site.node
    if isinstance(node, ast.If | ast.IfExp):
        yield source.replace(node.test, f"not ({source.text(node.test)})")
    if isinstance(node, ast.Call) and source.text(node.func) == "tl.where":
        test, yes, no = (source.text(argument) for argument in node.args)
        yield source.replace(node, f"{source.text(node.func)}({test}, {no}, {yes})")


def branch_forced(source: Source, site: Site) -> Iterator[Edit]:
    """True or False for the condition of an if."""
    node = site.node
    if isinstance(node, ast.If | ast.IfExp):
        yield source.replace(node.test, "True")
        yield source.replace(node.test, "False")


def statement_dropped(source: Source, site: Site) -> Iterator[Edit]:
    """Nothing for a check, a refusal or a store."""
    node = site.node
    call = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    if isinstance(node, ast.Raise) or (call is not None):
        yield source.replace(node, "pass")


def keyword_dropped(source: Source, site: Site) -> Iterator[Edit]:
    """A call without one of its optional keywords."""
    node = site.node
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg in OPTIONAL_KEYWORDS:
                first = source.start(keyword)
                before = source.content[:first].rstrip()
                after = source.content[source.end(keyword) :]
                if before.endswith(b","):
                    yield Edit(len(before) - 1, source.end(keyword), "")
                elif after.lstrip().startswith(b","):
                    yield Edit(first, source.end(keyword) + after.index(b",") + 1, "")
                else:
                    yield source.replace(keyword, "")


OPERATORS: dict[str, Operator] = {
    "comparison": comparison,
    "condition-dropped": condition_dropped,
    "other": other,
    "constant": constant,
    "arithmetic": arithmetic,
    "term-dropped": term_dropped,
    "axis": axis,
    "stride": stride,
    "cast-dropped": cast_dropped,
    "function": function,
    "assignment-dropped": assignment_dropped,
    "condition-negated": condition_negated,
    "branch-forced": branch_forced,
    "statement-dropped": statement_dropped,
    "keyword-dropped": keyword_dropped,
}
