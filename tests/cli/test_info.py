"""``vit-engine info``: versions, GPUs, and what would run where, and why."""

from __future__ import annotations

import json
import types

import pytest
import torch
from typer.testing import CliRunner

import vit_engine
from vit_bench.records import KERNELS
from vit_engine.cli import info, report
from vit_engine.cli.app import app

OPERATIONS = ["patch_embed", "attention", "linear", "row_stats", "layer_norm", "mlp", "qk_rope"]


def shown(*arguments):
    result = CliRunner().invoke(app, ["info", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have these GPUs: (name, major, minor, reason the kernels refuse it or None) each."""

    def pretend(*gpus):
        properties = [
            types.SimpleNamespace(
                name=name, major=major, minor=minor, multi_processor_count=132, total_memory=80 * 2**30
            )
            for name, major, minor, _ in gpus
        ]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
        monkeypatch.setattr(info, "_refusal", lambda index: gpus[index][3])

    return pretend


def test_without_a_gpu(machine):
    machine()
    text = shown("--json")
    assert text.count("\n") == 1
    found = json.loads(text)
    assert set(found) == {"versions", "cuda", "gpus", "interpreter", "operations"}
    assert found["gpus"] == []
    assert [op["operation"] for op in found["operations"]] == OPERATIONS
    assert {op["backend"] for op in found["operations"]} == {"torch"}
    assert all(op["runs"].startswith("F.") for op in found["operations"])
    assert "Without a GPU" in found["operations"][0]["why"]
    assert found["versions"]["vit_engine"] == vit_engine.__version__
    assert found["versions"]["torch"] is not None
    text = shown()
    assert "none that PyTorch can use" in text
    assert all(f"\n{operation:<12} torch" in text for operation in OPERATIONS)


def test_no_kernel_is_missing():
    assert list(info._IN_PYTORCH) == list(KERNELS)


def test_with_a_gpu_that_runs_the_kernels(machine):
    machine(("H100", 9, 0, None), ("T4", 7, 5, "needs 8.0"))
    found = json.loads(shown("--json"))
    assert [(gpu["name"], gpu["capability"], gpu["memory_gib"]) for gpu in found["gpus"]] == [
        ("H100", "9.0", 80.0),
        ("T4", "7.5", 80.0),
    ]
    assert [(op["backend"], op["runs"]) for op in found["operations"]] == [
        ("triton", f"vit_kernels.{operation}") for operation in OPERATIONS
    ]
    assert "capability 9.0" in found["operations"][0]["why"]
    text = shown()
    assert "gpu 0        H100, capability 9.0, 132 multiprocessors, 80.0 GiB; kernels run here" in text
    assert "gpu 1        T4, capability 7.5, 132 multiprocessors, 80.0 GiB; no kernels: needs 8.0" in text


def test_with_a_gpu_that_is_too_old(machine):
    machine(("T4", 7, 5, "needs compute capability 8.0"))
    found = json.loads(shown("--json"))
    assert {(op["backend"], op["runs"]) for op in found["operations"]} == {("none", "raises")}
    why = found["operations"][0]["why"]
    assert "needs compute capability 8.0" in why
    assert "--backend torch" in why


def test_the_refusal_is_in_the_words_of_the_kernels(monkeypatch):
    import vit_kernels

    def refuse(tensor):
        raise vit_kernels.UnsupportedDeviceError("vit_kernels needs\n compute capability 8.0")

    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(vit_kernels, "device_of", refuse)
    assert info._refusal(0) == "vit_kernels needs compute capability 8.0"
    monkeypatch.setattr(vit_kernels, "device_of", lambda tensor: object())
    assert info._refusal(0) is None


def test_without_triton(machine, monkeypatch):
    machine()
    real = report.version

    def version(name):
        if name == "triton":
            raise report.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(report, "version", version)
    found = json.loads(shown("--json"))
    assert found["versions"]["triton"] is None
    assert found["interpreter"] == {"usable": False, "why": "not usable: triton is not installed"}
    text = shown()
    assert "triton       not installed" in text
    assert text.endswith("PyTorch's own operators.\n")


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 580.82.07; echo 580.82.07", "580.82.07"), ("echo NVIDIA-SMI has failed; exit 9", None), ("true", None)],
)
def test_the_driver_is_asked_of_nvidia_smi(monkeypatch, tmp_path, script, expected):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert info._driver() == expected


def test_no_driver(monkeypatch):
    monkeypatch.setattr(info.shutil, "which", lambda name: None)
    assert info._driver() is None
