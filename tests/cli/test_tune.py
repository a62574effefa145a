"""``vit-engine tune``: what it says without a GPU, what it writes with one (stood in for here), and the dry run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.bench.child import run
from tests.rung import RUNG
from vit_bench import tuning_gpu
from vit_bench.tuning import Bench, GpuLostError
from vit_bench.tuning_candidates import title
from vit_bench.tuning_problems import Problem
from vit_engine.cli import tune as command
from vit_engine.cli.app import app
from vit_kernels import tiles
from vit_kernels.device import H100
from vit_kernels.tuned import Gpu, read_tuned, versions_here

pytestmark = pytest.mark.skipif(RUNG == "sanitized", reason="tune is for a process whose Triton compiles")

MODEL = "vit_tiny_patch16_224"
HERE = Gpu("NVIDIA H100 80GB HBM3", 90, 132)


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["tune", *words])


def printed(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_without_a_gpu_it_says_so_and_what_can_be_done(compiling, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("--model", MODEL, "--batch", "8", "--out", str(tmp_path / "tuned.json"))
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert "no NVIDIA GPU here" in printed(result) and f"--model {MODEL} --batch 8 --dry-run --gpu h100" in printed(
        result
    )


def test_interpreted_kernels_are_not_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = invoke("--model", MODEL, "--batch", "8")
    assert result.exit_code == 2 and "TRITON_INTERPRET is set" in printed(result)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dtype", "fp64"], ("--dtype", "'fp64'", "fp32, fp16, bf16")),
        (["--dry-run"], ("--dry-run --gpu h100",)),
        (["--gpu", "h100"], ("--dry-run --gpu h100",)),
        (["--dry-run", "--gpu", "h100", "--out", "x.json"], ("--dry-run", "no use for --out")),
        (["--dry-run", "--gpu", "h100", "--resume"], ("--dry-run", "no use for --resume")),
        (["--dry-run", "--gpu", "voodoo"], ("--gpu", "sm_80", "H100 SXM", "'voodoo'")),
        (["--dry-run", "--gpu", "h100", "--model", "vit_bas"], ("--model", "'vit_bas'", "vit_base_patch32_224")),
        (["--dry-run", "--gpu", "h100", "--model", "timm:vit_bas"], ("--model", "'timm:vit_bas'")),
        (["--dry-run", "--gpu", "h100", "--model", "keras:vit"], ("--model", "timm, torchvision")),
        (["--dry-run", "--gpu", "h100", "--model", "timm:resnet18"], ("--model", "no kernels for", "ResNet")),
        (["--batch", "0"], ("--batch",)),
        (["--batch", "99999999", "--dry-run", "--gpu", "h100"], ("--batch", "at most", "99999999")),
        (
            ["--dry-run", "--gpu", "h100", "--model", "timm:vit_tiny_patch16_224", "--batch", "99999999999"],
            ("--batch", "no memory here for 99999999999 images of 3x224x224"),
        ),
    ],
    ids=[
        "dtype",
        "no gpu",
        "no dry run",
        "out",
        "resume",
        "gpu",
        "preset",
        "timm",
        "library",
        "no ViT",
        "batch",
        "rows",
        "memory",
    ],
)
def test_wrong_options_are_refused(compiling, words, expected):
    result = invoke("--model", MODEL, "--batch", "1", *words)
    assert result.exit_code == 2
    for word in expected:
        assert word in printed(result), printed(result)


def test_models_of_timm_that_are_no_preset_are_accelerated():
    """Relative positions, whose index is a buffer; norms that the presets do not have."""
    for name, kernels in (("beit_base_patch16_224", {"mask": "additive"}), ("vit_base_patch16_rope_mixed_224", {})):
        calls = command._calls(f"timm:{name}", [2], "fp16", H100)
        (attention, *_) = (call for call in calls if call.kernel == "attention")
        assert attention.arguments["q"].shape == (2, 197, 12, 64) and attention.arguments["q"].dtype == torch.float16
        assert (attention.arguments["mask"] is not None) == bool(kernels)
        assert ("qk_rope" in {call.kernel for call in calls}) == (not kernels)


def test_batches_follow_each_other(compiling, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(command, "_tune", lambda *given: seen.append(given) or 3)
    result = invoke("--model", MODEL, "--batch", "8", "64", "1", "--dtype", "fp16", "--out", "a.json", "--wide")
    assert result.exit_code == 3
    assert seen == [(MODEL, [1, 8, 64], "fp16", Path("a.json"), False, True, True)]


def test_a_dry_run_compiles_in_a_child(monkeypatch):
    seen = []

    def child(arguments: list[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append((arguments[1:], env.get("TRITON_INTERPRET")))
        return subprocess.CompletedProcess(arguments, 3, stdout="the answer\n", stderr="")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(subprocess, "run", child)
    result = invoke("--model", MODEL, "--batch", "1", "8", "--dry-run", "--gpu", "h100", "--no-pytorch", "--wide")
    words = ["--model", MODEL, "--batch", "1", "--batch", "8", "--dtype", "bf16", "--dry-run", "--gpu", "h100"]
    assert seen == [(["-m", "vit_engine.cli", "tune", *words, "--no-pytorch", "--wide"], None)]
    assert (result.exit_code, result.stdout) == (3, "the answer\n")


class FakeGpu:
    """Times made up; nothing runs. seconds: by title. wrong: titles that are found wrong. lost: that break the GPU."""

    def __init__(self, wrong: Sequence[str] = (), lost: str = "", interrupt_at: int = 10**9) -> None:
        self.wrong, self.lost, self.interrupt_at = wrong, lost, interrupt_at
        self.verified: list[str] = []
        self.problems = 0

    def verify(self, problem: Problem, choice: Any) -> dict[str, Any]:
        self.verified.append(title(choice))
        if title(choice) == self.lost:
            raise GpuLostError("it broke the GPU", title(choice), "an illegal address")
        if title(choice) in self.wrong or "all" in self.wrong:
            raise AssertionError("it is wrong")
        return {"y": {"row": 0.1}}

    def time(self, problem: Problem, choices: Sequence[Any]) -> list[list[float] | str]:
        self.problems += 1
        if self.problems >= self.interrupt_at:
            raise KeyboardInterrupt
        return [[1e-6 if choice is tiles.TORCH else 2e-6] * 5 for choice in choices]

    def bench(self, _device: torch.device) -> Bench:
        return Bench(lambda *_: "", self.verify, self.time, lambda _: None)


@pytest.fixture
def on_gpu(compiling, monkeypatch, tmp_path) -> Callable[..., Any]:
    """Runs the command as if there were an H100."""

    def tune(fake: FakeGpu, *words: str) -> Any:
        monkeypatch.setattr(command, "_here", lambda *_: (torch.device("cuda", 0), H100, HERE))
        monkeypatch.setattr(tuning_gpu, "gpu_bench", fake.bench)
        return invoke("--model", MODEL, "--batch", "1", "--dtype", "fp16", "--out", str(tmp_path / "out.json"), *words)

    return tune


def test_the_file_and_what_is_printed(on_gpu, tmp_path):
    result = on_gpu(FakeGpu(wrong=["4x256 w4"]))
    assert result.exit_code == 0, result.output
    table = read_tuned(tmp_path / "out.json")
    assert (table.gpu, table.versions) == (HERE, versions_here()) and len(table.entries) == 17
    winners = {entry.problem["kernel"]: entry.winner for entry in table.entries}
    assert (
        winners["linear"] == winners["attention"] == winners["layer_norm"] == "torch"
        and "m" in table.entries[0].problem
    )
    text = printed(result)
    assert f"{MODEL}, batch 1, fp16, on NVIDIA H100 80GB HBM3 (sm_90, 132 SMs): 17 problems" in text
    assert "PyTorch 1.0 us" in text and "2.0 us" in text and "discarded: 4x256 w4: it is wrong" in text
    assert "17 entries" in text and "accelerate(model, tuned=" in text


def test_without_pytorch_it_cannot_win(on_gpu, tmp_path):
    assert on_gpu(FakeGpu(), "--no-pytorch").exit_code == 0
    assert "torch" not in [entry.winner for entry in read_tuned(tmp_path / "out.json").entries]


def test_an_interrupted_run_goes_on(on_gpu, tmp_path):
    result = on_gpu(FakeGpu(interrupt_at=4))
    assert result.exit_code == 130 and "--resume" in printed(result)
    first = read_tuned(tmp_path / "out.json").entries
    assert len(first) == 3
    refusal = on_gpu(FakeGpu())
    assert refusal.exit_code == 2 and "exists" in printed(refusal)
    fake = FakeGpu()
    assert on_gpu(fake, "--resume").exit_code == 0
    again = read_tuned(tmp_path / "out.json").entries
    assert len(again) == 17 and again[:3] == first and fake.problems == 14


def test_what_is_said_of_a_file_that_is_not_there_yet(on_gpu, tmp_path):
    text = printed(on_gpu(FakeGpu(interrupt_at=1)))
    assert "Interrupted. Nothing was measured yet." in text and not (tmp_path / "out.json").exists()


def test_a_file_that_cannot_be_written_or_read_is_named_before_anything_is_measured(on_gpu, tmp_path):
    (tmp_path / "deep").write_text("[" * 100_000)
    for out, words, resume in (
        (tmp_path, "is a folder", True),
        (tmp_path / "none" / "out.json", "its folder does not exist", False),
        (tmp_path / "deep", "deep is no tuned file", True),
    ):
        fake = FakeGpu()
        result = on_gpu(fake, "--out", str(out), *["--resume"] * resume)
        assert result.exit_code == 2 and words in printed(result) and not fake.verified, printed(result)


def test_a_candidate_that_breaks_the_gpu_is_left_out_afterwards(on_gpu, tmp_path):
    result = on_gpu(FakeGpu(lost="PyTorch"))
    assert result.exit_code == 1 and "it broke the GPU" in printed(result) and "--resume" in printed(result)
    fake = FakeGpu(lost="")
    on_gpu(fake, "--resume")
    entry = next(e for e in read_tuned(tmp_path / "out.json").entries if "PyTorch" in e.measured["discarded"])
    assert entry.measured["discarded"]["PyTorch"] == "an illegal address" and entry.winner != "torch"


def test_no_right_candidate_is_a_failure(on_gpu):
    result = on_gpu(FakeGpu(wrong=["all"]))
    assert result.exit_code == 1 and "No candidate was right for 17" in printed(result)


def test_a_file_of_another_gpu_is_not_added_to(on_gpu, tmp_path):
    assert on_gpu(FakeGpu()).exit_code == 0
    content = json.loads((tmp_path / "out.json").read_text())
    for changed in (
        content | {"gpu": content["gpu"] | {"name": "NVIDIA A100"}},
        content | {"versions": content["versions"] | {"triton": "1.0"}},
        content | {"format": 0},
    ):
        (tmp_path / "out.json").write_text(json.dumps(changed))
        result = on_gpu(FakeGpu(), "--resume")
        assert result.exit_code == 2 and json.loads((tmp_path / "out.json").read_text()) == changed
        assert any(word in printed(result) for word in ("NVIDIA A100", "triton 1.0", "format must be 1"))


ROWS = ("128x256x64 w4 s3", "128x256x64 w8 s5", "PyTorch")


@pytest.mark.compiled
def test_a_dry_run_lists_registers_spills_shared_memory_and_cycles():
    text = run(
        """
        import contextlib, io, json
        import torch
        from vit_bench import tuning_dry
        from vit_bench.tuning_problems import taken_apart
        from vit_engine.cli import tune
        from vit_kernels import gemm_tiles, tiles
        from vit_kernels.device import H100

        spilling = gemm_tiles.GemmTile(128, 256, 64, 4, 3)  # 256 sums a thread
        large = gemm_tiles.GemmTile(128, 256, 64, 8, 5)
        tuning_dry.candidates = lambda problem, with_pytorch, wide: [problem.default, spilling, large, tiles.TORCH]
        new = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        options = {"residual": new(394, 768), "emit_stats": True}
        call = taken_apart("linear", "projection", [new(394, 768), new(768, 768)], options)
        tune._calls = lambda *_: [call]
        found = io.StringIO()
        with contextlib.redirect_stdout(found):
            tune._dry_run("a_model", [2], "bf16", "h100", True, False)
        print(json.dumps(found.getvalue()))
        """
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= 100
    assert lines[0] == "a_model, batch 2, bf16, on H100 SXM (sm_90)"
    assert "nothing was run, verified or timed" in text
    assert any(line.startswith("linear (projection): m=394 n=768 k=768") for line in lines)
    spilling, large, pytorch = (next(line for line in lines if line.startswith(name)) for name in ROWS)
    default = lines[lines.index(spilling) - 2]
    assert " 0 B " in default and "KiB" in default and default.endswith("fits")
    assert lines[lines.index(spilling) - 1].endswith(", default"), "the long name of the default goes on in a line"
    assert " 144.0 KiB " in spilling and "spills" in text and " 0 B " not in spilling
    assert "OutOfResources" in large and "fits" not in large
    assert "Required: 245760" in " ".join(lines), "no word of a verdict is folded in two"
    assert pytorch == "PyTorch fits"
