"""CUDA graph capture of a forward pass: a replay must give what the uncaptured pass gives, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

Forward = Callable[[torch.Tensor], torch.Tensor]


def _allocations() -> int:
    """How often anything asked PyTorch for GPU memory so far."""
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


@torch.inference_mode()
def check_replay(forward: Forward, first: torch.Tensor, second: torch.Tensor) -> dict[str, Any]:
    """Captures forward(first) with a static input and replays it with both inputs, in CUDA tensors of one shape.

    Raises AssertionError when a replay differs from the uncaptured run in any bit or allocates memory, and when both
    inputs give one result, for then the replay might ignore its input. Returns figures for the report.
    """
    expected = {"first": forward(first).clone(), "second": forward(second).clone()}
    if torch.equal(expected["first"], expected["second"]):
        raise AssertionError("both inputs give the same result: a replay that ignores its input would pass")
    static = first.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # What happens only in a first run (compilation, folding weights) must not be captured.
    with torch.cuda.stream(side):
        for _ in range(3):
            forward(static)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward(static)

    allocated = 0
    # The second input first: the first one's result may still lie in the captured memory.
    for name, images in (("second", second), ("first", first), ("second", second)):
        static.copy_(images)
        before = _allocations()
        graph.replay()
        torch.cuda.synchronize()
        allocated += _allocations() - before
        if not torch.equal(result, expected[name]):
            differing = int((result != expected[name]).sum())
            raise AssertionError(
                f"replay with the {name} input: {differing} of {result.numel()} values differ from the uncaptured run"
            )
    if allocated:
        raise AssertionError(f"replaying allocated memory {allocated} times")
    return {"replays": 3, "values_compared": 3 * result.numel(), "allocations_in_replay": allocated}


PASSES = 8  # of each thread


def check_engine_graphs(model: Any, first: torch.Tensor, second: torch.Tensor) -> dict[str, Any]:
    """The engine's own graphs (`model.set_graphs()`): both inputs in turn, then two threads on streams of their own.

    Raises AssertionError when a replay differs from the uncaptured run in any bit, or a pass was not replayed.
    """
    model.set_graphs(False)
    inputs = (first, second)
    with torch.inference_mode():
        expected = [model(x) for x in inputs]
    if torch.equal(*expected):
        raise AssertionError("both inputs give the same result: a replay that ignores its input would pass")
    model.set_graphs(1)
    wrong: list[str] = []

    def compare(number: int, where: str) -> None:
        found = model(inputs[number])
        if model.graphs.why is not None:
            wrong.append(f"{where}: not replayed: {model.graphs.why}")
        elif not torch.equal(found, expected[number]):
            wrong.append(f"{where}: {int((found != expected[number]).sum())} values differ from the uncaptured run")

    def work(number: int) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(PASSES):
                    compare(number, f"thread {number}")
        except Exception as error:  # it would be lost with its thread
            wrong.append(f"thread {number}: {type(error).__name__}: {error}")

    with torch.inference_mode():
        model(first)  # the first pass of a shape runs as written
        for number in (0, 1, 0, 1):
            compare(number, "in turn")
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise AssertionError("; ".join(sorted(set(wrong))))
    return {"replays": 4 + 2 * PASSES, "values_compared": (4 + 2 * PASSES) * expected[0].numel()}
