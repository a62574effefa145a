"""Passes through CUDA graphs equal the pass as written, bit for bit, and nothing that changes is missed.

The GPU's part is played by `fake_cuda`.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def test_methods_of_somebodys_own_are_not_in_a_graph(fake_cuda: FakeCuda) -> None:
    vit, x = vit_of(), images(0)
    warm(vit, x, 3)
    tokens, replays = vit.prefix_tokens(), fake_cuda.replays
    vit.prefix_tokens = lambda: 2 * tokens
    assert torch.equal(vit(x), plain(vit, x)) and fake_cuda.replays == replays
    assert vit.graphs.why == "prefix_tokens() is overridden on the instance"


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
