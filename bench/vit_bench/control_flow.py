"""The control flow of a kernel's machine code: basic blocks, dominators and natural loops.

Address ranges between a branch and its target are not enough: the compiler puts waiting loops behind the end of the
kernel, from where they branch back over everything in between. So loops are found as compilers find them, by back
edges: a branch to a block that every path to the branch has passed (Aho, Lam, Sethi, Ullman: Compilers, section 9.6).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vit_bench.sass import Instruction

# A CALL of a label inside the kernel is how ptxas writes a jump that is too long for it; real subroutines have names.
_JUMPS = ("BRA", "BRX", "JMP", "JMX", "CALL")
_ONLY_A_LABEL = re.compile(r"`\(\.L_\w+\)")
_ALWAYS = ("", "PT", "UPT")


@dataclass(frozen=True)
class Block:
    """Instructions [start, stop) of the listing that are executed one after the other."""

    start: int
    stop: int
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """A natural loop. Blocks are named by their first instruction.

    header: where it is entered; latches: the blocks that branch back there; blocks: all of it; own: without the loops
    nested in it; parent: the header of the loop it is nested in.
    """

    header: int
    latches: tuple[int, ...]
    blocks: frozenset[int]
    own: frozenset[int]
    parent: int | None


class ControlFlow:
    """Blocks, dominators and loops of one kernel, without its subroutines and what no path reaches.

    blocks: by first instruction, in an order in which every block but a loop's header follows all that lead to it;
    loops: by header.
    """

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.instructions = instructions
        blocks = _blocks(instructions)
        order = _reverse_postorder(blocks)
        self.blocks = {start: blocks[start] for start in order}
        self._dominator = _dominators(self.blocks)
        self.loops = self._find_loops()

    def dominates(self, a: int, b: int) -> bool:
        """Whether every path to block b goes through block a."""
        at: int | None = b
        while at is not None and at != a:
            at = self._dominator[at]
        return at == a

    def code(self, blocks: Iterable[int]) -> list[Instruction]:
        """The instructions of these blocks."""
        return [i for start in sorted(blocks) for i in self.instructions[start : self.blocks[start].stop]]

    def exits(self, loop: Loop) -> set[int]:
        """The blocks outside a loop that its blocks lead to."""
        return {after for block in loop.blocks for after in self.blocks[block].successors} - loop.blocks

    def reachable(self, starts: Iterable[int], within: Iterable[int] | None = None) -> set[int]:
        """The blocks on the way from `starts` onwards, through no back edge, and through no block outside `within`."""
        allowed = set(self.blocks if within is None else within)
        found: set[int] = set()
        waiting = [start for start in starts if start in allowed]
        while waiting:
            block = waiting.pop()
            if block not in found:
                found.add(block)
                after = self.blocks[block].successors
                waiting.extend(s for s in after if s in allowed and not self.dominates(s, block))
        return found

    def _find_loops(self) -> dict[int, Loop]:
        before: dict[int, list[int]] = {start: [] for start in self.blocks}
        for start, block in self.blocks.items():
            for after in block.successors:
                before[after].append(start)
        bodies: dict[int, set[int]] = {}
        latches: dict[int, list[int]] = {}
        for start, block in self.blocks.items():
            for header in block.successors:
                if self.dominates(header, start):
                    latches.setdefault(header, []).append(start)
                    body = bodies.setdefault(header, {header})
                    waiting = [start]
                    while waiting:
                        member = waiting.pop()
                        if member not in body:
                            body.add(member)
                            waiting.extend(before[member])
        loops = {}
        for header, body in bodies.items():
            nested = [other for inner, other in bodies.items() if inner != header and inner in body]
            around = [outer for outer, other in bodies.items() if outer != header and header in other]
            loops[header] = Loop(
                header=header,
                latches=tuple(latches[header]),
                blocks=frozenset(body),
                own=frozenset(body.difference(*nested)),
                parent=min(around, key=lambda outer: len(bodies[outer]), default=None),
            )
        return loops


def _blocks(instructions: Sequence[Instruction]) -> dict[int, Block]:
    jumps = {position: i for position, i in enumerate(instructions) if i.base in _JUMPS and i.targets}
    ends = {position for position, i in enumerate(instructions) if i.base == "EXIT"}
    starts = {0, *(target for i in jumps.values() for target in i.targets), *(p + 1 for p in (*jumps, *ends))}
    cuts = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    blocks = {}
    for start, stop in itertools.pairwise(cuts):
        last = instructions[stop - 1]
        targets = last.targets if stop - 1 in jumps else ()
        falls_through = stop < len(instructions) and not _leaves_always(last)
        blocks[start] = Block(start, stop, tuple(dict.fromkeys((*targets, *((stop,) if falls_through else ())))))
    return blocks


def _leaves_always(last: Instruction) -> bool:
    """Whether the instruction behind this one is not executed next."""
    if last.predicate not in _ALWAYS:
        return False
    if last.base in ("EXIT", "BRX", "JMX"):
        return True
    # A condition may stand among the operands instead: BRA.U UP0, `(.L_x_1)
    return _ONLY_A_LABEL.fullmatch(last.operands) is not None


def _reverse_postorder(blocks: dict[int, Block]) -> list[int]:
    order: list[int] = []
    seen = {0}
    path = [(0, iter(blocks[0].successors))]
    while path:
        block, waiting = path[-1]
        for after in waiting:
            if after not in seen:
                seen.add(after)
                path.append((after, iter(blocks[after].successors)))
                break
        else:
            order.append(block)
            path.pop()
    return order[::-1]


def _dominators(blocks: dict[int, Block]) -> dict[int, int | None]:
    """The immediate dominator of each block, in reverse postorder (Cooper, Harvey and Kennedy, 2001)."""
    number = {start: n for n, start in enumerate(blocks)}
    before: dict[int, list[int]] = {start: [] for start in blocks}
    for start, block in blocks.items():
        for after in block.successors:
            before[after].append(start)
    entry = next(iter(blocks))
    known: dict[int, int] = {entry: entry}
    changed = True
    while changed:
        changed = False
        for start in blocks:
            if start == entry:
                continue
            paths = [b for b in before[start] if b in known]
            common = paths[0]
            for other in paths[1:]:
                while common != other:
                    while number[common] > number[other]:
                        common = known[common]
                    while number[other] > number[common]:
                        other = known[other]
            if known.get(start) != common:
                known[start] = common
                changed = True
    return {start: None if start == entry else known[start] for start in blocks}
