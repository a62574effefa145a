"""Mutants made mechanically from the kernels and launchers, and a sample of them by seed.

Left out are the tile choices and device.py: what they compute is how fast a kernel runs, not what it returns, and
tests/kernels/test_tiles.py and test_gemm_cycles.py hold them to figures of their own. (The tests hold the launchers to
using the tile they were given.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

from .mutant import ROOT, Mutant, digest
from .operators import OPERATORS
from .source import Source

FOLDER = Path("kernels/vit_kernels")
MODULES = (
    "attention", "attention_block", "attention_checks", "checks", "folding", "launch", "linear",
    "linear_epilogue", "linear_kernels", "linear_parts", "mlp", "norm", "patch_embed", "primitives", "qk_rope",
    "qk_rope_checks",
)  # fmt: skip


def candidates(file: Path, root: Path = ROOT) -> list[Mutant]:
    """Every mutant of a file, in source order, those left out that say the same as an earlier one.

    The id holds no line number, so that a change elsewhere in the file leaves it alone: file, function, operator, hash
    of the line, and a count among those of the same line.
    """
    source = Source((root / file).read_bytes())
    counts: dict[str, int] = defaultdict(int)
    found = []
    for statement in source.tree.body:
        seen = {source.squeezed(statement)}
        for site in source.sites(statement):
            for kind, operator in OPERATORS.items():
                for edit in operator(source, site):
                    stem = f"{file.stem}.{site.function}.{kind}.{digest(source.line(site.node), 6)}"
                    number = counts[stem]
                    counts[stem] += 1
                    changed = source.squeezed(statement, edit)
                    if changed not in seen:
                        seen.add(changed)
                        found.append(Mutant(f"{stem}.{number}", str(file), kind, (edit,)))
    return found


def all_candidates(root: Path = ROOT) -> list[Mutant]:
    return [mutant for module in MODULES for mutant in candidates(FOLDER / f"{module}.py", root)]


def sample(count: int, seed: int, root: Path = ROOT) -> list[Mutant]:
    """`count` mutants: every file by the square root of its number, every operator of a file in turn, hashes for dice.

    A mutant's rank depends on the seed and its own id alone, so a change of one line moves few others in or out.
    """
    groups = {module: candidates(FOLDER / f"{module}.py", root) for module in MODULES}
    roots = {module: math.sqrt(len(group)) for module, group in groups.items()}
    chosen: list[Mutant] = []
    share, given = 0.0, 0
    for module, group in groups.items():
        share += count * roots[module] / sum(roots.values())
        quota = round(share) - given
        given += quota
        chosen += _in_turn(group, seed)[:quota]
    return chosen


def _in_turn(group: list[Mutant], seed: int) -> list[Mutant]:
    by_kind: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in sorted(group, key=lambda m: digest(f"{seed} {m.id}", 16)):
        by_kind[mutant.kind].append(mutant)
    order = sorted(by_kind, key=lambda kind: digest(f"{seed} {kind}", 16))
    longest = max(map(len, by_kind.values()))
    return [by_kind[kind][turn] for turn in range(longest) for kind in order if turn < len(by_kind[kind])]
