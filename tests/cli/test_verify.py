"""``vit-engine verify``: figures per case, and an exit code that tells."""

from __future__ import annotations

import json
import re
import signal
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vit_kernels
from tests.rung import RUNG
from vit_engine.cli.app import app

pytestmark = pytest.mark.skipif(RUNG == "sanitized", reason="verify itself decides where kernels run")


def verify(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *arguments])
    return result.exit_code, result.output


def test_a_kernel_that_agrees() -> None:
    code, output = verify("--kernel", "row_stats", "--kernel", "layer_norm", "--dtype", "fp32", "--json")
    assert code == 0, output
    report = json.loads(output)
    assert report["failed"] == 0 and report["passed"] == len(report["results"]) >= 6
    assert RUNG in report["rung"]
    for row in report["results"]:
        assert row["passed"] and row["dtype"] == "fp32"
        assert 0 <= row["row_error"] <= row["row_allowed"]


def test_a_kernel_that_is_wrong_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    right = vit_kernels.layer_norm

    def wrong(x: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        return right(x, *rest, **options) * 1.001  # type: ignore[arg-type]

    monkeypatch.setattr(vit_kernels, "layer_norm", wrong)
    code, output = verify("--kernel", "layer_norm", "--kernel", "row_stats", "--dtype", "fp32")
    assert code == 1
    assert "layer_norm: width 192" in output and "FAILED" in output and "is over the allowed" in output
    assert "3 passed, 3 failed" in output


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["lines", "json"])
@pytest.mark.usefixtures("interruptible")
def test_what_was_compared_is_kept_when_it_is_interrupted(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    calls, right = [], vit_kernels.layer_norm

    def third(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return right(x, *rest, **more)

    monkeypatch.setattr(vit_kernels, "layer_norm", third)
    result = CliRunner().invoke(app, ["verify", "--kernel", "layer_norm", "--dtype", "fp32", *options])
    assert result.exit_code == 130
    assert re.fullmatch(r"vit-engine verify: interrupted: 2 of [3-9] done\n", result.stderr)
    if options:
        report = json.loads(result.stdout)
        assert report["passed"] == len(report["results"]) == 2 and report["failed"] == 0 < report["not_run"]
    else:
        assert re.search(r"2 passed, 0 failed, \d not run", result.stdout) and result.stdout.count("  ok\n") == 2


def test_a_kernel_that_raises_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(vit_kernels, "layer_norm", broken)
    code, output = verify("--kernel", "layer_norm", "--kernel", "row_stats", "--dtype", "fp32")
    assert code == 1 and "FAILED: RuntimeError: out of resource: shared memory\n" in output
    assert "3 passed, 3 failed" in output


def test_the_whole_model() -> None:
    from vit_bench.whole_model import SMALL
    from vit_engine.cli.verify import _judged, _planned

    backend_device = "cpu" if RUNG == "interpreted" else "cuda"
    rows = [_judged(*one) for one in _planned([], None, False, ["fp32"], backend_device)]
    assert [row["name"] for row in rows] == ["whole model: small ViT"]
    assert rows[0]["passed"], rows[0]
    assert SMALL.num_register_tokens and SMALL.layer_scale


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "fp64"], ("'fp64'", "fp32, fp16, bf16")),
        (["--kernel", "softmax"], ("softmax", "attention", "mlp")),
        (["--model", "vit_medium"], ("vit_medium",)),
        (["--kernel", "row_stats", "--model", "vit_tiny_patch16_224"], ("--model", "cannot be combined")),
    ],
    ids=["dtype", "kernel", "model", "model and kernel"],
)
def test_wrong_options_are_refused(arguments: list[str], words: tuple[str, ...]) -> None:
    code, output = verify(*arguments)
    assert code == 2, output
    for word in words:
        assert word in output


@pytest.mark.interpreted_only
def test_bfloat16_is_not_verified_by_the_interpreter() -> None:
    code, output = verify("--kernel", "row_stats", "--dtype", "bf16")
    assert code == 2
    assert "bf16" in output and "GPU" in output
