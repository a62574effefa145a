"""Results of large problems against the reference, a part at a time, so that float64 fits beside what is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vit_bench.case_inputs import Inputs
from vit_bench.cases import Case, Outputs, judge_outputs, reference_outputs
from vit_bench.tolerance import Errors
from vit_bench.tuning_gpu import exact_products

LARGEST = 1 << 24  # elements of the largest tensor of a part's reference

Part = tuple[Inputs, Outputs]


def judge(case: Case, inputs: Inputs, results: Outputs, factor: float) -> dict[str, Errors]:
    """Figures of the part that comes closest to what is allowed, by output, with the largest error of all parts;
    AssertionError for one that misses the tolerance with this factor.

    Every element is judged, where the tensors are. inputs, results: whole, by the names of the reference's.
    """
    worst: dict[str, Errors] = {}
    for given, ours in _parts(case, inputs, results):
        device = ours["y"].device
        with exact_products():
            truth, eager = (reference_outputs(case, given, dtype) for dtype in (torch.float64, ours["y"].dtype))
        for name, found in judge_outputs(case, ours, truth, eager, device, factor).items():
            before = worst.get(name, found)
            closest = max(before, found, key=_closeness)
            worst[name] = replace(closest, largest=max(before.largest, found.largest))
    return worst


def _closeness(errors: Errors) -> float:
    return errors.row / errors.row_allowed if errors.row_allowed else 0.0


def _steps(total: int, each: int) -> Iterator[slice]:
    """Slices over `total` rows or images, each of which makes `each` elements.

    They are about equal: the largest of few errors says little, so a small last part would be judged too harshly.
    """
    count = min(total, -(-total * max(each, 1) // LARGEST))
    return (slice(total * part // count, total * (part + 1) // count) for part in range(count))


def _parts(case: Case, inputs: Inputs, results: Outputs) -> Iterator[Part]:
    if case.kernel == "attention":
        yield from _attention_parts(inputs, results)
    elif case.kernel == "patch_embed":
        images, tokens = inputs["images"], results["y"].shape[1]
        for at in _steps(images.shape[0], max(results["y"][0].numel(), images[0].numel())):
            rows = slice(at.start * tokens, at.stop * tokens)
            yield inputs | {"images": images[at]}, _sliced(results, at, rows)
    else:
        widest = max(value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.ndim == 2)
        x = inputs["x"]
        for at in _steps(x.shape[0], max(widest if case.kernel in ("linear", "mlp") else 0, x.shape[1])):
            rowwise = {name: inputs[name][at] for name in ("x", "residual") if inputs.get(name) is not None}
            yield inputs | rowwise, _sliced(results, at, at)


def _sliced(results: Outputs, at: slice, rows: slice) -> Outputs:
    """y by its first axis, row statistics [2, partials, rows] by their last."""
    return {name: value[..., rows] if name == "stats" else value[at] for name, value in results.items()}


def _attention_parts(inputs: dict[str, Any], results: Outputs) -> Iterator[Part]:
    """Some images at a time, or some queries of one image where its scores alone are too many."""
    q, k, v = (inputs[name] for name in "qkv")
    batch, queries, heads, _ = q.shape
    scores = heads * k.shape[1]
    if scores * queries <= LARGEST:
        for at in _steps(batch, scores * queries):
            yield {"q": q[at], "k": k[at], "v": v[at]}, {"y": results["y"][at]}
        return
    for image in range(batch):
        for at in _steps(queries, scores):
            one = slice(image, image + 1)
            yield {"q": q[one, at], "k": k[one], "v": v[one]}, {"y": results["y"][one, at]}
