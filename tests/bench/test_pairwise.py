"""A pairwise sample holds every pair that occurs, and is smaller than the whole."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from vit_bench.pairwise import covering_sample, pairs

items = st.lists(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2), min_size=1), max_size=20)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(items)
def test_no_pair_is_lost(drawn: list[dict[str, int]]) -> None:
    chosen = covering_sample(drawn)
    assert chosen == sorted(set(chosen))
    every = set().union(*map(pairs, drawn)) if drawn else set()
    assert set().union(*(pairs(drawn[i]) for i in chosen)) == every


def test_a_full_product_shrinks() -> None:
    """Three values in each of four factors: 81 combinations, of which 9 could do and a greedy choice needs few more."""
    every = [dict(zip("abcd", values, strict=True)) for values in product(range(3), repeat=4)]
    assert 9 <= len(covering_sample(every)) <= 13


def test_the_same_combination_is_taken_once() -> None:
    assert covering_sample([{"a": 1, "b": 2}] * 3) == [0]
    assert covering_sample([]) == []
