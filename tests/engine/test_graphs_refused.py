"""Where a graph would be wrong, or cannot be captured, the pass runs as written and says why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from vit_engine import graphs
from vit_engine.graphs import GraphCache

from .fake_cuda import FakeCuda, fake_cuda
from .stand_in import repeated
from .test_graphs import Small, numbers, vit_of, warm
from .test_replay import images

pytestmark = pytest.mark.interpreted_only
__all__ = ["fake_cuda", "repeated"]


def with_gradients(model: Any) -> Tensor:
    with torch.enable_grad():
        return model(numbers(0))


def under_autocast(model: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(numbers(0))


def watched(model: Any) -> Tensor:
    with FlopCounterMode(display=False):
        return model(numbers(0))


def in_forward_mode(model: Any) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(numbers(0), numbers(1)))).primal


def in_training(model: Any) -> Tensor:
    return model.train()(numbers(0))


def while_somebody_captures(model: Any) -> Tensor:
    graphs.cuda._thread.capturing = True  # type: ignore[attr-defined]
    return model(numbers(0))


REASONS: list[tuple[Callable[[Any], Tensor], str]] = [
    (with_gradients, "gradients"),
    (under_autocast, "autocast"),
    (watched, "watched"),
    (in_forward_mode, "forward mode"),
    (in_training, "training mode"),
    (while_somebody_captures, "somebody else is capturing"),
]


@pytest.mark.parametrize(("run", "reason"), REASONS, ids=[run.__name__ for run, _ in REASONS])
def test_no_graph_where_it_would_be_wrong(run: Callable[[Any], Tensor], reason: str, fake_cuda: FakeCuda) -> None:
    model = Small()
    warm(model, numbers(0))
    captures, replays = fake_cuda.captures, fake_cuda.replays
    result = run(model)
    assert reason in str(model.graphs.why)
    assert (fake_cuda.captures, fake_cuda.replays) == (captures, replays)
    assert result.requires_grad == (run is with_gradients)
    plain = model.plain(numbers(0))
    if result.dtype == torch.bfloat16:  # under autocast
        # The operands of a product, its result and two sums are rounded to bf16, 2^-9 each.
        torch.testing.assert_close(result.float(), plain, rtol=2**-6, atol=2**-6)
    else:
        assert torch.equal(result, plain)


def test_without_a_gpu_there_are_no_graphs() -> None:
    vit = vit_of()
    with torch.no_grad():
        vit(images(0))
        assert vit.graphs.why == "an input is on 'cpu': CUDA graphs need an NVIDIA GPU" and not vit.graphs.captured
        vit.set_backend("torch")(images(0))
    assert vit.graphs.why == "backend 'torch'"


def waits_for_the_gpu(x: Tensor) -> Tensor:
    return x * x.sum().item()


def draws(x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.5, training=True)


def reads_another_device(x: Tensor) -> Tensor:
    torch.empty(3, device="meta").sin()
    return x + 1


def returns_something(x: Tensor) -> Any:
    return {"x": x + 1, "what": object()}


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (waits_for_the_gpu, "capture failed: RuntimeError: operation not permitted"),
        (draws, r"draws random numbers: aten\.\w*(dropout|bernoulli)"),
        (reads_another_device, "reads tensors on meta"),
        (returns_something, "returns a object"),
    ],
)
def test_what_cannot_be_captured_runs_as_written_and_says_so(
    forward: Callable[[Tensor], Any], reason: str, fake_cuda: FakeCuda
) -> None:
    cache, layer, x = GraphCache(), nn.Linear(2, 2).eval(), torch.rand(3, 2)
    for number in range(4):
        torch.manual_seed(1)
        found = cache.run(layer, forward, (x,), {})
        torch.manual_seed(1)
        expected = forward(x)
        if isinstance(found, dict):
            found, expected = found["x"], expected["x"]
        # The warm-up before the one attempt draws numbers, too.
        assert torch.equal(found, expected) or (forward is draws and number == 1)
    assert fake_cuda.replays == 0 and not cache.captured
    ((shape, why),) = cache.refused.items()
    assert shape == "[3, 2] float32" and cache.why == why and re.search(reason, why)
    assert not fake_cuda.is_current_stream_capturing()
    # Another pass, another try: nothing is left of the failed capture.
    for _ in range(3):
        assert torch.equal(cache.run(layer, torch.sin, (x,), {"out": None}), torch.sin(x))
    assert fake_cuda.replays == 2


def test_attention_without_dropout_is_not_random(fake_cuda: FakeCuda) -> None:
    layer, x = nn.Linear(2, 2).eval(), torch.rand(1, 2, 3, 4)

    def attend(x: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(x, x, x)
        return nn.functional.dropout(y, 0.5, training=False)

    for mode in (torch.no_grad, torch.inference_mode):
        cache = GraphCache()
        with mode():
            for _ in range(3):
                assert torch.equal(cache.run(layer, attend, (x,), {}), attend(x))
        assert cache.why is None and not cache.refused
