"""The kernels as custom operators: PyTorch's own checks, what tracing sees, and no silent gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from tests.rung import DEVICE
from vit_engine import ops

pytestmark = pytest.mark.interpreted_only


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def _patch_embed() -> tuple:
    return ops._patch_embed, (draw(2, 3, 8, 8), draw(12, 3, 4, 4), draw(12), draw(1, 12), draw(5, 12), None, None)


CASES = {
    "patch_embed": (*_patch_embed(), (True, False)),
    "patch_embed, no stats": (*_patch_embed(), (False, False)),
    "attention": (ops._attention, tuple(draw(1, 5, 2, 16) for _ in "qkv"), (None, True, None, None, True, False)),
    "attention, no lse": (
        ops._attention,
        tuple(draw(1, 5, 2, 16) for _ in "qkv"),
        (0.5, False, torch.tensor([3], device=DEVICE), draw(5, 5), False, False),
    ),
    "attention, heads first in memory": (
        ops._attention,
        tuple(draw(1, 2, 5, 16).transpose(1, 2) for _ in "qkv"),
        (None, False, None, None, False, False),
    ),
    "attention_packed": (
        ops._attention_packed,
        draw(7, 3, 2, 16).unbind(1),
        (torch.tensor([0, 3, 3, 7], dtype=torch.int32), 4, None, True, False),
    ),
    "qk_rope": (
        ops._qk_rope,
        tuple(draw(2, 5, 3, 2, 8).unbind(2))[:2],
        ("layer", draw(8), draw(8), draw(8), None, 1e-6, draw(1, 4, 8), draw(4, 8), True, 1),
    ),
    "qk_rope, no tables, fewer key heads": (
        ops._qk_rope,
        (draw(1, 5, 4, 7), draw(1, 2, 5, 7).transpose(1, 2)),
        ("none", None, None, None, None, 1e-6, None, None, False, 0),
    ),
    "linear": (
        ops._linear,
        (draw(5, 12), draw(6, 12), draw(6)),
        ("none", None, None, 1e-6, "gelu", draw(6), draw(5, 6), True, False),
    ),
    "linear, norm": (
        ops._linear,
        (draw(5, 12), draw(12, 12), draw(12)),
        ("layer", draw(2, 1, 5).abs(), draw(12), 1e-6, "swiglu", None, None, False, False),
    ),
    "mlp": (
        ops._mlp,
        (draw(5, 12), draw(20, 12), draw(20), draw(12, 20), draw(12)),
        ("layer", None, draw(20), 1e-6, "silu", None, draw(5, 12), True, True, False),
    ),
    "row_stats": (ops._row_stats, (draw(5, 12),), ()),
    "layer_norm": (ops._layer_norm, (draw(5, 12), draw(12), None), (1e-6, "layer")),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    """Schema, fake results (shapes, strides, dtypes) and dispatch agree with what the launcher does."""
    op, tensors, rest = CASES[name]
    torch.library.opcheck(op, (*tensors, *rest))


def test_wrappers_return_what_the_launchers_do() -> None:
    x, weight = draw(5, 12), draw(70, 12)
    y = ops.linear(x, weight)
    assert isinstance(y, torch.Tensor)
    both = ops.linear(x, weight, emit_stats=True)
    assert isinstance(both, tuple) and torch.equal(both[0], y) and both[1].shape == (2, 2, 5)
    torch.testing.assert_close(y, x @ weight.T)
    q, bounds = draw(5, 2, 8), torch.tensor([0, 2, 5])
    packed = ops.attention_packed(q, q, q, bounds, 3, scale=0.5)
    heads_first = q[2:].transpose(0, 1)
    alone = torch.nn.functional.scaled_dot_product_attention(heads_first, heads_first, heads_first, scale=0.5)
    torch.testing.assert_close(packed[2:], alone.transpose(0, 1))
    q, k = draw(1, 5, 2, 8), draw(1, 5, 1, 8)
    q_out, k_out = ops.qk_rope(q, k, norm="rms", k_weight=draw(8))
    torch.testing.assert_close(q_out, torch.nn.functional.rms_norm(q, (8,), None, 1e-6))
    torch.testing.assert_close(k_out, torch.nn.functional.rms_norm(k, (8,), draw(8), 1e-6))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_refused(name: str) -> None:
    op, tensors, rest = CASES[name]
    result = op(tensors[0].clone().requires_grad_(), *tensors[1:], *rest)
    first = result if isinstance(result, torch.Tensor) else result[0]
    with pytest.raises(NotImplementedError, match=rf"vit_engine.ops.{name.split(',')[0]} has no backward .*no_grad"):
        first.sum().backward()


# How a function of ops may be given a tensor by name, behind its first arguments.
BY_NAME = {
    "patch_embed": (1, "position", (4, 12)),
    "linear": (1, "bias", (6,)),
    "mlp": (3, "fc2_bias", (12,)),
    "layer_norm": (0, "weight", (12,)),
}


def calls_with(name: str, dual: Callable[[torch.Tensor], torch.Tensor]) -> list[Callable[[], Any]]:
    """Calls of a function of ops in which one of the tensors, given by place or by name, went through `dual`."""
    operation, (_, (first, *rest), _) = getattr(ops, name), CASES[name]
    others = [x for x in rest if x is not None]
    if name == "attention_packed":
        others += [torch.tensor([0, 3, 3, 7]), 4]
    calls = [lambda: operation(dual(first), *others)]
    if name in BY_NAME:
        number, keyword, shape = BY_NAME[name]
        calls.append(lambda: operation(first, *others[:number], **{keyword: dual(draw(*shape))}))
    return calls


@pytest.mark.parametrize("name", ops.__all__)
def test_tangents_are_refused(name: str) -> None:
    with forward_ad.dual_level(), torch.no_grad():
        for call in calls_with(name, lambda x: forward_ad.make_dual(x, torch.ones_like(x))):
            with pytest.raises(NotImplementedError, match=rf"vit_engine.ops.{name} has no formula for forward-mode"):
                call()
        for call in calls_with(name, lambda x: x):
            call()  # nothing to drop
    first = CASES[name][1][0]
    with pytest.raises(NotImplementedError, match=rf"vit_engine.ops.{name} has no formula"):
        torch.func.jvp(lambda x: calls_with(name, lambda _: x)[0](), (first,), (first,))


@pytest.mark.parametrize("name", sorted({*ops.__all__} - {"row_stats"}))  # which has one tensor
def test_a_tensor_without_values_is_refused(name: str) -> None:
    """The operator's fake would answer, with memory that nobody wrote."""
    for call in calls_with(name, lambda x: x.to("meta")):
        with pytest.raises(ValueError, match=rf"vit_engine.ops.{name}: \w+ must be on the device of \w+, .*meta"):
            call()


def test_a_traced_graph_holds_one_node_per_launch() -> None:
    """Exported with a dynamic number of rows, without running a kernel."""

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            y = ops.linear(x, weight, activation="gelu")
            assert isinstance(y, torch.Tensor)
            return ops.layer_norm(y)

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Layer(), (draw(5, 12), draw(6, 12)), dynamic_shapes={"x": {0: rows}, "weight": None})
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    names = [str(target) for target in called if str(target).startswith("vit_engine")]
    assert names == ["vit_engine.linear.default", "vit_engine.layer_norm.default"]
