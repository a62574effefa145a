"""CUDA graph capture of a forward pass: a replay must give what the uncaptured pass gives, bit for bit."""

from __future__ import annotations

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
