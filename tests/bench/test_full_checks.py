"""The list of checks as a function of what a machine has."""

from __future__ import annotations

import dataclasses

import pytest

from vit_bench.full.checks import (
    BATCHES,
    COMPILED,
    EXECUTED,
    INTERPRETED,
    LIBRARIES,
    MODELS,
    NAMES,
    PYTORCH,
    UNKNOWN,
    Facts,
    all_checks,
    select,
)
from vit_bench.records import KERNELS

H100 = Facts("NVIDIA H100", "", triton=True, timm=True, sanitizer="/opt/cuda/bin/compute-sanitizer")
CPU = Facts(None, "no NVIDIA GPU", triton=True, timm=True, sanitizer=None)


def test_with_everything_there_everything_runs_and_kernels_are_executed() -> None:
    checks = {check.name: check for check in all_checks(H100)}
    assert [name for name, check in checks.items() if check.not_run] == []
    for kernel in KERNELS:
        for dtype in ("fp32", "fp16", "bf16"):
            assert checks[f"cases/{kernel}/{dtype}"].rung == checks[f"tiles/{kernel}/{dtype}"].rung == EXECUTED
    assert len(MODELS) == 5 and "vit_huge_patch14_224" in MODELS
    for model in MODELS:
        assert all(f"timm/{model}/{dtype}" in checks for dtype in ("fp32", "fp16", "bf16"))
        assert f"graph/{model}/bf16" in checks
        assert all(f"throughput/{model}/b{batch}" in checks for batch in BATCHES)
    assert INTERPRETED not in {check.rung for check in checks.values()}
    wrapper = checks["racecheck/linear/fp16"].wrapper
    assert wrapper == ("/opt/cuda/bin/compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9")
    assert not checks["cases/linear/fp16"].wrapper


def test_nothing_is_timed_before_its_logits_and_its_tiles_were_found_right() -> None:
    names = [check.name for check in all_checks(H100)]
    for check in all_checks(H100):
        _, model, *_ = check.name.split("/")
        if not check.name.startswith("throughput/"):
            assert check.requires == ()
            continue
        assert set(check.requires) == {f"timm/{model}/bf16", *(f"tiles/{kernel}/bf16" for kernel in KERNELS)}
        assert all(names.index(name) < names.index(check.name) for name in check.requires)


def test_without_a_gpu_the_rest_says_why_it_is_not_run() -> None:
    checks = {check.name: check for check in all_checks(CPU)}
    runs = {name: check.rung for name, check in checks.items() if not check.not_run}
    assert EXECUTED not in runs.values()
    assert {name for name, rung in runs.items() if rung == INTERPRETED} == {
        *(f"cases/{kernel}/{dtype}" for kernel in KERNELS for dtype in ("fp32", "fp16")),
        *(f"small/{which}/{dtype}" for which in ("vit", "timm") for dtype in ("fp32", "fp16")),
        *(f"dropin/{which}/{dtype}" for which in LIBRARIES for dtype in ("fp32", "fp16")),
    }
    assert {name for name, rung in runs.items() if rung == PYTORCH} == {f"torch/{m}/fp32" for m in MODELS[:2]}
    assert [name for name, rung in runs.items() if rung == COMPILED] == ["compiled/sm_90/bf16"]
    for name, check in checks.items():
        if name in runs:
            continue
        about_bfloat16 = name.startswith(("cases/", "small/", "dropin/"))
        assert check.not_run == "no NVIDIA GPU" or (about_bfloat16 and "bfloat16" in check.not_run), name


@pytest.mark.parametrize(
    ("missing", "kinds", "word"),
    [
        ({"timm": False}, {"timm", "throughput", "torch"}, "pip install timm"),
        ({"sanitizer": None}, {"memcheck", "racecheck"}, "CUDA_HOME"),
        (
            {"triton": False},
            {"cases", "tiles", "timm", "small", "dropin", "compiled", "memcheck", "racecheck", "graph", "throughput"},
            "triton is not installed",
        ),
    ],
    ids=["timm", "sanitizer", "triton"],
)
def test_what_is_not_installed_is_named(missing: dict[str, object], kinds: set[str], word: str) -> None:
    stopped = [check for check in all_checks(dataclasses.replace(H100, **missing)) if check.not_run]
    assert all(word in check.not_run for check in stopped)
    assert {check.name.split("/")[0] for check in stopped} - {"small"} == kinds - {"small"}
    assert ("small/timm/fp32" in {check.name for check in stopped}) == ("sanitizer" not in missing)


def test_names_are_the_same_everywhere_and_unlike() -> None:
    for facts in (H100, CPU, UNKNOWN):
        assert tuple(check.name for check in all_checks(facts)) == NAMES
    assert len(set(NAMES)) == len(NAMES)
    assert all(check.not_run for check in all_checks(UNKNOWN))


def test_selected_checks_bring_what_they_require() -> None:
    checks = all_checks(H100)
    assert select(checks, []) == checks
    assert [c.name for c in select(checks, ["graph/*tiny*", "cases/mlp/fp1?"])] == [
        "cases/mlp/fp16",
        "graph/vit_tiny_patch16_224/bf16",
    ]
    timed = [check.name for check in select(checks, ["throughput/vit_base_*/b8"])]
    tiles = [f"tiles/{kernel}/bf16" for kernel in KERNELS]
    assert timed == [*tiles, "timm/vit_base_patch16_224/bf16", "throughput/vit_base_patch16_224/b8"]
    with pytest.raises(ValueError, match=r"no check matches 'softmax/\*'; --list prints the names"):
        select(checks, ["cases/*", "softmax/*"])
