"""A small sample of many combinations in which every pair of values that occurs together still does.

Most faults of a configuration come from one value or from two together, so a sample that holds every pair finds most of
what the whole would, at a fraction of the cost (Cohen, Dalal, Fredman, Patton: "The AETG System", 1997).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

Item = Mapping[str, Hashable]
Pair = tuple[tuple[str, Hashable], tuple[str, Hashable]]


def pairs(item: Item) -> set[Pair]:
    """Every two factors of an item with their values; an item of one factor has that factor paired with itself."""
    factors = sorted(item.items(), key=lambda factor: factor[0])
    return set(combinations(factors, 2)) or {(factor, factor) for factor in factors}


def covering_sample(items: Sequence[Item]) -> list[int]:
    """Indices of some of the items, in order, that between them have every pair that any item has.

    Greedy: the next one is always the item with the most pairs not seen yet, the first of several. An item whose gain
    was computed earlier can only have lost since, so most gains are never computed again.
    """
    waiting = [pairs(item) for item in items]
    seen: set[Pair] = set()
    heap = [(-len(own), index) for index, own in enumerate(waiting)]
    heapq.heapify(heap)
    chosen = []
    while heap:
        _, index = heapq.heappop(heap)
        gain = len(waiting[index] - seen)
        if not gain:
            continue
        if heap and -heap[0][0] > gain:
            heapq.heappush(heap, (-gain, index))
            continue
        chosen.append(index)
        seen |= waiting[index]
    return sorted(chosen)
