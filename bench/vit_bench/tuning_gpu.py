"""Compiling, running and timing candidates on the GPU at hand: what `tuning.tune` is given outside of tests."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vit_bench.cases import Prepared, prepare
from vit_bench.tile_choices import forced
from vit_bench.tuning import Bench, GpuLostError
from vit_bench.tuning_candidates import compiled, reason, title, verified
from vit_bench.tuning_problems import Problem
from vit_kernels import tiles
from vit_kernels.device import attach
from vit_kernels.tuned import Tuned, gpus_here

ROUNDS = 25  # timings of each candidate
RUNS = 10  # of one candidate in one timing, each on a cold cache
_LEAST_FLUSHED = 64 << 20  # bytes that are written to empty the L2 cache, at least


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """The reference's products are summed in fp32 and not rounded to tf32, whatever this process has set."""
    settings: Any = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = {name: getattr(settings, name) for name in names}
    try:
        for name in names:
            setattr(settings, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


class _Current:
    """The problem that is being tuned, its inputs on the GPU and its reference: made once for all candidates."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._problem: Problem | None = None
        self._prepared: Prepared | None = None

    def of(self, problem: Problem, judged_on: torch.device | None = None) -> Prepared:
        """judged_on: where results are compared from now on; the GPU by default, which is fast."""
        if self._problem is not problem or self._prepared is None or judged_on is not None:
            self._problem = self._prepared = None  # so that two problems never take memory at once
            where = judged_on or self._device
            with exact_products():
                self._prepared = prepare(problem.case(), problem.dtype, self._device, judged_on=where)
            self._problem = problem
        return self._prepared


def _judged(current: _Current, problem: Problem, choice: Any) -> dict[str, Any]:
    """`verified`, with the comparison on the CPU where the GPU's memory does not hold it."""
    try:
        return verified(current.of(problem), choice)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
    return verified(current.of(problem, torch.device("cpu")), choice)


def captured(call: Callable[[], object], body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `body`. `call`, which it consists of, is made twice before: what happens only once must not be
    captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def _cold(flush: torch.Tensor, run: Callable[[], object] | None) -> torch.cuda.CUDAGraph:
    """A CUDA graph that empties the L2 cache and runs, `RUNS` times."""

    def call() -> None:
        if run is not None:
            run()

    def body() -> None:
        for _ in range(RUNS):
            flush.zero_()
            call()

    return captured(call, body)


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one replay by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def cold_times(runs: Sequence[Callable[[], object]], device: torch.device) -> list[list[float] | str]:
    """Seconds of a run of each, in CUDA graphs, the L2 cache written over before every run; or why there are none.

    The runs take turns, so that a falling clock hits all alike. A graph that only writes over the cache takes its turn,
    too, and its time is subtracted.
    """
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(2 * l2, _LEAST_FLUSHED), dtype=torch.uint8, device=device)
    found: list[list[float] | str] = []
    graphs: list[tuple[torch.cuda.CUDAGraph, list[float]]] = []
    for run in runs:
        seconds: list[float] = []
        try:
            graphs.append((_cold(flush, run), seconds))
            found.append(seconds)
        except RuntimeError as error:
            found.append(f"cannot be captured in a CUDA graph: {reason(error)}")
    alone = _cold(flush, None)
    for graph in (alone, *(graph for graph, _ in graphs)):
        graph.replay()
    for _ in range(ROUNDS):
        empty = _replayed(alone)
        for graph, seconds in graphs:
            seconds.append(max(_replayed(graph) - empty, 0.0) / RUNS)
    return found


def _forced_call(problem: Problem, choice: Any, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with forced(problem.kernel, choice):
            return call()

    return run


def gpu_bench(device: torch.device) -> Bench:
    """Candidates compiled for, run on and timed on this GPU, on one problem's inputs at a time."""
    current = _Current(device)
    where = next(where for where in gpus_here() if where is None or where[1] == device.index)

    def compile_(problem: Problem, choice: Any) -> str:
        return "" if choice is tiles.TORCH else compiled(problem.kernel, choice, current.of(problem).call)[1]

    def verify(problem: Problem, choice: Any) -> dict[str, Any]:
        try:
            figures = _judged(current, problem, choice)
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            try:
                torch.cuda.synchronize(device)
            except RuntimeError:
                lost = f"{title(choice)} left the GPU unusable: {reason(error)}"
                raise GpuLostError(lost, title(choice), reason(error)) from error
            raise
        return figures

    def time(problem: Problem, choices: Sequence[Any]) -> list[list[float] | str]:
        call = current.of(problem).call
        return cold_times([_forced_call(problem, choice, call) for choice in choices], device)

    return Bench(compile_, verify, time, functools.partial(_use, where))


def _use(where: Any, table: Tuned) -> None:
    attach({where: table})
