"""``vit-engine warmup``: its options, what it says, and that it compiles in a process whose Triton compiles."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import vit_engine
from tests.cli.support import only_object
from vit_bench import warmup
from vit_engine.artefacts import Manifest
from vit_engine.cli import warmup as command
from vit_engine.cli.app import app
from vit_kernels.tuned import Gpu, Tuned, versions_here, write_tuned


def invoke(into: Path, *more: str, **changed: str) -> Any:
    options = {"--model": "vit_tiny_patch16_224", "--gpu": "h100", "--batch": "1 8"}
    options |= {f"--{name}": value for name, value in changed.items()}
    words = [word for option, values in options.items() for word in (option, *values.split())]
    return CliRunner().invoke(app, ["warmup", "--into", str(into), *words, *more])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was to be compiled; one file is written instead."""
    calls: list[tuple[Any, ...]] = []

    def compile_model(model: str, gpu: str, batches: list[int], dtype: str, into: Path, tuned: Path | None) -> Manifest:
        calls.append((model, gpu, batches, dtype, tuned))
        into.mkdir()
        (into / "file").write_bytes(bytes(2_000_000))
        shapes = tuple((batch, 3, 224, 224) for batch in batches)
        return Manifest(model, dtype, shapes, {}, {"triton": "3"}, {"A/a.cubin": "", "A/a.json": "", "B/b.cubin": ""})

    monkeypatch.setattr(warmup, "compile_model", compile_model)
    monkeypatch.setattr(warmup, "tuned_for", lambda path, gpu: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return calls


def test_what_is_compiled_and_what_it_says(compiled: list[tuple[Any, ...]], tmp_path: Path) -> None:
    result = invoke(tmp_path / "a", "--dtype", "fp16", model="timm:vit_base_patch16_224")
    assert result.exit_code == 0, result.output
    assert compiled == [("timm:vit_base_patch16_224", "h100", [1, 8], "fp16", None)]
    assert "2 kernels of timm:vit_base_patch16_224, fp16, for h100: images 1x3x224x224, 8x3x224x224" in result.stdout
    assert "compiled only" in result.stdout and f"load_kernels('{tmp_path / 'a'}')" in result.stdout
    assert "2.0 MB" in result.stdout
    found = only_object(invoke(tmp_path / "b", "--json", batch="4"))
    assert found == {"into": str(tmp_path / "b"), "kernels": 2, "bytes": 2_000_000, "versions": {"triton": "3"}}
    assert compiled[-1] == ("vit_tiny_patch16_224", "h100", [4], "bf16", None)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "vit_huge_patch1_1"}, "vit_huge_patch1_1"),
        ({"model": "keras:vit"}, "timm, torchvision, transformers"),
        ({"gpu": "v100"}, "gpu must be one of"),
        ({"gpu": "sm_70:80"}, "with a number of SMs behind it"),
        ({"batch": "1 x"}, "Invalid value for 'BATCH'"),
        ({"batch": "0"}, "Invalid value for '--batch'"),
        ({"batch": "1 0"}, "Invalid value for 'BATCH'"),
        ({"dtype": "int8"}, "is not one of"),
    ],
)
def test_wrong_options_are_named(
    changed: dict[str, str], words: str, compiled: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    result = invoke(tmp_path / "a", **changed)
    assert result.exit_code == 2 and not compiled
    assert words in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("timm:nope", "Invalid value for --model: model 'timm:nope' cannot be compiled: Unknown model (nope)"),
        ("timm:resnet18", "model 'timm:resnet18' cannot be compiled:"),
        ("torchvision:nope", "model 'torchvision:nope' cannot be compiled:"),
    ],
)
def test_a_model_that_cannot_be_compiled_is_named(
    model: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip(model.partition(":")[0])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = invoke(tmp_path / "a", model=model)
    assert result.exit_code == 2 and not (tmp_path / "a").exists()
    assert words in " ".join(result.output.replace("│", " ").split())


def test_a_tuned_file_is_passed_on_and_one_that_cannot_count_is_refused(
    compiled: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "a100.json"
    assert invoke(tmp_path / "a", "--tuned", str(file)).exit_code == 0
    assert compiled[-1][-1] == file
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for versions, gpu, words in (
        (versions_here(), "h100", "measured on A100 (sm_80, 108 SMs); --gpu h100 is H100 SXM (sm_90, 132 SMs)"),
        (versions_here() | {"triton": "1.0"}, "a100", "measured with triton 1.0, here is"),
        (versions_here() | {"kernels": "abc"}, "a100", "measured with kernels abc, here is"),
    ):
        write_tuned(file, Tuned(Gpu("A100", 80, 108), versions, ""))
        result = invoke(tmp_path / "b", "--tuned", str(file), gpu=gpu)
        assert result.exit_code == 2 and not (tmp_path / "b").exists()
        assert words in " ".join(result.output.replace("│", " ").split())
    file.write_text("[" * 100_000)
    result = invoke(tmp_path / "b", "--tuned", str(file), gpu="a100")
    assert result.exit_code == 2 and "is no tuned file" in " ".join(result.output.replace("│", " ").split())
    result = invoke(tmp_path / "b", "--tuned", str(tmp_path / "none.json"))
    # A long path is broken wherever the box ends.
    printed = "".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and "none.json" in printed and "Invalidvaluefor--tuned" in printed


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_compiled(
    compiled: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for into, words in (
        (tmp_path, "must be an empty folder"),
        (tmp_path / "file", "must be an empty folder"),
        (tmp_path / "file" / "a" / "b", "is no folder"),
    ):
        result = invoke(into)
        printed = " ".join(result.output.replace("│", " ").split())
        assert result.exit_code == 2 and not compiled
        assert "Invalid value for --into" in printed and words in printed
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission_is_named(
    compiled: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command.os, "access", lambda path, mode: False)  # tests may run as root, who may everything
    result = invoke(tmp_path / "a")
    printed = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and not compiled and "--into" in printed and "no permission" in printed


def test_more_images_than_memory_holds_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*size: int, **_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(warmup.torch, "empty", full)
    warmed = warmup.Warmed((3, 224, 224), ())
    with pytest.raises(warmup.BatchError, match="no memory here for 9 images of 3x224x224"):
        warmup._images(warmed, 9, warmup.DTYPES["bf16"])

    def refused(*_: object) -> None:
        raise warmup.BatchError("no memory here for 9 images")

    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(warmup, "compile_model", refused)
    assert "Invalid value for --batch: no memory" in " ".join(invoke(tmp_path / "a").output.replace("│", " ").split())


def test_the_child_gets_the_same_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def child(arguments: list[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append((arguments[1:], env.get("TRITON_INTERPRET")))
        return subprocess.CompletedProcess(arguments, 3, stdout="the answer\n", stderr="a warning\n")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(subprocess, "run", child)
    result = invoke(tmp_path / "a", "--json")
    words = ["--model", "vit_tiny_patch16_224", "--gpu", "h100", "--into", str(tmp_path / "a"), "--dtype", "bf16"]
    words += ["--batch", "1", "--batch", "8"]
    assert seen == [(["-m", "vit_engine.cli", "warmup", *words, "--json"], None)]
    assert (result.exit_code, result.stdout, result.stderr) == (3, "the answer\n", "a warning\n")


@pytest.mark.interpreted_only
def test_stems_of_models_without_values_run_on_the_kernels() -> None:
    """CLIP's looks up positions by a buffer, and is plain where they are in order."""
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = warmup.blank(lambda: transformers.CLIPVisionModel(config), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model(torch.zeros(1, 3, 32, 32))
    (stem,) = [row for row in vit_engine.explain(model).rows if row.module.endswith("embeddings")]
    assert stem.kernels.startswith("patch_embed")
