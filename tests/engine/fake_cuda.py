"""CUDA graphs without a GPU: what a capture ran is noted operator by operator and run again, on the same memory.

The stand-in reads tensors from outside the capture by their addresses, as a graph does, and fails where such memory has
been freed; it writes results where the capture left them; and it fails where two streams use the memory of one pool
without one having waited for the other. What it cannot show is what only a driver knows: which calls a real capture
forbids beside the ones that wait for the GPU, how a broken capture is cleaned up, and any time.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from vit_engine import graphs

from .stand_in import at_address

WAITS = ("aten._local_scalar_dense.default", "aten.nonzero.default")  # for a number on the GPU: no capture has that

Clock = dict[int, int]


class Stream:
    """A stream with a vector clock: what of the other streams' work has to be done before its own next."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.clock: Clock = {self.number: 0}

    def work(self) -> tuple[int, int]:
        self.clock[self.number] += 1
        return self.number, self.clock[self.number]

    def wait(self, clock: Clock) -> None:
        for number, time in clock.items():
            self.clock[number] = max(self.clock.get(number, 0), time)

    def wait_stream(self, other: Stream) -> None:
        self.wait(other.clock)

    def wait_event(self, event: Event) -> None:
        self.wait(event.clock)


class Event:
    def __init__(self) -> None:
        self.clock: Clock = {}
        self.synchronized = 0

    def record(self, stream: Stream) -> None:
        stream.work()
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        self.synchronized += 1


class _Outside:
    """A tensor that a graph knows by its address alone."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage, self.address = StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr()
        self.like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    def tensor(self) -> Tensor:
        assert not self.storage.expired(), "a graph read memory that had been freed"
        return at_address(self.address, self.like)


class Graph(TorchDispatchMode):
    """A captured graph, and the mode under which it is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[tuple[Any, Any, list[Tensor]]] = []
        self.made: dict[int, Tensor] = {}
        self.cuda: Any = None
        self.pool: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        noted = tree_map(self._noted, (args, kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        new = [t for t in results if t.untyped_storage().data_ptr() not in given]
        for tensor in new:
            self.made[tensor.untyped_storage().data_ptr()] = tensor
        if not func.is_view:
            self.nodes.append((func, noted, new))
        return result

    def _noted(self, leaf: Any) -> Any:
        outside = isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.made
        return _Outside(leaf) if outside and leaf.device.type != "meta" else leaf

    @torch.inference_mode()
    def replay(self) -> None:
        self.cuda.used(self.pool)
        self.cuda.replays += 1
        for func, noted, results in self.nodes:
            args, kwargs = tree_map(lambda leaf: leaf.tensor() if isinstance(leaf, _Outside) else leaf, noted)
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for result, value in zip(results, again if results else (), strict=True):
                result.copy_(value)


class FakeCuda:
    """The part of torch.cuda that graphs.py uses. replays, captures: how many there were."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.replays, self.captures = 0, 0
        self.pools: list[object] = []
        self._first = Stream()
        self._thread = threading.local()
        self._last: dict[int, tuple[int, int]] = {}  # of each pool, the last stream that used it, and when

    def CUDAGraph(self) -> Graph:
        return Graph()

    def graph_pool_handle(self) -> object:
        self.pools.append(object())
        return self.pools[-1]

    def current_stream(self) -> Stream:
        return getattr(self._thread, "stream", self._first)

    def is_current_stream_capturing(self) -> bool:
        return getattr(self._thread, "capturing", False)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._thread.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._thread.stream = before

    @contextlib.contextmanager
    def graph(self, graph: Graph, *, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local" and not self.is_current_stream_capturing()
        graph.cuda, graph.pool = self, pool
        self._thread.capturing = True
        try:
            with self.stream(stream), graph:
                yield
            self.captures += 1
        finally:
            self._thread.capturing = False

    def used(self, pool: object) -> None:
        """A replay on the current stream: whoever used the pool before must have been waited for."""
        stream = self.current_stream()
        number, time = self._last.get(id(pool), (stream.number, 0))
        assert stream.clock.get(number, -1) > time or number == stream.number, "two streams in one pool at once"
        self._last[id(pool)] = stream.work()


@pytest.fixture
def fake_cuda(repeated: list[str], monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """CPU tensors count as a GPU's, for CUDA graphs and repeated launches."""
    fake = FakeCuda()
    monkeypatch.setattr(graphs, "cuda", fake)
    monkeypatch.setattr(graphs, "on_gpu", lambda tensor: True)
    return fake
