"""Named correctness cases, a few per kernel, and how one is run and judged.

The same cases serve the evidence files, `vit-engine verify` and the benchmarks. A case states the inputs in the
reference's terms (unfolded weights); running it folds and prepares what the launcher wants, compares with the float64
reference and judges by the rule of `vit_bench.tolerance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import vit_kernels
from vit_bench import attention_inputs, tolerance
from vit_bench.case_inputs import Inputs, head_inputs, linear_inputs, mlp_inputs, norm_inputs, patch_inputs
from vit_bench.draw import Draw
from vit_kernels import reference

STATS_COLUMNS = 64  # columns that one partial of the row statistics covers

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One problem. inputs: draws the reference's tensors; options: keyword arguments that launcher and reference share;
    launch_options: those that only the launcher has."""

    kernel: str
    name: str
    inputs: Callable[[Draw], Inputs]
    options: dict[str, Any] = field(default_factory=dict)
    launch_options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kernel}: {self.name}"


def partial_stats(x: torch.Tensor) -> torch.Tensor:
    """Row statistics [2, ceil(K / 64), M] of x [M, K], as a GEMM that emits them writes them."""
    groups = x.double().split(STATS_COLUMNS, dim=1)
    means = torch.stack([g.mean(1) for g in groups])
    m2s = torch.stack([(g - g.mean(1, keepdim=True)).square().sum(1) for g in groups])
    return torch.stack([means, m2s]).float()


def merged_stats(stats: torch.Tensor, columns: int) -> torch.Tensor:
    """Mean and M2 of whole rows [2, 1, M] fp32 from any number of partials (Chan's formula, in float64)."""
    means, m2s = stats.double()
    whole = stats.shape[1] == 1
    widths = [columns] if whole else [min(STATS_COLUMNS, columns - at) for at in range(0, columns, STATS_COLUMNS)]
    counts = torch.tensor(widths, dtype=torch.float64, device=stats.device)[:, None]
    mean = (means * counts).sum(0) / columns
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    return torch.stack([mean, m2])[:, None, :].float()


def _folded(inputs: Inputs, weight: str, bias: str, norm: str, sums: bool) -> tuple[torch.Tensor | None, ...]:
    gamma, beta = inputs.get("norm_weight"), inputs.get("norm_bias")
    return vit_kernels.fold_norm(inputs[weight], inputs.get(bias), gamma, beta, kind=norm, sums=sums)


def _stats_of(inputs: Inputs, partials: bool) -> torch.Tensor:
    return partial_stats(inputs["x"]) if partials else vit_kernels.row_stats(inputs["x"])


def launcher_call(case: Case, inputs: Inputs) -> Callable[[], Any]:
    """The launcher with its own arguments for the reference's inputs: weights folded, row statistics made."""
    options = {**case.options, **case.launch_options}
    launcher = getattr(vit_kernels, _function(case, inputs))
    if case.kernel not in ("linear", "mlp"):
        return partial(launcher, **inputs, **options)
    first, default = (("weight", "bias"), "none") if case.kernel == "linear" else (("fc1_weight", "fc1_bias"), "layer")
    partials, norm = options.pop("partial_stats", False), options.get("norm", default)
    # Models do without sums of the weights, but for those that torch.compile traces.
    sums = options.pop("column_sums", False)
    given = {name: value for name, value in inputs.items() if name not in ("norm_weight", "norm_bias")}
    given.setdefault(first[1], None)
    if norm != "none":
        weight, column_sum, bias = _folded(inputs, *first, norm, sums)
        given |= {first[0]: weight, first[1]: bias, "stats": _stats_of(inputs, partials), "column_sum": column_sum}
    return partial(launcher, **given, **options)


def named_outputs(case: Case, result: Any) -> Outputs:
    """A launcher's result, or a reference's, as named tensors."""
    if case.kernel == "row_stats":
        return {"mean": result[0], "m2": result[1]}
    if not isinstance(result, tuple):
        return {"y": result}
    if case.kernel == "qk_rope":
        return {"q": result[0], "k": result[1]}
    second = "lse" if case.kernel == "attention" else "stats"
    return {"y": result[0], second: result[1]}


def _function(case: Case, inputs: Inputs) -> str:
    """The launcher and reference that a case of this kernel goes through: attention has two, with one kernel."""
    return "attention_packed" if "cu_seqlens" in inputs else case.kernel


def reference_outputs(case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """The naive formula with every floating-point input in `dtype`; integer images and boolean masks stay."""
    cast = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    result = getattr(reference, _function(case, inputs))(**cast, **case.options)
    if isinstance(result, tuple) and case.kernel == "attention" and not case.launch_options.get("return_lse"):
        result = result[0]
    return named_outputs(case, result)


@dataclass(frozen=True)
class Prepared:
    """A case ready to be run any number of times. call: the launcher with its arguments; truth, eager: the results of
    the naive formula in float64 and in the case's dtype, where they are compared."""

    case: Case
    call: Callable[[], Any]
    truth: Outputs
    eager: Outputs
    device: str | torch.device

    def judge(self) -> dict[str, tolerance.Errors]:
        """Launches once; the figures of every output, or AssertionError (`judge_outputs`)."""
        ours = named_outputs(self.case, self.call())
        return judge_outputs(self.case, ours, self.truth, self.eager, self.device)


def judge_outputs(
    case: Case,
    ours: Outputs,
    truth: Outputs,
    eager: Outputs,
    device: str | torch.device,
    factor: float = tolerance.FACTOR,
) -> dict[str, tolerance.Errors]:
    """The figures of every output, or AssertionError. factor: as for `tolerance.check`.

    Row statistics that a kernel emits are judged against those of the values it stored.
    """
    ours, truth, eager = dict(ours), dict(truth), dict(eager)
    stats = ours.pop("stats", None)
    if stats is not None:
        stored = ours["y"].to(device).reshape(-1, ours["y"].shape[-1])
        ours["mean"], ours["m2"] = merged_stats(stats.to(device), stored.shape[1])
        truth["mean"], truth["m2"] = reference.row_stats(stored.double())
        eager["mean"], eager["m2"] = reference.row_stats(stored)
    if ours.keys() != truth.keys():
        raise AssertionError(f"{case}: results {sorted(ours)} where the reference gives {sorted(truth)}")
    return {
        name: tolerance.check(
            ours[name].to(device), eager[name], truth[name], name=f"{case}, {name}", on=device, factor=factor
        )
        for name in truth
    }


def prepare(
    case: Case, dtype: torch.dtype, device: str | torch.device, seed: int = 0, judged_on: str | torch.device = "cpu"
) -> Prepared:
    """A case with its inputs on `device`.

    judged_on: where the references run and results are compared. On the CPU products of 16 bits accumulate in fp32, and
    no default of a GPU enters the truth; elsewhere it is faster.
    """
    inputs = case.inputs(Draw(dtype, device, seed))
    there = {name: value.to(judged_on) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    truth, eager = reference_outputs(case, there, torch.float64), reference_outputs(case, there, dtype)
    return Prepared(case, launcher_call(case, inputs), truth, eager, judged_on)


def run_case(case: Case, dtype: torch.dtype, device: str | torch.device, seed: int = 0) -> dict[str, tolerance.Errors]:
    """Run a case on the rung that this process stands on; the figures of every output, or AssertionError."""
    return prepare(case, dtype, device, seed).judge()


STATS = {"emit_stats": True}
CASES: tuple[Case, ...] = (
    Case("patch_embed", "32 px, patch 16, class token", patch_inputs(2, 32, 16, 96, 1), launch_options=STATS),
    Case(
        "patch_embed",
        "28 px, patch 14, uint8 channels_last",
        patch_inputs(1, 28, 14, 72, 5, raw=True, position_all=False),
    ),
    Case("patch_embed", "24 px, patch 8, no prefix", patch_inputs(3, 24, 8, 100, 0)),
    Case("attention", "packed 197 tokens, width 64", attention_inputs.packed(1, 197, 2, 64)),
    Case(
        "attention",
        "packed 50 tokens, width 80, lse",
        attention_inputs.packed(2, 50, 2, 80),
        launch_options={"return_lse": True},
    ),
    Case("attention", "causal 33 of 65, width 72", attention_inputs.separate(1, 33, 65, 2, 2, 72), {"causal": True}),
    Case(
        "attention",
        "key lengths, grouped, width 40",
        attention_inputs.separate(3, 17, 70, 4, 2, 40, "lengths"),
        {"scale": 0.3},
    ),
    Case(
        "attention",
        "boolean mask, width 32, lse",
        attention_inputs.separate(2, 20, 45, 2, 1, 32, "boolean"),
        {},
        {"return_lse": True},
    ),
    Case(
        "attention",
        "packed sequences, grouped, width 64",
        attention_inputs.sequences(37, 0, 70, 1, 20, heads=4, heads_k=2, width=64),
    ),
    Case("attention", "additive mask, width 128", attention_inputs.separate(1, 40, 50, 2, 2, 128, "additive")),
    Case("linear", "odd sizes, bias", linear_inputs(50, 77, 43, "bias")),
    Case(
        "linear",
        "LayerNorm, bias",
        linear_inputs(70, 192, 144, "norm", "bias"),
        {"norm": "layer"},
        {"partial_stats": True, "column_sums": True},
    ),
    Case(
        "linear",
        "LayerNorm, gelu",
        linear_inputs(33, 128, 136, "norm", "bias"),
        {"norm": "layer", "activation": "gelu"},
    ),
    Case("linear", "RMSNorm, silu", linear_inputs(17, 100, 64, "rms", "bias"), {"norm": "rms", "activation": "silu"}),
    Case(
        "linear", "LayerScale, residual, statistics", linear_inputs(40, 96, 200, "bias", "scale", "residual"), {}, STATS
    ),
    Case(
        "linear",
        "swiglu",
        linear_inputs(35, 96, 72, "norm", "bias", gated=True),
        {"norm": "layer", "activation": "swiglu"},
    ),
    Case("linear", "gelu_tanh", linear_inputs(16, 64, 64, "bias"), {"activation": "gelu_tanh"}),
    Case("linear", "quick_gelu", linear_inputs(16, 64, 64, "bias"), {"activation": "quick_gelu"}),
    Case("row_stats", "width 192", lambda draw: {"x": draw.rows(20, 192)}),
    Case("row_stats", "width 1000", lambda draw: {"x": draw.rows(3, 1000)}),
    Case("row_stats", "width 5000", lambda draw: {"x": draw.rows(2, 5000)}),
    Case("layer_norm", "width 192", norm_inputs(20, 192)),
    Case("layer_norm", "width 1000, rms", norm_inputs(3, 1000, beta=False), {"kind": "rms"}),
    Case("layer_norm", "width 5000", norm_inputs(2, 5000)),
    Case(
        "mlp", "width 96, one kernel, gelu", mlp_inputs(20, 96, 200), {}, {"fused": True, "column_sums": True, **STATS}
    ),
    Case(
        "mlp",
        "width 192, one kernel, swiglu",
        mlp_inputs(17, 192, 72, gated=True),
        {"activation": "swiglu"},
        {"fused": True},
    ),
    Case("mlp", "width 400, two GEMMs", mlp_inputs(18, 400, 160), {}, {"partial_stats": True, **STATS}),
    Case("qk_rope", "LayerNorm, width 64", head_inputs(3, 3, 64, "layer"), {"norm": "layer"}),
    Case("qk_rope", "RMSNorm, width 7, grouped", head_inputs(4, 2, 7, "rms"), {"norm": "rms"}),
    Case("qk_rope", "halves, width 64, five prefix tokens", head_inputs(3, 3, 64, "all", "narrow", prefix=5)),
    Case("qk_rope", "interleaved, width 88", head_inputs(2, 2, 88, "all", prefix=1), {"interleaved": True}),
    Case(
        "qk_rope",
        "LayerNorm, halves of each image, width 80, grouped",
        head_inputs(4, 1, 80, "layer", "image", prefix=1),
        {"norm": "layer"},
    ),
    Case(
        "qk_rope",
        "RMSNorm, interleaved of each head, width 64",
        head_inputs(3, 3, 64, "rms", "head", prefix=2),
        {"norm": "rms", "interleaved": True},
    ),
)


def cases_for(kernel: str) -> Iterator[Case]:
    return (case for case in CASES if case.kernel == kernel)
