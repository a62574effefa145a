"""What one check's process does: parts one by one, notes that survive it, and the work behind every name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench.child import run as run_compiling
from tests.rung import DEVICE, RUNG
from vit_bench import compiled_variants
from vit_bench.full import child, parts
from vit_bench.full.checks import NAMES
from vit_bench.full.parts import CannotRunError, Part, parts_of
from vit_bench.records import KERNELS


def raising(error: BaseException) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        raise error

    return run


def noted(work: list[Part], start: int = 0) -> tuple[int, list[dict[str, Any]]]:
    notes: list[dict[str, Any]] = []
    return child.run(work, start, notes.append), notes


def test_every_part_runs_and_says_how_it_ended(capfd: pytest.CaptureFixture[str]) -> None:
    work = [
        Part("good", lambda: {"row": 0.5}),
        Part("wrong", raising(AssertionError("error 2 is over 1"))),
        Part("broken", raising(RuntimeError("no kernel image"))),
        Part("mute", raising(AssertionError())),
        Part("large", raising(CannotRunError("needs 90 GiB"))),
    ]
    status, notes = noted(work)
    ends = [note for note in notes if note["event"] == "end"]
    assert status == 1 and noted(work[:1])[0] == noted(work[4:])[0] == 0
    assert notes[0] == {"event": "plan", "parts": [part.name for part in work]}
    assert notes[-1] == {"event": "done"} and [note["event"] for note in notes[1:-1]] == ["start", "end"] * 5
    assert [(end["status"], end["reason"]) for end in ends] == [
        ("passed", ""),
        ("failed", "error 2 is over 1"),
        ("failed", "RuntimeError: no kernel image"),
        ("failed", "AssertionError: "),
        ("not run", "needs 90 GiB"),
    ]
    assert ends[0]["figures"] == {"row": 0.5} and ends[0]["seconds"] >= 0
    assert "no kernel image" in capfd.readouterr().err
    assert [note["part"] for note in noted(work, 3)[1] if "part" in note] == [3, 3, 4, 4]


def test_a_lost_gpu_ends_the_process_after_the_part_that_lost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "gpu_lost", lambda: True)
    work = [Part("a", dict), Part("b", raising(RuntimeError("illegal memory access"))), Part("c", dict)]
    status, notes = noted(work)
    assert status == child.GPU_LOST != 0
    assert notes[-1]["status"] == "crashed" and notes[-1]["part"] == 1
    assert "cannot be used any more: RuntimeError: illegal memory access" in notes[-1]["reason"]


def test_a_gpu_is_lost_when_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert child.gpu_lost() is False
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", raising(RuntimeError("an illegal memory access was encountered")))
    assert child.gpu_lost() is True


def test_a_name_that_no_check_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cases/softmax/fp16", "cases", "gpu"):
        with pytest.raises(ValueError, match="no check is called"):
            parts_of(name)
        with pytest.raises(SystemExit) as ended:
            child.main([name])
        assert ended.value.code == 2 and name in capsys.readouterr().err


def test_every_name_has_work_behind_it() -> None:
    """Of the kinds whose parts can be listed without a GPU: all but the tiles, which depend on it."""
    counts = Counter({name: len(parts_of(name)) for name in NAMES if not name.startswith("tiles/")})
    assert min(counts.values()) >= 1
    assert counts["cases/linear/fp16"] == counts["memcheck/linear/fp16"] >= 8
    assert counts["timm/vit_huge_patch14_224/bf16"] == 1 and counts["compiled/sm_90/bf16"] == len(KERNELS)
    assert counts["dropin/timm/bf16"] > counts["dropin/transformers/bf16"] > counts["dropin/torchvision/bf16"] == 1


@pytest.mark.interpreted_only
def test_the_real_process_writes_its_notes(tmp_path: Path) -> None:
    events = tmp_path / "events"
    command = [sys.executable, "-m", "vit_bench.full.child", "cases/row_stats/fp32", "--start", "1"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, "--events", str(events)], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    notes = [json.loads(line) for line in events.read_text().splitlines()]
    assert notes[0]["parts"] == ["width 192", "width 1000", "width 5000"] and notes[-1] == {"event": "done"}
    ends = [note for note in notes if note["event"] == "end"]
    assert [end["part"] for end in ends] == [1, 2] and {end["status"] for end in ends} == {"passed"}
    assert all(0 <= end["figures"]["row"] <= end["figures"]["row_allowed"] for end in ends)


@pytest.mark.compiled
def test_tiles_are_those_of_the_gpu_at_hand_and_are_forced_one_by_one() -> None:
    """Listed for an H100 that is not there; the case of a part then runs with exactly its tile."""
    found = run_compiling(
        """
        import json, torch, vit_kernels
        from vit_bench.full import parts
        from vit_bench.recording import gpu
        from vit_bench.tile_choices import shipped_choices
        from vit_kernels import gemm_tiles
        seen = []
        def run_case(case, dtype, device):
            seen.append([case.name, str(dtype), device, vars(gemm_tiles.choose_gemm(1, 1, 1, 2, gpu("sm_90")))])
            return {}
        torch.empty = (lambda real: lambda *a, **k: real(*a, **{**k, "device": "meta"}))(torch.empty)
        vit_kernels.device_of = lambda tensor: gpu("sm_90")
        parts.run_case, parts.worst = run_case, lambda errors: {}
        listed = parts.parts_of("tiles/linear/bf16")
        for part in listed:
            part.run()
        print(json.dumps([[part.name for part in listed], seen]))
        """
    )
    names, seen = found
    assert len(names) >= 3 and [entry[0] for entry in seen] == names
    assert {(dtype, device) for _, dtype, device, _ in seen} == {("torch.bfloat16", "cuda")}
    assert len({json.dumps(tile) for *_, tile in seen}) >= 3
    for name, _, _, tile in seen:
        assert name.startswith("tile " + " ".join(str(value) for value in tile.values()))


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled_parts_compile() -> None:
    figures = run_compiling(
        """
        import json
        from vit_bench.full.parts import parts_of
        part = next(part for part in parts_of("compiled/sm_90/bf16") if part.name == "row_stats")
        print(json.dumps(part.run()))
        """
    )
    assert figures["variants"] >= 1 and figures["most_registers"] > 8 and figures["stack_bytes"] == 0


def test_kernels_that_do_not_compile_or_spill_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = types.SimpleNamespace(function="f", kernel="k", used_by="m batch 1", error="registers are spilled")
    monkeypatch.setattr(compiled_variants, "compile_for", lambda *arguments, **options: [bad])
    part = parts_of("compiled/sm_90/bf16")[0]
    with pytest.raises(AssertionError, match=r"f \(m batch 1\): registers are spilled"):
        part.run()
    monkeypatch.setattr(compiled_variants, "compile_for", lambda *arguments, **options: [])
    part = parts_of("compiled/sm_90/bf16")[0]
    with pytest.raises(AssertionError, match="nothing was compiled"):
        part.run()


def test_kernels_run_where_this_process_runs_them() -> None:
    assert (parts._device(), parts._backend()) == ((DEVICE, "triton"), ("cpu", "interpret"))[RUNG == "interpreted"]
