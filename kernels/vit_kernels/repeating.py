"""Launches made again and again on the same arguments, with next to nothing of Triton's work on the host.

Triton's own launcher goes through Python for every launch: it spreads the arguments out and makes the descriptors that
TMA reads anew, which costs more than the launch itself where there are a few. All of that comes out the same for the
same arguments. So it is let run once, up to the call that launches, and that call is made again from then on.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable
from typing import Any

import triton

from .launch import Launched, active_driver
from .launch import repeat as by_triton

__all__ = ["Again", "repeat"]

# In the place of a stream, to see where in the last call it goes.
_STREAM = object()
# What to call, and its arguments in front of the stream and behind it.
_Call = tuple[Callable[..., object], tuple[Any, ...], tuple[Any, ...]]


class Again:
    """A launch as it was made or placed (`launch.Launched`), ready to be made again.

    What is behind Triton's launcher is looked for when it is made the first time, under the driver it was compiled for;
    where there is nothing that looks as it does in Triton 3.6 to 3.9, the launcher itself is called.
    """

    __slots__ = ("_call", "launched")

    def __init__(self, launched: Launched) -> None:
        self.launched = launched
        self._call: _Call | None = None

    @property
    def compiled(self) -> Any:
        return self.launched.compiled

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.launched.arguments

    def make(self, stream: int) -> None:
        """The launch, on this stream of the current device."""
        if self._call is None:
            self._call = _prepared(self.launched)
        function, before, after = self._call
        function(*before, stream, *after)


def _prepared(launched: Launched) -> _Call:
    compiled = launched.compiled
    before = launched.grid
    after = (compiled.function, compiled.packed_metadata, None, None, None, *launched.arguments)
    return _behind(compiled.run, before, after) or (compiled.run, before, after)


def _behind(run: Any, before: tuple[Any, ...], after: tuple[Any, ...]) -> _Call | None:
    """The same behind Triton's launcher `run`; None if it is of a kind that is not known here, or allocates memory or
    keeps books for each launch."""
    launch = getattr(run, "launch", None)
    busy = [getattr(run, name, None) for name in ("global_scratch_size", "profile_scratch_size")]
    if launch is None or busy != [0, 0] or getattr(run, "gsan_enabled", False):
        return None
    calls: list[tuple[Any, ...]] = []

    def note(*arguments: Any) -> None:
        calls.append(arguments)

    probe = copy.copy(run)
    if isinstance(launch, types.FunctionType):
        # A wrapper that makes descriptors, and hands everything on to the `launcher` that it closes over.
        names = launch.__code__.co_freevars
        if "launcher" not in names or launch.__closure__ is None:
            return None
        cells = dict(zip(names, launch.__closure__, strict=True))
        launch, wrapper = cells["launcher"].cell_contents, launch
        noting = tuple(types.CellType(note) if name == "launcher" else cells[name] for name in names)
        probe.launch = types.FunctionType(wrapper.__code__, wrapper.__globals__, closure=noting)
    else:
        probe.launch = note
    probe(*before, _STREAM, *after)
    if len(calls) != 1 or sum(argument is _STREAM for argument in calls[0]) != 1:
        return None
    (arguments,) = calls
    at = next(i for i, argument in enumerate(arguments) if argument is _STREAM)
    return launch, arguments[:at], arguments[at + 1 :]


def repeat(launches: Iterable[Again]) -> None:
    """Makes the launches again, in order, on the current device and its current stream.

    Pointers may be given as integers, descriptors as `launch.at_address` makes them. They must be aligned as those of
    the first launch were, and the other arguments the same, because the compiled code relies on both.
    """
    runtime = triton.knobs.runtime
    if getattr(runtime.launch_enter_hook, "calls", None) or getattr(runtime.launch_exit_hook, "calls", None):
        # A profiler listens, whom only Triton's own way tells everything.
        by_triton(again.launched for again in launches)
        return
    active: Any = active_driver()
    stream = active.get_current_stream(active.get_current_device())
    for again in launches:
        again.make(stream)
