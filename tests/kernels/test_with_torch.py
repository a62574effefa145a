"""PyTorch's operators in place of a kernel: the same results, and nothing of the caller's modes gets in."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from vit_kernels import attention_tiles, fold_norm, gemm_tiles, reference, row_stats, tiles, with_torch
from vit_kernels import launch as launch_module

from ..rung import DEVICE
from ..weights import Draw
from .common import attention, every_dtype, judge, judge_stats, layer_norm, linear, mlp

pytestmark = pytest.mark.interpreted_only


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every launcher that can leaves its work to PyTorch; the kernels that are launched all the same."""
    launched: list[str] = []
    original = launch_module.launch

    def note(on: torch.Tensor, kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.__name__)
        original(on, kernel, *arguments, **constants)

    for name in ("attention", "linear", "mlp", "norm"):
        monkeypatch.setattr(importlib.import_module(f"vit_kernels.{name}"), "launch", note)
    modelled = tiles.choose_rows
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: tiles.TORCH)
    monkeypatch.setattr(attention_tiles, "choose_attention", lambda *a, **k: tiles.TORCH)
    monkeypatch.setattr(tiles, "choose_rows", lambda *a, call: tiles.TORCH if "layer_norm" in call[0] else modelled(*a))
    return launched


@every_dtype
@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu"])
def test_linear(dtype, norm, activation, by_torch):
    draw, n = Draw(dtype, seed=3), 40
    given: dict[str, Any] = {"x": draw.rows(9, 72), "weight": draw.weight(80 if activation == "swiglu" else n, 72)}
    given["bias"] = draw.bias(given["weight"].shape[0])
    if norm != "none":
        given["norm_weight"] = draw.gamma(72)
    if norm == "layer":
        given["norm_bias"] = draw.bias(72)
    given |= {"norm": norm, "activation": activation, "layer_scale": draw.layer_scale(n), "residual": draw.rows(9, n)}
    folded: torch.Tensor = given["weight"]
    options: dict[str, Any] = {}
    bias = given["bias"]
    if norm != "none":
        folded, column_sum, bias = fold_norm(folded, bias, given["norm_weight"], given.get("norm_bias"), kind=norm)
        options = {"norm": norm, "stats": row_stats(given["x"]), "column_sum": column_sum}
    by_torch.clear()
    finish = {"activation": activation, "layer_scale": given["layer_scale"], "residual": given["residual"]}
    judge(linear(given["x"], folded, bias, **options, **finish), reference.linear, given)
    assert by_torch == []


@pytest.mark.parametrize("finish", [(), ("layer_scale",), ("residual",)], ids=["bare", "LayerScale", "residual"])
def test_linear_without_some_of_it(finish):
    draw = Draw(torch.float16, seed=4)
    values = {"layer_scale": draw.layer_scale(40), "residual": draw.rows(9, 40)}
    given = {"x": draw.normal(9, 72), "weight": draw.weight(40, 72), **{name: values[name] for name in finish}}
    judge(linear(**given), reference.linear, given)


@every_dtype
@pytest.mark.parametrize("columns", [64, 130, 192])
def test_statistics_come_in_the_kernels_form(dtype, columns, by_torch):
    draw = Draw(dtype, seed=5)
    y, stats = linear(draw.normal(9, 24), draw.weight(columns, 24), residual=draw.rows(9, columns), emit_stats=True)
    assert stats.shape == (2, -(-columns // 64), 9) and stats.is_contiguous()
    judge_stats(stats, y)
    assert by_torch == ["row_stats_kernel"]


@every_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads_k", [4, 2])
def test_attention(dtype, causal, heads_k, by_torch):
    draw = Draw(dtype, seed=6)
    q, k, v = draw.normal(2, 21, 4, 40), draw.normal(2, 21, heads_k, 40), draw.normal(2, 21, heads_k, 40)
    given = {"q": q, "k": k, "v": v, "causal": causal, "scale": 0.3}
    o = attention(**given)
    judge(o, reference.attention, given, pick=0)
    assert o.is_contiguous() and by_torch == []


@pytest.mark.parametrize("other", [{"causal": True}, {"lengths": True}, {"mask": "boolean"}, {"lse": True}], ids=str)
def test_what_pytorchs_attention_cannot(other: dict[str, Any]):
    plain: dict[str, Any] = {"causal": False, "lengths": False, "mask": "none", "lse": False}
    square: dict[str, Any] = plain | {"causal": True}
    assert with_torch.attends(5, 9, **plain) and with_torch.attends(5, 5, **square)
    assert not with_torch.attends(5, 9, **(plain | other))


@every_dtype
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_layer_norm(dtype, kind, affine, by_torch):
    draw = Draw(dtype, seed=7)
    given = {"x": draw.rows(9, 72), "kind": kind}
    given |= {"weight": draw.gamma(72), "bias": draw.bias(72)} if affine else {}
    judge(layer_norm(**given), reference.layer_norm, given)
    assert by_torch == []


def test_vectors_of_another_dtype_are_rounded_to_that_of_the_rows():
    draw, wide = Draw(torch.float16, seed=8), Draw(torch.float32, seed=9)
    x, weight = draw.normal(9, 72), draw.weight(40, 72)
    gamma, beta, bias = wide.gamma(72), wide.bias(72), wide.bias(40)
    assert torch.equal(layer_norm(x, gamma, beta), layer_norm(x, gamma.half(), beta.half()))
    scale = wide.layer_scale(40)
    assert torch.equal(
        linear(x, weight, bias, layer_scale=scale), linear(x, weight, bias.half(), layer_scale=scale.half())
    )


def test_an_mlp_is_two_of_them(by_torch):
    draw = Draw(torch.float16, seed=10)
    given: dict[str, Any] = {"x": draw.rows(9, 72), "fc1_weight": draw.weight(40, 72), "fc1_bias": draw.bias(40)}
    given |= {
        "fc2_weight": draw.weight(72, 40),
        "fc2_bias": draw.bias(72),
        "residual": draw.rows(9, 72),
        "norm": "none",
    }
    judge(mlp(**given, fused=False), reference.mlp, given)
    assert by_torch == []


def test_neither_autocast_nor_gradients_get_in():
    draw = Draw(torch.float32, seed=11)
    x, weight = draw.normal(9, 72), draw.weight(40, 72).requires_grad_()
    q = draw.normal(1, 9, 2, 32)
    plain = linear(x, weight), layer_norm(x), attention(q, q, q)
    assert not plain[0].requires_grad
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = linear(x, weight), layer_norm(x), attention(q, q, q)
    for ours, theirs in zip(plain, cast, strict=True):
        assert theirs.dtype == torch.float32 and torch.equal(ours, theirs)


@pytest.mark.parametrize("where", ["cuBLAS", "process"])
def test_fp32_is_computed_as_such_whatever_the_process_allows(monkeypatch, where):
    cublas: Any = torch.backends.cuda.matmul
    process: Any = torch.backends
    owner = cublas if where == "cuBLAS" else process
    seen, product, before = [], torch.nn.functional.linear, (cublas.fp32_precision, process.fp32_precision)

    def noting(*arguments: Any) -> torch.Tensor:
        seen.append(cublas.fp32_precision)
        return product(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", noting)
    try:
        cublas.fp32_precision = process.fp32_precision = "none"
        owner.fp32_precision = "tf32"
        for dtype in (torch.float32, torch.float16):
            draw = Draw(dtype, seed=13)
            linear(draw.normal(9, 72), draw.weight(40, 72))
            assert owner.fp32_precision == "tf32"
    finally:
        cublas.fp32_precision, process.fp32_precision = before
    assert seen == ["ieee", "tf32"]


def test_a_tape_says_that_it_does_not_hold_all():
    draw = Draw(torch.float16, seed=12)
    x, q = draw.normal(9, 72), draw.normal(1, 9, 2, 32)
    with launch_module.taped() as tape:
        row_stats(x)
    assert tape.by_torch == []
    with launch_module.taped() as tape:
        linear(x, draw.weight(40, 72), emit_stats=True)
        layer_norm(x)
        attention(q, q, q)
    assert tape.by_torch == ["linear", "layer_norm", "attention"] and len(tape.launches) == 1
