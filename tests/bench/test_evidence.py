"""Evidence runs: what passed is recorded as passed, what failed is kept with its reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bench.child import run
from tests.rung import DEVICE, DTYPES, RUNG
from vit_bench import records
from vit_bench.cases import CASES, cases_for, merged_stats, partial_stats, run_case
from vit_bench.evidence import joined, load_driver, main


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype) -> None:
    figures = run_case(case, dtype, DEVICE)
    assert figures and all(0 <= found.row <= found.row_allowed for found in figures.values())


def test_every_kernel_has_cases_with_names_of_their_own() -> None:
    for kernel in records.KERNELS:
        names = [case.name for case in cases_for(kernel)]
        assert len(names) >= 3 and len(set(names)) == len(names)


@pytest.mark.sanitize
def test_a_wrong_result_fails_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    import vit_kernels

    right = vit_kernels.layer_norm
    case = next(cases_for("layer_norm"))
    run_case(case, torch.float16, DEVICE)
    monkeypatch.setattr(vit_kernels, "layer_norm", lambda x, weight, bias: right(x, weight))
    with pytest.raises(AssertionError, match=r"layer_norm: .* is over the allowed"):
        run_case(case, torch.float16, DEVICE)


@pytest.mark.sanitize
def test_wrong_emitted_statistics_fail_their_case(monkeypatch: pytest.MonkeyPatch) -> None:
    import vit_kernels

    right = vit_kernels.linear
    case = next(case for case in cases_for("linear") if case.launch_options.get("emit_stats"))

    def wrong(*arguments, **options):
        y, stats = right(*arguments, **options)
        stats[1] *= 1.01
        return y, stats

    monkeypatch.setattr(vit_kernels, "linear", wrong)
    with pytest.raises(AssertionError, match=r"m2 .* is over the allowed"):
        run_case(case, torch.float16, DEVICE)


def test_partial_statistics_merge_to_those_of_whole_rows() -> None:
    x = torch.randn(5, 150, dtype=torch.float64) + 3
    mean, m2 = merged_stats(partial_stats(x), 150)[:, 0]
    torch.testing.assert_close(mean.double(), x.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(m2.double(), (x - x.mean(1, keepdim=True)).square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.interpreted_only
def test_command_writes_passing_records_for_the_source_at_hand(tmp_path: Path) -> None:
    """Its cases are shared by two processes, which find what one finds: of three cases, they have two and one."""
    out = tmp_path / "interpreted.json"
    options = ["interpreted", "--kernel", "layer_norm", "row_stats", "--out"]
    done = subprocess.run(
        [sys.executable, "-m", "vit_bench.evidence", *options, str(out), "--workers", "2"],
        # How PyTorch splits a sum depends on its threads: there are as many as here.
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = records.load(out)
    assert {(r.kernel, r.dtype) for r in found} == {
        (k, d) for k in ("layer_norm", "row_stats") for d in ("float32", "float16")
    }
    for record in found:
        assert record.passed and record.capability is None and record.source == records.source_hash(record.kernel)
        assert set(record.detail["passed"]) == {case.name for case in cases_for(record.kernel)}
        assert record.versions["triton"] != "not installed"
    text = out.read_text()
    assert str(Path.home()) not in text and str(tmp_path) not in text
    alone = tmp_path / "alone.json"
    assert main([*options, str(alone)]) == 0 and alone.read_text() == text


def test_one_failure_in_a_share_fails_the_kernel() -> None:
    def share(passed: str, failed: str = "") -> records.Record:
        detail = {"passed": dict.fromkeys(passed), "failed": dict.fromkeys(failed)}
        return records.Record("linear", "float16", 90, "hash", bool(passed) and not failed, {}, "today", detail)

    # With fewer cases than processes, some have none.
    whole = joined([share("ac"), share("b"), share("")])
    assert whole.passed and list(whole.detail["passed"]) == ["a", "b", "c"]
    whole = joined([share("a"), share("b", failed="c")])
    assert not whole.passed and list(whole.detail["failed"]) == ["c"]


@pytest.mark.interpreted_only
def test_bfloat16_is_not_claimed_from_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    with pytest.raises(SystemExit, match="interpreted: bfloat16 is not computed rightly"):
        main(["interpreted", "--out", str(out), "--dtype", "bfloat16"])
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "must be written MODULE:CONTEXTMANAGER; got 'nowhere'"),
        ("nope:nope", "driver 'nope:nope' cannot be imported: No module named 'nope'"),
        ("json:nope", "driver 'json:nope' cannot be imported: module 'json' has no attribute 'nope'"),
        ("json:__name__", "driver 'json:__name__' must take capability and races: 'str' object is not callable"),
        ("json:loads", "driver 'json:loads' must take capability and races: "),
        ("builtins:dict", "driver 'builtins:dict' must give a context manager; it gave a dict"),
    ],
)
def test_a_driver_that_is_not_there_is_named(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_driver(name)


def test_a_file_that_cannot_take_records_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged.json"
    for path, words in ((tmp_path, "is a folder"), (damaged, "damaged.json: cannot be read as evidence")):
        for text in ("{}", "[]", "no json", '{"records": [{}]}', '{"records": 1}'):
            damaged.write_text(text)
            with pytest.raises(SystemExit) as ended:
                main(["executed", "--out", str(path)])
            assert ended.value.code == 2 and words in capsys.readouterr().err
            assert damaged.read_text() == text


@pytest.mark.compiled
def test_a_rung_without_its_means_says_so(tmp_path: Path) -> None:
    calls = {
        "interpreted": "set TRITON_INTERPRET=1",
        "emulated": "name the driver",
        "emulated --driver nowhere": "must be written MODULE:CONTEXTMANAGER",
        "emulated --driver nope:nope": "emulated: driver 'nope:nope' cannot be imported",
    }
    if RUNG != "executed":
        calls["executed"] = "finds no CUDA GPU"
    said = run(
        f"""
        import contextlib, io, json
        from vit_bench.evidence import main

        def message(call):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                try:
                    main([*call.split(), "--out", {str(tmp_path / "x.json")!r}])
                except SystemExit as ended:
                    return f"{{said.getvalue()}}{{ended.code}}"

        print(json.dumps([message(call) for call in {list(calls)}]))
        """
    )
    for words, message in zip(calls.values(), said, strict=True):
        assert words in message


@pytest.mark.compiled
def test_a_driver_that_computes_nothing_gives_no_passing_record() -> None:
    """The recording driver compiles and never executes, so every case must fail under it."""
    record = run(
        """
        import json
        from dataclasses import asdict
        from unittest import mock
        import torch
        from vit_bench.cases import cases_for
        from vit_bench.evidence import examine
        from vit_bench.recording import gpu, recording
        import contextlib
        # What was never written is NaN, as it may be on a GPU.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        work = [(case, contextlib.nullcontext()) for case in cases_for("layer_norm")]
        record = examine("layer_norm", "float16", 80, lambda: recording(gpu("sm_80")), "cpu", work)
        print(json.dumps(asdict(record)))
        """
    )
    assert record["passed"] is False and record["detail"]["passed"] == {}
    assert set(record["detail"]["failed"]) == {case.name for case in cases_for("layer_norm")}


@pytest.mark.compiled
def test_shipped_tiles_are_found_and_can_be_forced_on_a_small_problem() -> None:
    seen = run(
        """
        import json, torch, vit_kernels
        from vit_bench.tile_cases import tile_case
        from vit_bench.recording import gpu, recording
        from vit_bench.tile_choices import forced, shipped_choices
        choices = shipped_choices("linear", torch.float16, gpu("sm_90"), ["vit_base_patch16_224"])
        # Of those whose kernel is given its blocks by name.
        named = [choice for choice in choices if not choice.tile.columns]
        tall = max(named, key=lambda choice: choice.tile.block_m * choice.tile.block_n)
        x, weight = torch.zeros(3, 192, dtype=torch.float16), torch.zeros(64, 192, dtype=torch.float16)
        with recording(gpu("sm_90")) as recorder:
            vit_kernels.linear(x, weight)
            with forced("linear", tall.tile):
                vit_kernels.linear(x, weight)
        print(json.dumps([
            len(choices), [tall.tile.block_m, tall.tile.block_n],
            [[launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]] for launch in recorder.launches],
        ]))
        """
    )
    count, tall, (natural, forced_tile) = seen
    assert count >= 2 and forced_tile == tall and natural != tall


@pytest.mark.compiled
def test_tiles_whose_rows_are_columns_are_run_with_and_without_what_is_added() -> None:
    seen = run(
        """
        import json, torch
        from vit_bench.evidence import workload
        print(json.dumps([case.name for case, _ in workload("linear", torch.bfloat16, 90)]))
        """
    )
    tiles = [name for name in seen if name.startswith("tile 72 128 64 8 8 ")]
    assert len(tiles) == 2 and tiles[1] == f"{tiles[0]}, nothing added"


def test_committed_evidence_names_no_driver_and_no_path() -> None:
    folder = Path(__file__).resolve().parents[2] / "bench" / "evidence"
    for rung in (path.stem for path in folder.glob("*.json") if path.stem in records.RUNGS):
        path = folder / f"{rung}.json"
        content = json.loads(path.read_text())
        assert content["rung"] == rung
        assert "driver" not in path.read_text() and "/" not in "".join(r["kernel"] for r in content["records"])
