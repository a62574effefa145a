"""Passes with operators of PyTorch among their launches: made again in order, or refused by name."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.engine.stand_in import repeated
from vit_engine import ops, replay
from vit_engine.replay import ReplayCache

pytestmark = pytest.mark.interpreted_only
__all__ = ["repeated"]


class Layer(nn.Module):
    """A norm through the kernels, a buffer, and a tensor that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(64))
        self.unseen = [torch.zeros(64)]  # where no fingerprint looks

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.norm.weight, self.norm.bias)


Forward = Callable[[Layer, Tensor], Any]


def cast_before(layer: Layer, x: Tensor) -> Tensor:
    return layer(x.double().float() + 1)


def pooled_behind(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    y = layer(x)
    return y, torch.tanh(y[:, :8].mean(0) @ layer.norm.weight[:8])


def between(layer: Layer, x: Tensor) -> dict[str, Tensor]:
    """What the first launch wrote is read by an operator, and again by the third launch."""
    first = layer(x)
    second = layer(torch.nn.functional.gelu(first) * 2)
    return {"last": layer(second), "other": layer(first)}


def views(layer: Layer, x: Tensor) -> list[Any]:
    y = layer(x)
    return [y[1:], y, y.t(), 3, None, x]


def several_results(layer: Layer, x: Tensor) -> Tensor:
    first, second = torch.split(layer(x) * 1.5, 32, dim=1)
    values, places = torch.topk((first + second)[[4, 3, 2, 1, 0]], 4)
    return layer(x).gather(1, places) + values


def constant_table(layer: Layer, x: Tensor) -> Tensor:
    table = torch.arange(64.0).outer(torch.ones(64)).cos_()
    table[0].fill_(2)
    return layer(x) @ table + table[layer.calls.long()].sum()


def of_lists(layer: Layer, x: Tensor) -> Tensor:
    y = layer(x)
    return torch.cat([y, x, layer.norm.weight[None]])


REPEATED: list[Forward] = [
    cast_before, pooled_behind, between, views, several_results, constant_table, of_lists,
]  # fmt: skip


def flat(tree: Any) -> list[Any]:
    return tree_leaves(tree)


def equal(a: Any, b: Any) -> bool:
    pairs = zip(flat(a), flat(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("forward", REPEATED, ids=lambda f: f.__name__)
def test_operators_are_made_again_in_their_places(forward: Forward, repeated: list[str]) -> None:
    layer, cache = Layer(), ReplayCache(operators=True)
    layer.norm.weight.data.normal_()
    inputs = [torch.randn(5, 64) for _ in range(4)]
    results = [cache.run("pass", layer, (x,), lambda x=x: forward(layer, x)) for x in inputs]
    assert repeated and not cache.refused
    for x, result in zip(inputs, results, strict=True):
        assert equal(result, forward(layer, x))
        assert type(result) is type(results[0])
    for value in flat(results[3]):
        assert not isinstance(value, Tensor) or value is inputs[3] or value.data_ptr() != flat(results[2])[0].data_ptr()
    layer.norm.bias.data = torch.ones(64)
    x = inputs[0]
    for _ in range(3):
        assert equal(cache.run("pass", layer, (x,), lambda: forward(layer, x)), forward(layer, x))


def test_views_of_one_memory_stay_views_of_one(repeated: list[str]) -> None:
    layer, cache = Layer(), ReplayCache(operators=True)
    x = torch.randn(5, 64)
    for _ in range(4):
        part, whole, turned, number, nothing, given = cache.run("pass", layer, (x,), lambda: views(layer, x))
    assert repeated and (number, nothing) == (3, None) and given is x
    whole[1] = 7
    assert (part[0] == 7).all() and (turned[:, 1] == 7).all()


def test_random_numbers_are_drawn_anew(repeated: list[str]) -> None:
    layer, cache = Layer(), ReplayCache(operators=True)

    def masked(x: Tensor) -> Tensor:
        return layer(x) * (torch.rand(5, 1) > 0.5)

    for seed in range(5):
        x = torch.randn(5, 64)
        torch.manual_seed(seed)
        found = cache.run("pass", layer, (x,), lambda x=x: masked(x))
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(found, masked(x)) and torch.equal(after, torch.rand(1))
    assert repeated and not cache.refused


def read_by_the_host(layer: Layer, x: Tensor) -> Tensor:
    y = layer(x)
    return y * 2 if y.sum() > 0 else y


def elsewhere(layer: Layer, x: Tensor) -> tuple[Tensor, list[int]]:
    return layer(x), list(x.to("meta").shape)


def of_some_rows(layer: Layer, x: Tensor) -> Tensor:
    return layer(x[x[:, 0] > 0])


def at_nonzeros(layer: Layer, x: Tensor) -> Tensor:
    return layer(x).relu().nonzero()


def written_in_place(layer: Layer, x: Tensor) -> Tensor:
    return layer(x).add_(1)


def counted(layer: Layer, x: Tensor) -> Tensor:
    layer.unseen[0] += 1
    return layer(x)


def noise_in_place(layer: Layer, x: Tensor) -> Tensor:
    return layer(x) * torch.empty(64).normal_()


def another_dtype(layer: Layer, x: Tensor) -> Tensor:
    return layer(x).view(torch.int32) + 1


def not_of_the_inputs(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    return layer(x), torch.arange(3)


def an_object(layer: Layer, x: Tensor) -> tuple[Tensor, object]:
    return layer(x), object()


def no_launch(layer: Layer, x: Tensor) -> Tensor:
    return x + 1


REFUSED: list[tuple[Forward, str]] = [
    (read_by_the_host, "the host reads what it computes: aten._local_scalar_dense"),
    (elsewhere, "the host reads what it computes: aten._to_copy"),
    (of_some_rows, "the shape of what it computes depends on values: aten.index"),
    (at_nonzeros, "the shape of what it computes depends on values: aten.nonzero"),
    (written_in_place, "it writes to what it has computed: aten.add_"),
    (counted, "it writes to tensors that are not its own: aten.add_"),
    (noise_in_place, "it writes to what it has computed: aten.normal_"),
    (another_dtype, "memory is read in another dtype"),
    (not_of_the_inputs, "it returns what does not depend on its inputs"),
    (an_object, "it returns what does not depend on its inputs"),
    (no_launch, "its launches are not Triton's own"),
]


@pytest.mark.parametrize(("forward", "why"), REFUSED, ids=lambda p: getattr(p, "__name__", ""))
def test_what_cannot_be_made_again_runs_as_written(forward: Forward, why: str, repeated: list[str]) -> None:
    layer, cache, other = Layer(), ReplayCache(operators=True), Layer()
    for seed in range(5):
        x = torch.randn(5, 64)
        torch.manual_seed(seed)
        found = cache.run("pass", layer, (x,), lambda x=x: forward(layer, x))
        torch.manual_seed(seed)
        wanted = forward(other, x)
        assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(wanted), strict=True) if isinstance(a, Tensor))
    assert not repeated and torch.equal(layer.unseen[0], other.unseen[0])
    assert why in cache.refused["pass"]


def test_operators_are_refused_where_launches_are_to_be_all(repeated: list[str]) -> None:
    layer, cache = Layer(), ReplayCache()
    for _ in range(4):
        x = torch.randn(5, 64)
        assert torch.equal(cache.run("pass", layer, (x,), lambda x=x: cast_before(layer, x)), cast_before(layer, x))
    assert not repeated
    assert "more than launch kernels: aten._to_copy" in cache.refused["pass"] and "aten.add" in cache.refused["pass"]


@pytest.mark.parametrize(("forward", "waits"), [(constant_table, 1), (pooled_behind, 0)])
def test_another_stream_finds_what_was_kept(
    forward: Forward, waits: int, repeated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that is computed under somebody's capture, which only its replays do, and nothing that is on its way."""
    layer, cache, x, capturing = Layer(), ReplayCache(operators=True), torch.randn(5, 64), [True]
    waited: list[torch.device] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(x.device))
    monkeypatch.setattr(replay, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    def passes(number: int) -> None:
        for _ in range(number):
            assert equal(cache.run("pass", layer, (x,), lambda: forward(layer, x)), forward(layer, x))

    passes(3)
    assert not repeated and not waited
    capturing[0] = False
    passes(1)
    assert not repeated and len(waited) == waits
    capturing[0] = True
    passes(2)
    assert repeated and len(waited) == waits


def test_an_objection_is_a_refusal(repeated: list[str]) -> None:
    layer, cache = Layer(), ReplayCache(operators=True)
    x = torch.randn(5, 64)
    for _ in range(4):
        cache.run("pass", layer, (x,), lambda: cast_before(layer, x), lambda: "somebody else's code")
    assert not repeated and cache.refused == {"pass": "somebody else's code"}


def test_nothing_of_a_noted_pass_is_kept(repeated: list[str]) -> None:
    layer, cache = Layer(), ReplayCache(operators=True)
    made: list[weakref.ref[Any]] = []

    def noted(x: Tensor) -> Tensor:
        for _ in range(3):
            x = layer(torch.relu(layer(x)))
            made.append(weakref.ref(x.untyped_storage()))
        return x

    for _ in range(4):
        x = torch.randn(5, 64)
        cache.run("pass", layer, (x,), lambda x=x: noted(x))
    gc.collect()
    assert repeated and len(made) == 6 and all(ref() is None for ref in made)
