"""accelerate(tuned=FILE): the model's problems are looked up, and what the file leaves to PyTorch is right, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vit_engine
from tests.engine.stand_in import repeated
from vit_bench.tuning_problems import Problem, accelerated_calls, problems_of
from vit_engine.dropin.api import attached_to
from vit_kernels import TunedFileError, forget_tuned
from vit_kernels import launch as launch_module
from vit_kernels.device import INTERPRETED, device_of
from vit_kernels.tuned import Entry, Gpu, Tuned, Winner, versions_here, write_tuned

from ..kernels.test_launching import Launch, launches
from .support import close, images, timm_model
from .test_replays import refused

pytestmark = pytest.mark.interpreted_only
__all__ = ["launches", "repeated"]

HERE = Gpu(INTERPRETED.name, INTERPRETED.capability, INTERPRETED.sm_count)
ATTENTION = {"block_m": 16, "block_n": 16, "num_warps": 2, "num_stages": 2}


@pytest.fixture(autouse=True)
def nothing_tuned() -> Iterator[None]:
    yield
    forget_tuned()


def model() -> Any:
    return timm_model(depth=1)


def problems(batch: int) -> list[Problem]:
    ours = vit_engine.accelerate(model())
    return problems_of(list(accelerated_calls(ours, (3, 32, 32), [batch], torch.float32, INTERPRETED)), INTERPRETED)


def file(tmp_path: Path, winners: dict[str, Winner], gpu: Gpu = HERE) -> Path:
    found = [problem for problem in problems(1) if problem.kernel in winners]
    entries = tuple(Entry(problem.fields, winners[problem.kernel]) for problem in found)
    assert {problem.kernel for problem in found} == set(winners)
    write_tuned(tmp_path / "tuned.json", Tuned(gpu, versions_here(), "2026-01-01", entries))
    return tmp_path / "tuned.json"


def test_the_problems_of_a_model_are_its_launcher_calls() -> None:
    found = problems(2)
    assert {problem.kernel for problem in found} == {"patch_embed", "linear", "attention", "mlp", "layer_norm"}
    (attention,) = (problem for problem in found if problem.kernel == "attention")
    assert attention.fields["heads"] == 4 and attention.fields["q_stride"] == 3 * 32
    # qkv, projection, and the two products that an MLP may be made of
    assert sorted(p.fields["n"] for p in found if p.kernel == "linear") == [32, 32, 96, 128]
    assert found[-1].kernel == "mlp", "two products are tuned before they are compared with one kernel"


@torch.no_grad()
def test_a_model_runs_what_its_file_says(tmp_path: Path, launches: list[Launch]) -> None:
    winners: dict[str, Winner] = {
        "linear": "torch",
        "mlp": "two_products",
        "layer_norm": "torch",
        "attention": ATTENTION,
    }
    theirs = model()
    ours = vit_engine.accelerate(model(), tuned=file(tmp_path, winners))
    launches.clear()
    with launch_module.taped() as tape:
        result = ours(images(1))
    close(result, theirs(images(1)))
    assert sorted(tape.by_torch) == ["layer_norm"] + ["linear"] * 4
    warps = {launch.kernel: launch.constants["num_warps"] for launch in launches}
    assert warps.keys() == {"patch_embed_kernel", "attention_kernel", "row_stats_kernel"}
    assert warps["attention_kernel"] == ATTENTION["num_warps"]
    # Another batch has no entries: nothing is left to PyTorch.
    with launch_module.taped() as tape:
        close(ours(images(2)), theirs(images(2)))
    assert tape.by_torch == []


def test_a_pass_that_leaves_work_to_pytorch_is_not_repeated(tmp_path: Path, repeated: list[str]) -> None:
    ours, theirs = vit_engine.accelerate(model(), tuned=file(tmp_path, {"linear": "torch"})), model()
    for seed in range(4):
        close(ours(images(1, seed=seed)), theirs(images(1, seed=seed)))
    assert set(repeated) == {"layer_norm_kernel"}, "the final norm, which is no part of the pass that is refused"
    (why,) = set(refused(ours).values())
    assert "PyTorch's operators: linear" in why


def test_a_pass_of_tiles_from_the_file_is_repeated(tmp_path: Path, repeated: list[str]) -> None:
    ours, theirs = vit_engine.accelerate(model(), tuned=file(tmp_path, {"attention": ATTENTION})), model()
    for seed in range(4):
        close(ours(images(1, seed=seed)), theirs(images(1, seed=seed)))
    assert repeated and not refused(ours)


def test_a_file_that_does_not_belong_here_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    ours = model()
    with pytest.raises(TunedFileError, match="measured on H100"):
        vit_engine.accelerate(ours, tuned=file(tmp_path, {"linear": "torch"}, replace(HERE, name="H100")))
    assert not list(attached_to(ours)) and device_of(torch.zeros(1)).tuned is None
