"""What of an accelerated model runs on the kernels, as a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from .attached import Attached
from .graphed import Graphed

__all__ = ["Explanation", "Row", "explanation_of"]

PYTORCH = "PyTorch"


@dataclass(frozen=True)
class Row:
    """module: name in the model; kernels: what runs it, "PyTorch" where the original does; why: what is in the way."""

    module: str
    kernels: str
    why: str = ""


@dataclass(frozen=True)
class Explanation:
    """rows: one per module that has a say; nbytes: bytes of folded weights that exist now, beside the parameters';
    graphs: lines on CUDA graphs, if the model was asked to have any."""

    rows: tuple[Row, ...]
    nbytes: int
    parameter_bytes: int
    graphs: tuple[str, ...] = ()

    def __str__(self) -> str:
        grouped = _grouped(self.rows)
        width = max(len(row.module) for row in grouped)
        lines = [f"{row.module:<{width}}  {row.kernels}{f' ({row.why})' if row.why else ''}" for row in grouped]
        lines.append(f"derived tensors: {self.nbytes:,} bytes beside {self.parameter_bytes:,} of parameters")
        return "\n".join([*lines, *self.graphs])


def _grouped(rows: Sequence[Row]) -> list[Row]:
    """Rows that read the same but for the numbers in their names as one, unless one between them reads otherwise."""
    groups: list[list[Row]] = []
    latest: dict[str, list[Row]] = {}
    for row in rows:
        alike = re.sub(r"\d+", "#", row.module)
        group = latest.get(alike, [])
        if group and group[-1].module != row.module and replace(group[-1], module=row.module) == row:
            group.append(row)
        else:
            latest[alike] = [row]
            groups.append(latest[alike])
    return [
        group[0] if len(group) == 1 else replace(group[0], module=f"{group[0].module} to {group[-1].module}")
        for group in groups
    ]


def explanation_of(model: nn.Module, attached: Sequence[Attached]) -> Explanation:
    """The table for a model and what is attached to it."""
    rows = []
    graphed = [a for a in attached if isinstance(a, Graphed)]
    for graphs in graphed:
        graphs.recall()
    attached = [a for a in attached if not isinstance(a, Graphed)]
    covered = {id(part) for a in attached for part in a.covers()}
    reports: dict[int, list[Attached]] = {}
    for a in attached:
        reports.setdefault(id(a.module), []).append(a)
    for name, part in model.named_modules():
        if id(part) in reports:
            for one in reports[id(part)]:
                found = one.report()
                if found is not None:
                    kernels, why = found
                    label = f"{name}.{one.method}" if one.method != "forward" else name
                    rows.append(Row(label.lstrip(".") or "the model", PYTORCH if why else kernels, why or ""))
        elif (
            "forward" in vars(part)
            and not isinstance(vars(part)["forward"], Graphed)
            and not _below(name, model, covered)
        ):
            covered.add(id(part))
            rows.append(Row(name or "the model", PYTORCH, "forward() is overridden on the instance"))
        elif (
            not list(part.children())
            and list(part.parameters(recurse=False))
            and not (id(part) in covered or _below(name, model, covered))
        ):
            rows.append(Row(name, PYTORCH, f"{type(part).__name__}: not taken over"))
    states = {id(a.state): a.state for a in attached}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    lines = tuple(line for graphs in graphed for line in graphs.lines())
    return Explanation(tuple(rows), sum(s.derived.nbytes() for s in states.values()), size, lines)


def _below(name: str, model: nn.Module, covered: set[int]) -> bool:
    """Whether a module lies inside one that was taken over."""
    parts = name.split(".")
    return any(id(model.get_submodule(".".join(parts[:i]))) in covered for i in range(1, len(parts)))
