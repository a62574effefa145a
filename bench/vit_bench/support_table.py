"""The README's support table, made from the evidence files and from nothing else.

    python -m vit_bench.support_table            # rewrite the table in README.md
    python -m vit_bench.support_table --check    # fail when README.md says something else

A cell names the highest rung that a passing record shows for the kernels at hand (`vit_bench.current`). A record of
other source, or without a tile that is chosen now, counts for nothing, so changing a kernel drops its cells to what is
still shown, until the runs are repeated.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vit_bench import current, records
from vit_bench.arguments import command

BEGIN = "<!-- support table: written by `python -m vit_bench.support_table` from bench/evidence/; do not edit -->"
END = "<!-- end of support table -->"
GENERATIONS = {
    80: "Ampere, sm_80 (A100)",
    86: "Ampere, sm_86 (RTX 30, A10)",
    89: "Ada, sm_89 (RTX 40, L4)",
    90: "Hopper, sm_90 (H100, H200)",
    100: "Blackwell, sm_100 (B200)",
    120: "Blackwell, sm_120 (RTX 50)",
}
NOTHING = "nothing shown"

Shown = set[tuple[str, str, str, int]]


def shown(folder: Path, counts: Callable[[str, records.Record], bool] = current.counts) -> Shown:
    """(rung, kernel, dtype, capability) of every record that counts, asked with its rung; capability 0: no GPU."""
    return {
        (rung, *record.key)
        for rung in records.RUNGS
        for record in records.load(folder / f"{rung}.json")
        if counts(rung, record)
    }


def cell(facts: Shown, kernel: str, dtype: str, capability: int) -> str:
    """The highest rung that the facts show for one kernel, dtype and GPU generation."""

    def has(rung: str, where: int = capability) -> bool:
        return (rung, kernel, dtype, where) in facts

    if has("executed"):
        return "executed on GPU"
    if has("emulated"):
        return "emulated"
    if has("sanitized") and has("compiled"):
        return "sanitized + compiled"
    if has("compiled"):
        return "compiled only"
    if has("interpreted", 0):
        return "interpreted"
    return NOTHING


def table(facts: Shown) -> str:
    """The table in Markdown: a column per kernel, a row per GPU generation and what is shown for its dtypes."""
    lines = [
        "| GPU generation | dtype | " + " | ".join(f"`{kernel}`" for kernel in records.KERNELS) + " |",
        "|---" * (2 + len(records.KERNELS)) + "|",
    ]
    for capability, generation in GENERATIONS.items():
        alike: dict[str, list[str]] = {}
        for dtype in records.DTYPES:
            cells = " | ".join(cell(facts, kernel, dtype, capability) for kernel in records.KERNELS)
            alike.setdefault(cells, []).append(dtype)
        lines += [f"| {generation} | {', '.join(dtypes)} | {cells} |" for cells, dtypes in alike.items()]
    return "\n".join(lines)


def replaced(readme: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The README with what stands between the markers replaced."""
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ValueError(f"README must hold the two marker lines once, in this order:\n{begin}\n{end}")
    head, rest = readme.split(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command("support_table", __doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the README's table differs")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--evidence", type=Path, default=Path("bench/evidence"), help="folder of the evidence files")
    options = parser.parse_args(arguments)

    try:
        before = options.readme.read_text(encoding="utf-8")
        replaced(before, "")  # Whether there is a place for the table is known sooner than the table.
        after = replaced(before, table(shown(options.evidence)))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not options.check:
        options.readme.write_text(after, encoding="utf-8")
        return 0
    if before == after:
        return 0
    print(f"{options.readme} does not hold the table that the evidence files give:", file=sys.stderr)
    for line in difflib.unified_diff(
        before.splitlines(), after.splitlines(), "README.md", "evidence", n=0, lineterm=""
    ):
        print(line, file=sys.stderr)
    print("Run `python -m vit_bench.support_table` and commit the result.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
