"""How commands print tables: a title, a line that explains it, columns that fit a hundred characters."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100  # where the output is no terminal


def plain_console() -> Console:
    """A console that colours no numbers."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def print_table(
    console: Console,
    title: str,
    note: str,
    heads: Iterable[str],
    rows: Iterable[Iterable[str]],
    texts: Iterable[int] = (0,),
) -> None:
    """A table under a title and a line that explains it; `texts` are the columns that are no numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number in texts else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print()
    console.print(Text(title, style="bold"))
    if note:
        console.print(Text(note))
    console.print(table)
