"""Buffers that live at the same time never overlap; those that do not may."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vit_engine.arena import ALIGNMENT, Buffer, pack

buffers = st.lists(
    st.builds(
        lambda nbytes, first, length: Buffer(nbytes, first, first + length),
        st.integers(1, 5000),
        st.integers(0, 12),
        st.integers(0, 5),
    ),
    max_size=14,
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(buffers)
def test_nothing_alive_is_overwritten(drawn: list[Buffer]) -> None:
    offsets, size = pack(dict(enumerate(drawn)))
    assert offsets.keys() == set(range(len(drawn)))
    for i, a in enumerate(drawn):
        assert offsets[i] % ALIGNMENT == 0 and offsets[i] + a.nbytes <= size
        for j, b in enumerate(drawn[:i]):
            together = a.first <= b.last and b.first <= a.last
            apart = offsets[i] + a.nbytes <= offsets[j] or offsets[j] + b.nbytes <= offsets[i]
            assert apart or not together, (a, b)


def test_memory_is_reused() -> None:
    """A chain of equal buffers, each read by the next step only, needs two of them at a time."""
    chain = {step: Buffer(1024, step, step + 1) for step in range(20)}
    assert pack(chain)[1] == 2 * 1024


def test_nothing_to_place() -> None:
    assert pack({}) == ({}, 0)
