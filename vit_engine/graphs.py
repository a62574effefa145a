"""Forward passes captured in CUDA graphs: one call of the driver instead of one per launch.

The first pass of a shape runs as written. The second is captured, after warm-up passes on a stream of its own, and from
then on a pass is: copy the inputs to where the graph reads them, replay, copy the results out. A replay makes the same
launches on the same memory, so results are those of the pass as written, bit for bit.

What a graph depends on is asked before every replay, by the `Fingerprint` that repeated passes stand on: any change of
the module (weights, submodules, hooks, modes, settings) drops its graphs. The graphs of one module share a memory pool,
so they take turns: one lock on the host, one event on the GPU, and results leave the pool before the next begins.
Whatever cannot be captured runs as written, and `why` and `refused` say so.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, cuda, nn
from torch.utils._pytree import tree_leaves, tree_map

from vit_kernels.launch import launching_on

from .fingerprint import Fingerprint
from .graph_keys import described, key_of
from .passes import PLAIN
from .reads import Reads
from .replay import repeatable

__all__ = ["GRAPHS", "GraphCache", "graph_limit"]

GRAPHS = 8  # shapes kept where nobody says how many
WARM_UPS = 2  # the first may compile and fold
# PyTorch allows one capture at a time in a process.
_capturing = threading.Lock()


def graph_limit(graphs: bool | int, function: str) -> int:
    """How many graphs an argument `graphs` asks for: False none, True `GRAPHS`, or a number from 1 on.

    Raises TypeError or ValueError naming `function` for anything else.
    """
    if isinstance(graphs, bool):
        return GRAPHS if graphs else 0
    if not isinstance(graphs, int):
        raise TypeError(f"{function}: graphs must be True, False or how many to keep at most, got {graphs!r}")
    if graphs < 1:
        raise ValueError(f"{function}: graphs must be at least 1, or False for none, got {graphs}")
    return graphs


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Python's garbage collector rests in this block: it may come upon the graph of another model, and a graph that is
    destroyed under a capture spoils it and leaves PyTorch's random numbers unusable (seen on an H100)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def on_gpu(tensor: Tensor) -> bool:
    """Whether a CUDA graph could read this tensor."""
    return tensor.is_cuda


def no_hook(hook: object) -> bool:
    """No hook inside a module may be left out."""
    return False


class _Refused(Exception):
    """Why a pass cannot be captured."""


class _Pool:
    """What the graphs of one module share on one device. done: behind the last pass that used its memory."""

    def __init__(self) -> None:
        self.handle = cuda.graph_pool_handle()
        self.stream = cuda.Stream()
        self.done = cuda.Event()


@dataclass
class _Captured:
    """A graph, where it reads its inputs and leaves its results, the tensors whose addresses are in it, and what was
    noted of its pass."""

    graph: Any
    inputs: list[Tensor]
    results: Any
    kept: list[Tensor]
    noted: Any


class GraphCache:
    """The CUDA graphs of one module's forward pass, at most `limit`, the least recently used given up first.

    Safe to call from several threads and streams. Not part of any state_dict, and left out of copies and pickles.
    why: what kept the last pass out of a graph, None if it was replayed.
    listens: see `Fingerprint`. note: called behind each captured pass; `noted` is what it gave for the graph that was
    replayed last.
    """

    def __init__(
        self,
        limit: int = GRAPHS,
        listens: Callable[[object], bool] = no_hook,
        note: Callable[[], Any] = lambda: None,
    ) -> None:
        self.limit = limit
        self.why: str | None = "no pass has been made yet"
        self._listens = listens
        self._note = note
        self._lock = threading.Lock()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.noted: Any = None
        self._fingerprint: Fingerprint | None = None
        self._training = False
        self._pool: _Pool | None = None
        self._graphs: OrderedDict[tuple, _Captured] = OrderedDict()
        self._seen: OrderedDict[tuple, None] = OrderedDict()
        self._refused: OrderedDict[tuple, str] = OrderedDict()

    @property
    def refused(self) -> dict[str, str]:
        """Per shape that cannot have a graph, why."""
        return {described(key): why for key, why in self._refused.items()}

    @property
    def captured(self) -> list[str]:
        """The shapes that have a graph, the least recently used first."""
        return [described(key) for key in self._graphs]

    def clear(self) -> None:
        """Forgets all graphs, once the GPU is through with them."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        if self._pool is not None:
            # Tensors that only a graph kept alive belong to other streams than the one it may still run on.
            self._pool.done.synchronize()
        self._begin_anew()

    def run(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        objection: Callable[[], str | None] = lambda: None,
    ) -> Any:
        """forward(*args, **kwargs): a pass of `module` through its graph where that is right, else as written.

        forward must depend on nothing but the module and its arguments, which are tensors and plain values. Results are
        new tensors each time, in whatever the pass returns. objection: asked behind a warm-up pass; a reason why this
        pass must not be captured, or None.
        """
        found = self._replayed(module, forward, args, kwargs, objection)
        return forward(*args, **kwargs) if found is None else found[0]

    def _replayed(
        self, module: nn.Module, forward: Any, args: Any, kwargs: Any, objection: Callable[[], str | None]
    ) -> tuple[Any] | None:
        """(what a replay gave,), None if the pass is to run as written."""
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.why = _unfit(inputs, args, kwargs)
        if self.why is not None:
            return None
        key = key_of(args, kwargs)
        with self._lock, launching_on(inputs[0]):
            fingerprint = self._fingerprint
            if fingerprint is None or not fingerprint.holds():
                self._clear()
                self._fingerprint = fingerprint = Fingerprint(module, self._listens, settings=True)
                self._training = any(part.training for part in module.modules())
            if not fingerprint.usable:
                self.why = "a hook inside the model, a global one, or a tensor of a class of its own"
                return None
            if self._training:
                self.why = "training mode"
                return None
            captured = self._graphs.get(key)
            if captured is None and self._due(key):
                captured = self._capture(fingerprint, key, objection, forward, args, kwargs)
            if captured is None:
                return None
            self._graphs.move_to_end(key)
            return (self._replay(captured, inputs),)

    def _due(self, key: tuple) -> bool:
        """Whether to capture now: not the first pass of a shape, which may be the only one, nor what failed before."""
        if key in self._refused:
            self.why = self._refused[key]
            return False
        due = self._seen.pop(key, key) is None
        _remember(self._seen, key, None, 4 * self.limit)
        if not due:
            self.why = "the first pass of a shape runs as written"
        return due

    def _capture(
        self, fingerprint: Fingerprint, key: tuple, objection: Any, forward: Any, args: Any, kwargs: Any
    ) -> _Captured | None:
        if len(self._graphs) >= self.limit:
            assert self._pool is not None
            self._pool.done.synchronize()
            self._graphs.popitem(last=False)
        try:
            with _capturing:
                captured = self._captured(objection, forward, args, kwargs)
            if not fingerprint.holds():
                raise _Refused("the model changed while the pass was captured")
        except Exception as error:  # whatever it is, the pass runs as written and says why
            reason = str(error) if isinstance(error, _Refused) else f"capture failed: {type(error).__name__}: {error}"
            self.why = reason
            _remember(self._refused, key, reason, 4 * self.limit)
            if not self._graphs:
                self._pool = None
            return None
        self._graphs[key] = captured
        return captured

    def _captured(self, objection: Any, forward: Any, args: Any, kwargs: Any) -> _Captured:
        args = [_static(value) if isinstance(value, Tensor) else value for value in args]
        kwargs = {name: _static(value) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        pool = self._pool = self._pool or _Pool()
        pool.stream.wait_stream(cuda.current_stream())
        try:
            with cuda.stream(pool.stream):
                for _ in range(WARM_UPS):
                    forward(*args, **kwargs)
        finally:
            # What the warm-up left in caches is there for whoever runs next.
            cuda.current_stream().wait_stream(pool.stream)
        reason = objection()
        if reason is not None:
            raise _Refused(reason)
        graph, reads = cuda.CUDAGraph(), Reads(inputs[0].device)
        # Other threads may go on allocating memory and copying meanwhile: only this one may not.
        capturing = cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local")
        with _nothing_collected(), capturing, reads:
            results = forward(*args, **kwargs)
        if reads.random:
            raise _Refused(f"it draws random numbers: {', '.join(sorted(reads.random))}")
        if reads.elsewhere:
            raise _Refused(f"it reads tensors on {', '.join(sorted(reads.elsewhere))} beside its own device")
        for leaf in tree_leaves(results):
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise _Refused(f"it returns a {type(leaf).__name__}")
        return _Captured(graph, inputs, results, list(reads.kept.values()), self._note())

    def _replay(self, captured: _Captured, inputs: Sequence[Tensor]) -> Any:
        assert self._pool is not None
        stream = cuda.current_stream()
        stream.wait_event(self._pool.done)
        try:
            for place, given in zip(captured.inputs, inputs, strict=True):
                place.copy_(given)
            captured.graph.replay()
            self.noted = captured.noted
            return _copied(captured.results)
        finally:
            self._pool.done.record(stream)

    def __getstate__(self) -> dict[str, object]:
        return {"limit": self.limit, "listens": self._listens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["limit"], state["listens"])


def _unfit(inputs: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why no pass like this goes through a graph, if so."""
    for value in (*args, *kwargs.values()):
        if not isinstance(value, (Tensor, *PLAIN)):
            return f"an argument is a {type(value).__name__}"
    if not inputs:
        return "no argument is a tensor"
    for x in inputs:
        if not on_gpu(x):
            return f"an input is on {str(x.device)!r}: CUDA graphs need an NVIDIA GPU"
        if x.device != inputs[0].device:
            return f"inputs are on {inputs[0].device} and {x.device}"
        if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            return "an input is expanded"
    if torch.is_grad_enabled():
        return "gradients are enabled: call it under torch.no_grad() or torch.inference_mode()"
    if torch.is_autocast_enabled(inputs[0].device.type):
        return "autocast"
    if cuda.is_current_stream_capturing():
        return "somebody else is capturing"
    if not repeatable(inputs):
        return "an empty input, a tensor subclass, a graph being traced, forward mode, or operators being watched"
    return None


def _remember(table: OrderedDict, key: tuple, value: Any, limit: int) -> None:
    table[key] = value
    if len(table) > limit:
        table.popitem(last=False)


@torch.inference_mode(False)
def _static(x: Tensor) -> Tensor:
    """Memory of its own for a copy of x, laid out alike; no tensor of inference mode, so that anybody may write it."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    place = torch.empty(extent, dtype=x.dtype, device=x.device).as_strided(x.shape, x.stride())
    return place.copy_(x)


def _copied(results: Any) -> Any:
    """The results in memory of their own; a tensor that is in them twice is in the copy twice."""
    copies: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.clone()
        return copies[id(leaf)]

    return tree_map(copy, results)
