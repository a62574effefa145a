"""Passes through CUDA graphs equal the pass as written, bit for bit, and nothing that changes is missed.

The GPU's part is played by `fake_cuda`.
"""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vit_engine import ViT, graphs
from vit_engine.graphs import GraphCache

from .fake_cuda import FakeCuda, fake_cuda
from .stand_in import repeated
from .test_replay import as_written, edit_norm, images, model

pytestmark = pytest.mark.interpreted_only
__all__ = ["fake_cuda", "repeated"]


class Small(nn.Module):
    """PyTorch's operators through a cache of graphs: the interpreter takes its time with kernels."""

    def __init__(self, limit: int = 8) -> None:
        super().__init__()
        self.scale = 1.0
        self.fc = nn.Linear(4, 4)
        self.graphs = GraphCache(limit)
        self.eval()

    def plain(self, x: Tensor) -> Tensor:
        return self.fc(x.float().expand(-1, 4)).relu() * self.scale + x.sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.graphs.run(self, self.plain, (x,), {})


def numbers(seed: int, rows: int = 3) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def vit_of(limit: bool | int = True) -> Any:
    return model().set_graphs(limit)


def plain(vit: ViT, x: Tensor) -> Tensor:
    return as_written(vit, x, ViT._forward)


def warm(model: nn.Module, x: Tensor, passes: int = 2) -> None:
    for _ in range(passes):
        model(x)


def test_replays_equal_the_pass_as_written_bit_for_bit(fake_cuda: FakeCuda) -> None:
    vit = vit_of()
    results = [vit(images(seed)) for seed in range(3)]
    assert (fake_cuda.captures, fake_cuda.replays) == (1, 2), "the first pass of a shape runs as written"
    assert vit.graphs.why is None and vit.graphs.captured == ["[1, 3, 16, 16] float32"]
    # Compared at the end: a result that lay in the graph's own memory would be the last one's by now.
    for seed, result in enumerate(results):
        assert torch.equal(result, plain(vit, images(seed)))
    with torch.inference_mode():
        assert torch.equal(vit(images(1)), results[1])
    assert fake_cuda.replays == 3


def test_what_happens_only_once_happens_before_the_capture(fake_cuda: FakeCuda) -> None:
    """A library that makes itself ready at its first call on a stream may do there what no graph can hold."""

    class Lazy(Small):
        passes = 0

        def plain(self, x: Tensor) -> Tensor:
            self.passes += 1
            return super().plain(x)

    model, x = Lazy(), numbers(0)
    model(x)
    before = model.passes
    model(x)
    assert fake_cuda.captures == 1 and model.passes == before + graphs.WARM_UPS + 1 >= before + 3
    model(x)
    assert model.passes == before + graphs.WARM_UPS + 1, "a replay runs nothing of it"


def test_no_garbage_is_collected_under_a_capture(fake_cuda: FakeCuda) -> None:
    """It may be the graph of another model, which must not be destroyed just then."""
    died: list[bool] = []

    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            died.append(fake_cuda.is_current_stream_capturing())

    class Littering(Small):
        def plain(self, x: Tensor) -> Tensor:
            for _ in range(5):
                Garbage()
            return super().plain(x)

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        warm(Littering(), numbers(0))
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert fake_cuda.captures == 1 and gc.isenabled()
    assert len(died) == 5 * (1 + graphs.WARM_UPS + 1) and not any(died)


def test_shapes_strides_and_dtypes_have_graphs_of_their_own(fake_cuda: FakeCuda) -> None:
    model = Small()
    given = [numbers(0), numbers(1, 5), numbers(2, 4).t(), numbers(3).half(), numbers(4, 9)[2:8:2], numbers(5)[:, 1:2]]
    for x in given * 3:
        assert torch.equal(model(x), model.plain(x))
    assert (fake_cuda.captures, fake_cuda.replays) == (len(given), 2 * len(given))
    assert len(fake_cuda.pools) == 1, "one pool of memory for all"


def test_the_least_recently_used_graph_is_given_up(fake_cuda: FakeCuda) -> None:
    model = Small(2)
    for rows in (1, 2, 1, 3):
        warm(model, numbers(0, rows))
    assert model.graphs.captured == ["[1, 4] float32", "[3, 4] float32"]
    pool: Any = model.graphs._pool
    assert pool.done.synchronized, "given up only when the GPU is through with it"
    captures = fake_cuda.captures
    assert torch.equal(model(numbers(4, 2)), model.plain(numbers(4, 2)))
    assert fake_cuda.captures == captures + 1


def test_shapes_that_come_once_cost_no_graph(fake_cuda: FakeCuda) -> None:
    model = Small(1)
    warm(model, numbers(0))
    for rows in range(4, 12):
        model(numbers(0, rows))
    assert fake_cuda.captures == 1 and len(model.graphs._seen) <= 4
    model(numbers(0))
    assert fake_cuda.captures == 1


def edit(model: Small) -> None:
    model.fc.weight.mul_(1.5)


def replace_a_layer(model: Small) -> None:
    model.fc = nn.Linear(4, 4).eval()


def replace_data(model: Small) -> None:
    model.fc.bias.data = torch.ones(4)


def change_a_setting(model: Small) -> None:
    model.scale = 2.0


def optimizer_step(model: Small) -> None:
    model.fc.weight.grad = torch.ones(4, 4)
    torch.optim.SGD(model.parameters(), lr=0.5).step()


CHANGES = [edit, replace_a_layer, replace_data, change_a_setting, optimizer_step]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_drops_the_graph(change: Callable[[Small], None], fake_cuda: FakeCuda) -> None:
    model, x = Small(), numbers(0)
    warm(model, x, 3)
    before, replays, pool = model(x), fake_cuda.replays, model.graphs._pool
    change(model)
    after = model(x)
    assert fake_cuda.replays == replays and pool is not None and pool.done.synchronized  # type: ignore[attr-defined]
    assert torch.equal(after, model.plain(x)) and not torch.equal(after, before)
    assert torch.equal(model(x), after) and fake_cuda.replays == replays + 1


def edit_data(vit: ViT) -> None:
    """Leaves no trace, so that clear_cache() has to be told."""
    vit.get_parameter("blocks.0.norm1.weight").data.mul_(1.5)
    vit.clear_cache()


def test_folded_weights_are_made_again(fake_cuda: FakeCuda) -> None:
    vit = vit_of()
    warm(vit, images(0))
    for number, change in enumerate((edit_norm, edit_data)):
        change(vit)
        after = vit(images(0))
        assert fake_cuda.replays == 1 + number
        assert torch.equal(after, plain(vit, images(0)))
        assert torch.equal(vit(images(0)), after) and fake_cuda.replays == 2 + number


def test_hooks_inside_run_every_time(fake_cuda: FakeCuda) -> None:
    model, x = Small(), numbers(0)
    warm(model, x)
    replays = fake_cuda.replays
    handle = model.fc.register_forward_hook(lambda module, given, output: -output)
    for _ in range(3):
        assert torch.equal(model(x), model.plain(x))
    assert fake_cuda.replays == replays and "hook" in str(model.graphs.why)
    handle.remove()
    seen: list[object] = []
    model.register_forward_hook(lambda *_: seen.append(1))  # runs around the replay
    warm(model, x, 3)
    assert fake_cuda.replays > replays and len(seen) == 3


def with_gradients(model: Any) -> Tensor:
    with torch.enable_grad():
        return model(numbers(0))


def under_autocast(model: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(numbers(0))


def watched(model: Any) -> Tensor:
    with FlopCounterMode(display=False):
        return model(numbers(0))


def in_training(model: Any) -> Tensor:
    return model.train()(numbers(0))


def while_somebody_captures(model: Any) -> Tensor:
    graphs.cuda._thread.capturing = True  # type: ignore[attr-defined]
    return model(numbers(0))


REASONS: list[tuple[Callable[[Any], Tensor], str]] = [
    (with_gradients, "gradients"),
    (under_autocast, "autocast"),
    (watched, "watched"),
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


def test_arguments_are_told_apart(fake_cuda: FakeCuda) -> None:
    """The same tensor twice, then two: a graph that read one place for both would give 4 y."""
    cache, layer = GraphCache(), nn.Linear(2, 2).eval()

    def weighted(x: Tensor, y: Tensor, scale: float = 1.0, tail: Any = None) -> dict[str, Any]:
        z = (x + 3 * y) * scale
        return {"z": z, "again": z, "scale": scale}

    def check(x: Tensor, y: Tensor, **more: Any) -> dict[str, Any]:
        found = cache.run(layer, weighted, (x, y), more)
        assert torch.equal(found["z"], weighted(x, y, **more)["z"])
        return found

    x, y = torch.rand(3), torch.rand(3)
    for _ in range(3):
        check(x, x)
    found = check(x, y)
    assert cache.why is None and found["z"] is found["again"] and found["scale"] == 1.0
    for scale in (2.0, 3.0) * 3:
        check(x, y, scale=scale)
    assert cache.captured[-2:] == ["[3] float32, [3] float32, scale=2.0", "[3] float32, [3] float32, scale=3.0"]
    captures = fake_cuda.captures
    for _ in range(3):
        check(x, y, tail=[1])
        assert cache.why == "an argument is a list"
        check(x[:1].expand(3), y)
        assert cache.why == "an input is expanded"
    assert fake_cuda.captures == captures


def test_settings_of_pytorchs_own_operators_have_graphs_of_their_own(fake_cuda: FakeCuda) -> None:
    model = Small()
    warm(model, numbers(0), 3)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        model(numbers(0))
        assert "first pass" in str(model.graphs.why)
    finally:
        torch.set_float32_matmul_precision(before)
    model(numbers(0))
    assert model.graphs.why is None


def test_threads_on_streams_of_their_own(fake_cuda: FakeCuda) -> None:
    """Two shapes in one pool, asked for by four threads at once: the stand-in fails where one does not wait."""
    model = Small()
    inputs = [numbers(seed, 2 + seed % 2) for seed in range(4)]
    start, wrong = threading.Barrier(4), []

    def work(number: int) -> None:
        start.wait()
        try:
            with torch.no_grad(), fake_cuda.stream(fake_cuda.Stream()):
                results = [model(inputs[number]) for _ in range(50)]
                expected = model.plain(inputs[number])
            wrong.extend(number for result in results if not torch.equal(result, expected))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and fake_cuda.captures == 2 and fake_cuda.replays == 4 * 50 - 2


def test_a_graph_keeps_what_it_reads(fake_cuda: FakeCuda) -> None:
    """Tables of positions for other sizes are forgotten in time, folded weights by whoever asks for it."""
    vit, x = vit_of(), images(0, size=24)
    first = vit(x)
    assert torch.equal(vit(x), first)
    for cache in (vit._positions, vit.derived, vit.replays):
        cache.clear()
    assert torch.equal(vit(x), first) and fake_cuda.replays == 2


def test_copies_and_pickles_leave_graphs_behind(fake_cuda: FakeCuda) -> None:
    model = Small(3)
    warm(model, numbers(0), 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.graphs.limit == 3 and not other.graphs.captured
        assert torch.equal(other(numbers(1)), model(numbers(1)))
    assert vit_of().set_graphs(False).graphs is None


@pytest.mark.parametrize(("given", "error"), [(0, ValueError), (-1, ValueError), ("8", TypeError), (1.0, TypeError)])
def test_other_limits_are_refused(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="set_graphs: graphs must be"):
        model().set_graphs(given)
