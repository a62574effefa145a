"""What the property tests draw: sizes, memory layouts and dtypes; and how they run and judge what was drawn.

An example is plain data (numbers, names, `Layout`s and a seed), so that Hypothesis can print and shrink it. Tensors are
drawn from the seed by `tests.weights.Draw`, with which every parameter matters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from vit_bench.tolerance import check, ulp
from vit_kernels import attention_tiles, fold_norm, gemm_tiles, mlp_tiles, reference, tiles

from ..kernels.common import in_float64, judge_stats
from ..rung import DTYPES
from ..weights import Draw, moments

Arguments = dict[str, Any]

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)
poisons = st.sampled_from([float("nan"), float("inf"), -float("inf")])


def sizes(least: int, most: int) -> st.SearchStrategy[int]:
    """Sizes of an axis: those on either side of a tile's edge, any, and the smallest.

    The first is what Hypothesis begins and ends with: a few examples must not be about nothing at all.
    """
    edges = [n for edge in (16, 32, 64, 128) for n in (edge + 1, edge, edge - 1) if least <= n <= most]
    few = st.integers(least, min(least + 4, most))
    return st.one_of(st.sampled_from(edges or [most]), st.integers(least, most), few)


def batches(least: int, most: int) -> st.SearchStrategy[int]:
    """Numbers of images; none in few examples, which then say little else (Hypothesis likes both ends of a list)."""
    some = list(range(1, most + 1))
    return st.sampled_from(some * 2 + [0] * (least == 0) + some * 2)


any_gemm_tile = st.builds(
    gemm_tiles.GemmTile,
    block_m=st.sampled_from([16, 32]),
    block_n=st.sampled_from([64, 128]),
    block_k=st.sampled_from([16, 32]),
    num_warps=st.just(4),
    num_stages=st.just(2),
    group_m=st.sampled_from([1, 2, 8]),
)


@contextlib.contextmanager
def tiled(**choices: Any) -> Iterator[None]:
    """In this block `choose_NAME` gives the tile NAME=... instead of what suits the whole device: small ones, so
    that small shapes have several programs, steps and tails."""
    with pytest.MonkeyPatch.context() as patch:
        for name, tile in choices.items():
            (module,) = (m for m in (attention_tiles, gemm_tiles, mlp_tiles, tiles) if f"choose_{name}" in vars(m))
            patch.setattr(module, f"choose_{name}", lambda *a, tile=tile, **k: tile)
        yield


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: as a strided view into a buffer of NaN, which no kernel may let through.

    order: its axes from the slowest to the fastest; step: every step-th place along an axis is used; before: places
    in front of the first; repeated: axes of stride 0, along which all values are equal.
    """

    order: tuple[int, ...]
    step: tuple[int, ...]
    before: tuple[int, ...]
    repeated: tuple[int, ...] = ()

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """x, contiguous, with its first value along each repeated axis for all others."""
        return self._first(x).expand(x.shape).contiguous()

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """The `values` of x in this layout."""
        first = self._first(x)
        poison = float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else 255
        ends = [before + n * step for before, n, step in zip(self.before, first.shape, self.step, strict=True)]
        buffer = torch.full([ends[a] + 1 for a in self.order], poison, dtype=x.dtype, device=x.device)
        view = buffer[tuple(slice(self.before[a], ends[a], self.step[a]) for a in self.order)]
        view = view.permute([self.order.index(a) for a in range(x.ndim)])
        return view.copy_(first).expand(x.shape)

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        for axis in self.repeated:
            x = x.narrow(axis, 0, min(1, x.shape[axis]))
        return x


def layouts(axes: int, repeatable: tuple[int, ...] | None = None) -> st.SearchStrategy[Layout]:
    """Layouts of a tensor of so many axes; the simplest is contiguous. repeatable: axes that may have stride 0, all by
    default."""
    repeated = st.lists(st.sampled_from(range(axes) if repeatable is None else repeatable), unique=True, max_size=axes)
    return st.builds(
        Layout,
        order=st.permutations(range(axes)).map(tuple),
        step=st.tuples(*[st.integers(1, 3)] * axes),
        before=st.tuples(*[st.integers(0, 2)] * axes),
        repeated=st.just(()) if repeatable == () else st.one_of(st.just(()), repeated.map(tuple)),
    )


def laid_out(arguments: Arguments, layouts: dict[str, Layout]) -> tuple[Arguments, Arguments]:
    """(arguments with the values of their layouts, contiguous; the same as views in those layouts)."""
    found = {name: layout for name, layout in layouts.items() if arguments[name] is not None}
    dense = {name: layout.values(arguments[name]) for name, layout in found.items()}
    views = {name: layout.view(arguments[name]) for name, layout in found.items()}
    for name, view in views.items():
        assert torch.equal(view, dense[name])
    return arguments | dense, arguments | views


class Jittered(Draw):
    """What `Draw` draws from the same seed, every value off by up to 8 units in the last place: the same problem to the
    eye, and new to rounding."""

    def __init__(self, dtype: torch.dtype, seed: int, jitter: int) -> None:
        super().__init__(dtype, seed)
        self.jitter = torch.Generator("cpu").manual_seed(jitter)

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        off = (2 * torch.rand(x.shape, generator=self.jitter) - 1) * 8 * torch.finfo(self.dtype).eps
        return super()._own(x * (1 + off))


DRAWS, NARROW = 16, 16


def judge_among(
    ours: torch.Tensor,
    reference: Callable[..., Any],
    build: Callable[[Draw], Arguments],
    dtype: torch.dtype,
    seed: int,
    *,
    pick: int | None = None,
    one_row: bool = False,
) -> None:
    """Holds a kernel's result for build(Draw(dtype, seed)) against the reference, by the tolerance rule as it stands.

    The yardstick of that rule is eager's largest error, and in a small example it is a matter of luck: one result of
    one column is as often exact as not, and what comes from one hidden feature is all wrong by the same. So the example
    is judged as one part of a larger one: the rest are the same problem `Jittered`, with eager's own results in the
    place of ours. That adds to how wrong eager is seen to be at this very problem, and nothing else.

    Rows of a few columns become one row of all (`one_row`: in any case): relative to one value that happens to cancel,
    every error is large; as an element it is still held to its own allowance.

    pick: which result of a reference that returns several.
    """
    ours_rows, eager_rows, truth_rows = [], [], []
    for jitter in range(DRAWS):
        arguments = build(Jittered(dtype, seed, jitter) if jitter else Draw(dtype, seed))
        eager, truth = reference(**arguments), reference(**in_float64(arguments))
        if pick is not None:
            eager, truth = eager[pick], truth[pick]
        ours_rows.append(eager if jitter else ours)
        eager_rows.append(eager)
        truth_rows.append(truth)
    assert ours.shape == truth_rows[0].shape
    assert ours.dtype == eager_rows[0].dtype
    if ours.numel() == 0:
        return
    one_row |= ours.shape[-1] < NARROW
    shape, axis = ((1, -1), 1) if one_row else ((-1, ours.shape[-1]), 0)
    whole = (torch.cat([x.reshape(shape) for x in rows], axis) for rows in (ours_rows, eager_rows, truth_rows))
    check(*whole, name=reference.__name__)


def folded(arguments: Arguments, weight: str = "weight", bias: str = "bias") -> Arguments:
    """A reference's arguments as the launcher takes them: the norm folded into these two."""
    arguments = dict(arguments)
    gamma, beta = arguments.pop("norm_weight"), arguments.pop("norm_bias")
    if arguments["norm"] == "none":
        return arguments
    pieces = fold_norm(arguments[weight], arguments[bias], gamma, beta, kind=arguments["norm"])
    return arguments | dict(zip((weight, "column_sum", bias), pieces, strict=True))


def several(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def in_dtype(arguments: Arguments, names: Iterable[str], dtype: torch.dtype) -> Arguments:
    """These arguments, where they are given, in a dtype that holds their values."""
    return arguments | {name: arguments[name].to(dtype) for name in names if arguments[name] is not None}


def partial_stats(x: torch.Tensor, group: int = 64) -> torch.Tensor:
    """Row statistics of x [M, N] as its producer emits them: [2, ceil(N / 64), M], mean and M2 per 64 columns."""
    parts = [reference.row_stats(x[:, start : start + group]) for start in range(0, x.shape[1], group)]
    return torch.cat(parts, 1).contiguous()


def judge_emitted(stats: torch.Tensor, y: torch.Tensor) -> None:
    """Holds emitted row statistics against those of the rows, as `judge_stats` does, rows that hardly vary apart.

    A mean that is off by 8 units in the last place, which that rule allows, leaves as much in every deviation. Beside
    the M2 of a row that varies by thousands of units it is nothing; of a row of equal values it is all of M2.
    """
    deviation = 2000 * ulp(y.double().abs().amax(1), torch.float32)
    alike = y.double().var(1, correction=0).sqrt() <= deviation
    if not alike.all():
        judge_stats(stats[:, :, ~alike], y[~alike])
    mean, m2 = moments(stats[:, :, alike], y.shape[1])
    assert ((mean - y[alike].double().mean(1)).abs() <= deviation[alike] / 250).all()
    assert ((m2 / y.shape[1]).sqrt() <= 1.01 * deviation[alike]).all()


LARGER, ONE_AXIS_MORE, FLOAT64 = "larger", "one-axis-more", "float64"
SPOILT = (LARGER, ONE_AXIS_MORE, FLOAT64)


def spoilt(tensor: torch.Tensor, how: str, axis: int) -> torch.Tensor:
    if how == LARGER:
        return torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
    return tensor[None] if how == ONE_AXIS_MORE else tensor.double()


def refuses(launcher: Callable[..., Any], good: Arguments, name: str, bad: torch.Tensor, how: str) -> None:
    """The launcher raises TypeError or ValueError that begins with the name of the argument.

    A size that two arguments share may be blamed on either.
    """
    launcher(**good)
    with pytest.raises((TypeError, ValueError)) as caught:
        launcher(**good | {name: bad})
    message = str(caught.value)
    blamed = message.split(" ")[0]
    assert blamed == name or (how == LARGER and blamed in good), message
    assert "got" in message, message
