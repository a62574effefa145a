"""``vit-engine inspect``: one JSON object or tables that fit 100 columns, from a process whose Triton compiles."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.support import only_object
from tests.rung import RUNG
from vit_bench.inspection import EpilogueCost, Forward, Inspection, LaunchReport
from vit_bench.pipes import Section
from vit_bench.rates import PIPES
from vit_bench.roofline import roofline
from vit_bench.sass import CodeFacts
from vit_engine.cli import inspect as command
from vit_engine.cli.app import app
from vit_kernels.device import B200

pytestmark = pytest.mark.skipif(RUNG == "sanitized", reason="inspect compiles in a process of its own")

RIGHT = {"--model": "vit_tiny_patch16_224", "--gpu": "H100", "--batch": "64", "--dtype": "fp16"}


def invoke(*more: str, **changed: str) -> Any:
    options = RIGHT | {f"--{name}": value for name, value in changed.items()}
    return CliRunner().invoke(app, ["inspect", *(word for pair in options.items() for word in pair), *more])


@pytest.mark.compiled
@pytest.mark.interpreted_only
def test_json_from_a_process_that_compiles():
    result = invoke("--json")
    assert result.exit_code == 0, result.output
    found = only_object(result)
    assert (found["model"], found["gpu"]["name"], found["dtype"]) == ("vit_tiny_patch16_224", "H100 SXM", "fp16")
    assert found["rung"] == "compiled only" and "not measurements" in found["note"]
    assert {"torch", "triton"} <= set(found["versions"])
    assert found["launches"][1]["main_loops"][0]["cycles"]["tensor"] > 0


def test_the_child_compiles_with_the_same_options_and_its_answer_is_passed_on(monkeypatch):
    seen = []

    def child(arguments: list[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append((arguments[1:], env.get("TRITON_INTERPRET")))
        return subprocess.CompletedProcess(arguments, 3, stdout="the answer\n", stderr="a warning\n")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(subprocess, "run", child)
    result = invoke("--json")
    options = ["--model", "vit_tiny_patch16_224", "--gpu", "H100", "--batch", "64", "--dtype", "fp16", "--json"]
    assert seen == [(["-m", "vit_engine.cli", "inspect", *options], None)]
    assert (result.exit_code, result.stdout, result.stderr) == (3, "the answer\n", "a warning\n")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "vit_bas_patch16_224"}, ("--model", "vit_base_patch16_224")),
        ({"gpu": "voodoo"}, ("--gpu", "sm_80", "RTX 4090", "H100 SXM", "B200", "'voodoo'")),
        ({"dtype": "fp64"}, ("--dtype", "'fp64'", "fp32, fp16, bf16")),
        ({"batch": "0"}, ("--batch",)),
        ({"batch": "10900934"}, ("--batch", "at most 10900932", "197 tokens an image", "10900934")),
    ],
    ids=["model", "gpu", "dtype", "batch", "rows"],
)
def test_wrong_options_are_refused(monkeypatch, changed, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = invoke(**changed)
    assert result.exit_code == 2
    printed = " ".join(result.output.replace("│", " ").split())
    for word in words:
        assert word in printed


def section(**cycles: float) -> Section:
    mix = {"IMAD": 20, "FFMA": 18, "LDS": 9, "MOV": 8, "SEL": 7, "SHF": 6, "BAR": 5, "NOP": 4, "HGMMA": 2}
    every = dict.fromkeys(PIPES, 0.0) | {"issue": 79.0} | cycles
    return Section(True, 79, mix, every, max(every, key=lambda pipe: every[pipe]), 1 << 20)


def launch(label: str, **changes: Any) -> LaunchReport:
    import torch

    values: dict[str, Any] = {
        "label": label,
        "kernel": "patch_embed_kernel",
        "times": 48,
        "tile": {"m": 128, "n": 256, "k": 64},
        "num_warps": 12,
        "num_stages": 3,
        "grid": (123_456, 1, 1),
        "registers": 254,
        "stack": 1032,
        "shared": 231_000,
        "shared_limit": 232_448,
        "ctas_per_sm": 1,
        "waves": 834.16,
        "code": CodeFacts("UTCMMA", 16, True, True, 2000),
        "main_loops": [section(tensor=12_345, exponential=544, load_store=96)],
        "repeated": 1.0,
        "whole": None,
        "epilogue": EpilogueCost(2230, 0, 128.0, 2230 / 128),
        "roofline": roofline(59_494_000_000, 102_800_000, torch.float16, B200),
        "modelled_s": None,
    }
    return LaunchReport(**(values | changes))


def test_tables_fit_a_hundred_columns_and_hold_the_figures(capsys):
    unknown = EpilogueCost(7, 0, None, None)
    apart = EpilogueCost(323, 0, 32.0, 12.6, 2.5)
    launches = [
        launch("final norm, class token", grid=(64, 2, 1)),
        launch("attention", main_loops=[section(tensor=512), section(shared=640)], repeated=1.5),
        launch("fc1", epilogue=apart),
        launch("row-wise", main_loops=[], repeated=None, whole=section(alu=91), epilogue=unknown),
    ]
    forward = Forward(144, 8_566_000_000_000, 14_800_000_000, 0.0038, 0.0019, 0.00399, 16_036.4, None)
    command._print(Inspection("vit_gigantic_patch14_224", B200, 256, "fp16", launches, forward))
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    assert "vit_gigantic_patch14_224, batch 256, fp16, on B200 (sm_100, 148 SMs)" in lines
    text = " ".join(printed.split())
    assert "no GPU was used" in text and "bounds" in text and "not measurements" in text
    assert "Peaks: 2250.0 TFLOP/s (tensor cores), 7.7 TB/s" in text
    assert "3990 us, 16,036 images/s. Not a measurement." in text
    for words in (
        "attention x48 patch_embed 128x256x64 12 3 123456 1 834.16",  # launches
        "attention 254 1032 B 225.6 of 227 KiB UTCMMA yes 16 B yes",  # what each takes
        "main loop tensor alu exp ld/st shared issue bound by",  # without the pipes that nobody uses
        "attention, 1 512 0 0 0 0 79 tensor",
        "attention, 2 0 0 0 0 640 79 shared",
        "row-wise, all 0 91 0 0 0 79 alu",
        "attention: products are made 1.50 times, warps repeat each other's.",
        "IMAD 20, FFMA 18, LDS 9, MOV 8, SEL 7, SHF 6, HGMMA 2",
        "row-wise 7 unknown unknown",  # epilogues
        "fc1 323 32 12.6, 2.5 of them to hand over",
        "attention x48 59.49 102.8 26.4 13.4 compute",  # roofline
        "forward 8566.00 14800.0 3800.0 1900.0 compute",
    ):
        assert words in text, words
    assert "64x2x1" in text and text.count("products are made") == 1


def test_modelled_times_stand_beside_bounds_and_what_the_model_is_worth(capsys):
    from vit_bench.modelled import checks
    from vit_kernels.device import A100

    launches = [launch("fc1", modelled_s=250e-6), launch("row-wise", modelled_s=None)]
    forward = Forward(96, 5_000_000_000_000, 9_000_000_000, 0.016, 0.0045, 0.016, 4000.0, 0.0213)
    command._print(Inspection("vit_base_patch16_224", A100, 64, "bf16", launches, forward))
    text = " ".join(capsys.readouterr().out.split())
    assert "Modelled time, not a measurement" in text
    assert "The time of a product holds what its launch costs" in text and "without what a launch" not in text
    assert "fc1 x48 250.0 26.4 76%" in text and "row-wise x48 no model 26.4" in text
    assert "forward 21300 16000 75%" in text
    ((measured, ratio),) = checks(A100)
    assert f"{measured.label} {measured.seconds * 1e6:.1f} {ratio:.2f}" in text


def test_help_names_the_command():
    assert "inspect" in CliRunner().invoke(app, ["--help"]).stdout
