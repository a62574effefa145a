"""Results judged a part at a time: nothing is left out, and a single wrong place is found wherever it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vit_bench import attention_inputs
from vit_bench.cases import Case, cases_for, named_outputs, reference_outputs
from vit_bench.draw import Draw
from vit_bench.timed import judged
from vit_bench.tolerance import FACTOR
from vit_kernels import reference

WANTED = {
    "attention": "packed 197 tokens, width 64",
    "patch_embed": "24 px, patch 8, no prefix",
    "linear": "LayerScale, residual, statistics",
    "mlp": "width 400, two GEMMs",
    "layer_norm": "width 192",
}


def made(kernel: str) -> tuple[Case, dict[str, Any], dict[str, torch.Tensor]]:
    """A case with results that are eager's own, and row statistics where a kernel leaves some behind."""
    case = next(one for one in cases_for(kernel) if one.name == WANTED[kernel])
    if kernel == "attention":  # several images, each of them larger than a part
        case = replace(case, inputs=attention_inputs.packed(3, 97, 2, 64))
    inputs = case.inputs(Draw(torch.float32, "cpu"))
    results = {"y": reference_outputs(case, inputs, torch.float32)["y"].contiguous()}
    if case.launch_options.get("emit_stats"):
        results["stats"] = reference.row_stats(results["y"])
    return case, inputs, results


@pytest.mark.parametrize("kernel", WANTED)
@pytest.mark.parametrize("largest", [1, 300, 20_000, 1 << 24])
def test_every_element_is_judged(monkeypatch: pytest.MonkeyPatch, kernel: str, largest: int) -> None:
    case, inputs, results = made(kernel)
    monkeypatch.setattr(judged, "LARGEST", largest)
    seen = torch.zeros_like(results["y"])
    for _, ours in judged._parts(case, inputs, {"y": seen}):
        ours["y"] += 1
    assert bool((seen == 1).all()), "once each"
    if largest < 20_000:  # so few elements at a time have no largest error to speak of
        return
    found = judged.judge(case, inputs, results, FACTOR)
    assert found.keys() == {"y", *(("mean", "m2") if "stats" in results else ())}
    flat = results["y"].view(-1)
    for place in (0, flat.numel() // 2, flat.numel() - 1):
        wrong = results["y"].clone()
        wrong.view(-1)[place] += 1.0
        with pytest.raises(AssertionError, match=case.name):
            judged.judge(case, inputs, results | {"y": wrong}, FACTOR)


def test_statistics_are_those_of_the_rows_of_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged, "LARGEST", 2000)
    case, inputs, results = made("linear")
    results["stats"] = results["stats"].clone()
    results["stats"][1, 0, -1] *= 1.5
    with pytest.raises(AssertionError, match="m2"):
        judged.judge(case, inputs, results, FACTOR)


def test_the_worst_part_is_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case, inputs, results = made("layer_norm")
    results["y"][3] *= 1 + 4e-7
    whole = judged.judge(case, inputs, results, 1e6)["y"]
    monkeypatch.setattr(judged, "LARGEST", 1)
    assert judged.judge(case, inputs, results, 1e6)["y"].largest == whole.largest


def test_parts_are_about_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged, "LARGEST", 1000)
    sizes = [at.stop - at.start for at in judged._steps(1001, 10)]
    assert sum(sizes) == 1001 and len(sizes) == 11 and set(sizes) == {91}
    assert list(judged._steps(3, 10**6)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(judged._steps(5, 0)) == [slice(0, 5)]


def test_others_may_sum_in_another_order_and_not_compute_something_else() -> None:
    case, inputs, results = made("linear")
    truth = reference_outputs(case, inputs, torch.float64)["y"]
    far = (truth + 5 * (results["y"] - truth)).float()
    with pytest.raises(AssertionError):
        judged.judge(case, inputs, {"y": far, "stats": reference.row_stats(far)}, FACTOR)
    judged.judge(case, inputs, named_outputs(case, (far, reference.row_stats(far))), 8.0)
