"""`vit-engine tune` on the GPU at hand, with a few candidates, and a model that runs on the file."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from typer.testing import CliRunner

import vit_engine
from vit_bench import tuning_candidates
from vit_engine.cli.app import app
from vit_kernels import forget_tuned, tiles

pytestmark = pytest.mark.gpu

MODEL = "vit_tiny_patch16_224"


@torch.inference_mode()
def test_a_tuned_model_gives_what_the_model_gives(monkeypatch, tmp_path):
    every = tuning_candidates.candidates

    def few(problem: Any, *, with_pytorch: bool, wide: bool) -> list[Any]:
        found = every(problem, with_pytorch=with_pytorch, wide=wide)
        return [*found[:3], *[tiles.TORCH] * (tiles.TORCH in found)]

    monkeypatch.setattr("vit_bench.tuning.candidates", few)
    out = tmp_path / "tuned.json"
    result = CliRunner().invoke(app, ["tune", "--model", MODEL, "--batch", "2", "--dtype", "fp16", "--out", str(out)])
    assert result.exit_code == 0, result.output
    entries = json.loads(out.read_text())["entries"]
    assert all(min(times) > 0 for entry in entries for times in entry["measured"]["times"].values())
    torch.manual_seed(0)
    theirs = timm.create_model(MODEL).eval().cuda().half()
    images = torch.randn(2, 3, 224, 224, device="cuda", dtype=torch.float16)
    expected = theirs(images)
    try:
        ours = vit_engine.accelerate(theirs, tuned=out)
        for _ in range(3):
            torch.testing.assert_close(ours(images), expected, rtol=2e-2, atol=2e-2)
    finally:
        forget_tuned()
