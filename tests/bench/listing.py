"""Hand-written machine code in the form in which nvdisasm prints it."""

from __future__ import annotations

from vit_bench.sass import Instruction, parse


def code(text: str) -> list[Instruction]:
    """Instructions from one per line; a label stands on a line of its own and ends with a colon."""
    lines, address = [], 0
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            lines.append(line)
        else:
            lines.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return parse("\n".join(lines))
