"""What a kernel's machine code asks of the pipes of an SM: cycles per trip of its main loops, and its epilogue.

All cycles are those of one of the SM's four sub-cores for one warp: a pipe that takes L lanes per clock and SM is busy
with one warp's instruction for 32 / (L / 4) cycles. They are bounds from the code: each pipe for itself, nothing lost
to latency, bank conflicts or waiting. Where w warps run a loop on a sub-core, all pipes are asked for w times as much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vit_bench import rates
from vit_bench.control_flow import ControlFlow, Loop
from vit_bench.sass import Instruction
from vit_bench.tensor_ops import is_tensor, product

# Instructions whose lanes all move data of their own. LDS is none: lanes that read one word are served together.
_SHARED = ("STS", "LDSM", "STSM", "LDGSTS")
_GLOBAL_STORES = ("STG", "ST", "RED", "REDG", "UTMASTG", "UTMAREDG", "UBLKCP")
_NEVER = ("!PT", "!UPT")


@dataclass(frozen=True)
class Section:
    """A stretch of code, executed once.

    loop: whether it is one trip of a loop (otherwise the whole kernel); instructions: of one warp; mix: how many by
    opcode, most frequent first; cycles: by pipe, of one sub-core for one warp; bound: the pipe with most of them;
    flops: of one warp's share of the tensor-core products.
    """

    loop: bool
    instructions: int
    mix: dict[str, int]
    cycles: dict[str, float]
    bound: str
    flops: int


@dataclass(frozen=True)
class Epilogue:
    """instructions: of one thread behind its last main loop; loops: how many loops are among them, one trip of each."""

    instructions: int
    loops: int


def shared_bytes(instruction: Instruction) -> int:
    """Bytes of shared memory that one thread reads or writes for itself alone."""
    if instruction.base not in _SHARED:
        return 0
    parts = instruction.opcode.split(".")[1:]
    if instruction.base in ("LDSM", "STSM"):
        return 4 * max((int(part) for part in parts if part in ("2", "4")), default=1)
    for bits in (128, 64):
        if str(bits) in parts:
            return bits // 8
    return 1 if {"U8", "S8"} & set(parts) else 2 if {"U16", "S16"} & set(parts) else 4


def measure(
    code: Sequence[Instruction], positions: Sequence[int], capability: int, num_warps: int, *, loop: bool
) -> Section:
    """The instructions at `positions` of the listing `code` as a Section.

    An instruction with a predicate counts as executed, unless it never is (@!PT). What is in no list of `rates` takes
    an issue slot and nothing else: branches, barriers, the uniform data path, transfers that a unit outside the
    sub-cores makes (TMA, tensor memory). "shared" counts the data that stores, matrix loads, asynchronous copies and
    the operands of tensor-core instructions move, at 128 bytes per clock and SM; not plain loads, whose lanes may share
    words, nor TMA's writes, whose sizes are not in the code.
    num_warps: of the CTA, which share an instruction that multiplies for the whole CTA (tcgen05).

    Raises ValueError for a capability without figures and for an unknown tensor-core instruction.
    """
    mix: Counter[str] = Counter()
    cycles: dict[str, float] = dict.fromkeys(rates.PIPES, 0.0)
    total_flops = 0.0
    for position in positions:
        instruction = code[position]
        mix[instruction.base] += 1
        cycles["issue"] += 1
        if instruction.predicate in _NEVER:
            continue
        data = rates.WARP * shared_bytes(instruction)
        if is_tensor(instruction):
            made = product(code, position)
            warps = made.warps or num_warps
            flops = made.flops / warps
            rate = rates.tensor(capability, made.itemsize) / rates.SUB_CORES
            total_flops += flops
            cycles["tensor"] += flops / rate
            data = made.shared_bytes / warps
        elif kind := rates.KIND_OF.get(instruction.base):
            cycles[kind.pipe] += rates.WARP / (rates.lanes(kind, capability) / rates.SUB_CORES)
        cycles["shared"] += data / (rates.SHARED_BYTES / rates.SUB_CORES)
    bound = max(cycles, key=lambda pipe: cycles[pipe])
    return Section(loop, len(positions), dict(mix.most_common()), cycles, bound, round(total_flops))


class Kernel:
    """A compiled kernel's code, taken apart: main loops and epilogue.

    Main loops are the loops that hold tensor-core instructions, but not those around another such loop. Without any:
    the loop whose busiest pipe takes longest per trip, and those that come to at least half of it.

    One trip of a loop is everything between its head and the branch back, both sides of a condition included, but
    neither the loops nested in it (waiting loops, mostly) nor the epilogue of a persistent kernel whose loop over tiles
    was flattened into the K loop: the blocks that not every trip passes and that store to global memory.
    """

    def __init__(self, code: Sequence[Instruction], capability: int, num_warps: int) -> None:
        self.flow = ControlFlow(code)
        self._code, self._capability, self._warps = code, capability, num_warps
        self._flattened = {header: self._conditional_stores(loop) for header, loop in self.flow.loops.items()}
        trips = {header: self._section(self._trip(loop), loop=True) for header, loop in self.flow.loops.items()}
        self._main = self._choose(trips)
        self.main_loops = [trips[header] for header in sorted(self._main)]

    def _positions(self, blocks: set[int] | frozenset[int]) -> list[int]:
        return [p for start in sorted(blocks) for p in range(start, self.flow.blocks[start].stop)]

    def _section(self, blocks: set[int] | frozenset[int], *, loop: bool) -> Section:
        return measure(self._code, self._positions(blocks), self._capability, self._warps, loop=loop)

    def _trip(self, loop: Loop) -> frozenset[int]:
        return loop.own - self._flattened[loop.header]

    def _conditional_stores(self, loop: Loop) -> frozenset[int]:
        """The conditional parts of a loop's body that store to global memory."""
        flow = self.flow
        if not any(is_tensor(i) for i in flow.code(loop.own)):
            return frozenset()
        always = {b for b in loop.blocks if all(flow.dominates(b, latch) for latch in loop.latches)}
        found: set[int] = set()
        for entry in {after for b in always for after in flow.blocks[b].successors} & loop.blocks - always:
            part = {b for b in loop.blocks if flow.dominates(entry, b)}
            if any(i.base in _GLOBAL_STORES for i in flow.code(part)):
                found |= part
        return frozenset(found)

    def _choose(self, trips: dict[int, Section]) -> set[int]:
        with_products = {h for h, trip in trips.items() if trip.flops}
        if with_products or any(is_tensor(i) for i in self.flow.code(self.flow.blocks)):
            return {h for h in with_products if not with_products & self.flow.loops[h].blocks - {h}}
        longest = {h: trip.cycles[trip.bound] for h, trip in trips.items()}
        return {h for h, cycles in longest.items() if 2 * cycles >= max(longest.values())}

    @property
    def whole(self) -> Section:
        """All of the kernel, each loop passed once: what there is to say about one without a main loop."""
        return self._section(frozenset(self.flow.blocks), loop=False)

    @property
    def epilogue(self) -> Epilogue | None:
        """The instructions of one thread from the end of its last main loop on.

        Counted are the blocks that can be reached from there without a branch back, once each, both sides of every
        condition; not the subroutines for rare cases (64-bit divisions) that they call. In a persistent kernel that is
        one tile's epilogue: where the main loop lies inside another loop, up to the end of that loop's body; where the
        two were flattened into one, the blocks that only the last trip of a tile passes. Where several groups of warps
        have main loops of their own (warp specialisation), that of the longest epilogue.

        None for a kernel without main loop, and where nothing behind the main loop stores to global memory: the results
        leave by other warps than those that issue the products (`finishing`, tcgen05 with warp specialisation).
        """
        return max(self._behind(stores=True), key=lambda e: e.instructions, default=None)

    @property
    def finishing(self) -> tuple[Epilogue, Epilogue] | None:
        """Where other warps finish than those that multiply: what a thread of these executes behind its last main loop,
        to hand its sums over, as `epilogue` counts it; and one trip of the longest loop without products that stores
        to global memory, in which a thread of the others finishes some of them.

        None where those that multiply store results, and where there is no such loop.
        """
        flow = self.flow
        handing_over = max(self._behind(stores=False), key=lambda e: e.instructions, default=None)
        trips = [code for loop in flow.loops.values() if self._stores(code := flow.code(loop.own))]
        trips = [code for code in trips if not any(is_tensor(i) for i in code)]
        if self.epilogue is not None or handing_over is None or not trips:
            return None
        return handing_over, Epilogue(max(map(len, trips)), 0)

    @staticmethod
    def _stores(code: Sequence[Instruction]) -> bool:
        return any(i.base in _GLOBAL_STORES for i in code)

    def _behind(self, *, stores: bool) -> list[Epilogue]:
        """What threads execute behind each main loop that has no other behind it, where that does or does not store to
        global memory."""
        flow, found = self.flow, []
        for header in self._main:
            loop = flow.loops[header]
            blocks = set(self._flattened[header])
            if not blocks:
                around = None if loop.parent is None else flow.loops[loop.parent].blocks
                blocks = flow.reachable(flow.exits(loop), around)
                if any(blocks & flow.loops[other].blocks for other in self._main if other != header):
                    continue
            code = flow.code(blocks)
            if self._stores(code) == stores:
                found.append(Epilogue(len(code), sum(inner in blocks for inner in flow.loops)))
        return found
