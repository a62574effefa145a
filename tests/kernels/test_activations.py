"""The activations behind linear against float64: over their ranges, and with the hardware's tanh at its worst."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401  (a jitted function must see it)

from vit_bench.tolerance import check
from vit_kernels import primitives, reference

from ..rung import DEVICE
from ..weights import Draw
from .common import linear, sanitize_bfloat16


def _activation_inputs(span: float, dtype: torch.dtype) -> torch.Tensor:
    """Values from -span to span and 0, shuffled: rows and columns with some of all sizes, as hidden features have."""
    values = torch.cat([torch.linspace(-span, span, 1023), torch.zeros(1)])
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(0))
    return values[order].to(dtype).reshape(32, 32)


def _activate_by_kernel(x: torch.Tensor, activation: str) -> torch.Tensor:
    """act(x) through a linear layer that is the identity; for swiglu the values it multiplies are one."""
    columns = x.shape[1]
    identity = torch.eye(columns, dtype=x.dtype, device=x.device)
    if activation != "swiglu":
        return linear(x, identity, activation=activation)
    ones = torch.cat([torch.zeros(columns), torch.ones(columns)]).to(x)
    return linear(x, torch.cat([identity, torch.zeros_like(identity)]), ones, activation=activation)


def _judge_activation(x: torch.Tensor, activation: str) -> None:
    formula = "silu" if activation == "swiglu" else activation
    ours, eager, truth = _activate_by_kernel(x, activation), *(reference.activate(v, formula) for v in (x, x.double()))
    check(ours, eager, truth, name=activation)


def test_gelu_in_float32_is_exact_to_rounding() -> None:
    """With W = 1 the layer is GELU itself, on a grid fine enough to meet both branches of erf and their seam."""
    x = torch.linspace(-7, 7, 20001, device=DEVICE)[:, None]
    truth = torch.nn.functional.gelu(x.cpu().double())
    y = linear(x, torch.ones(1, 1, device=DEVICE), activation="gelu").cpu().double()
    # Of the factor 1 + erf, rounding leaves one unit in the last place of 1 or 2, and the product rounds once more.
    assert ((y - truth).abs() <= 1.2e-7 * x.cpu().abs().double() + 1e-12).all()


@sanitize_bfloat16
@pytest.mark.parametrize("span", [1.0, 3.0, 12.0, 20.0, 6e4])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu"])
def test_activation_over_its_range(dtype, activation, span):
    """+-20 is past what real models reach; +-6e4 is the end of float16, where a polynomial without a clamp explodes."""
    draw = Draw(dtype)
    _judge_activation(_activation_inputs(span, dtype).to(draw.device), activation)


_exact_tanh = primitives.tanh


@triton.jit
def _tanh_too_small(x, FAST):
    return _exact_tanh(x, FAST) * (1.0 - 2.0**-11)


@triton.jit
def _tanh_too_large(x, FAST):
    return _exact_tanh(x, FAST) * (1.0 + 2.0**-11)


@pytest.mark.interpreted_only
@pytest.mark.parametrize("tanh", [_tanh_too_small, _tanh_too_large], ids=["too-small", "too-large"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_the_hardware_tanh_may_be_as_bad_as_promised(monkeypatch, activation, tanh):
    """PTX promises tanh.approx to 2^-11 relative; the interpreter's is exact, so the error is injected here."""
    x = _activation_inputs(3.0, torch.float16)
    good = _activate_by_kernel(x, activation)
    monkeypatch.setattr(primitives, "tanh", tanh)
    assert not torch.equal(_activate_by_kernel(x, activation), good)
    for span in (3.0, 12.0, 20.0):
        _judge_activation(_activation_inputs(span, torch.float16), activation)
