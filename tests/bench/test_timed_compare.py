"""Runs that go on and runs side by side: what is kept, what counts as slower, and what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vit_bench.results import OURS, Results, Row, Run, Spread
from vit_bench.timed.compare import LEAST, change, compare, rows_of
from vit_bench.timed.machine import cpu_label, datasheet, environment, gpu_label, known_gpu, version
from vit_bench.timed.runner import Job, begin, perform
from vit_bench.timed.shapes import Case, select
from vit_kernels.device import A100, H100, H200, RTX_4090

ROW = Row(0, "model", "model/some/b8", "forward", OURS, "H100 SXM", "bf16", "gpu", seconds=Spread(10, 9, 11, 25))
COMPILED = replace(ROW, source="compiled", seconds=None, modelled_s=2.0, bound_s=1.0)


def timed(median: float, p20: float, p80: float, **others: Any) -> Row:
    return replace(ROW, seconds=Spread(median, p20, p80, 25), **others)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (timed(20, 18, 22), "slower"),
        (timed(5, 4, 6), "faster"),
        (timed(13, 10.9, 15), "same"),  # the ranges overlap
        (timed(10 * (1 + LEAST / 2), 11.01, 12), "same"),  # they do not, but it is hardly a change
        (timed(10 * (1 + 2 * LEAST), 11.01, 12), "slower"),
    ],
    ids=["slower", "faster", "overlap", "little", "enough"],
)
def test_a_measured_time_changes_outside_the_noise(after: Row, verdict: str) -> None:
    found = change(ROW, after)
    assert found is not None and (found.verdict, found.kind) == (verdict, "measured")
    assert after.seconds and found.ratio == after.seconds.median / 10
    assert (found.lowest, found.highest) == (after.seconds.p20 / 11, after.seconds.p80 / 9)


def test_a_modelled_time_changes_when_it_does() -> None:
    for modelled, verdict in ((2.0, "same"), (2.001, "slower"), (1.9, "faster")):
        found = change(COMPILED, replace(COMPILED, modelled_s=modelled))
        assert found is not None and (found.verdict, found.kind, found.ratio) == (verdict, "modelled", modelled / 2)
    bound = change(replace(COMPILED, modelled_s=None), replace(COMPILED, modelled_s=None, bound_s=3.0))
    assert bound is not None and bound.verdict == "slower"
    spilling = replace(COMPILED, modelled_s=1.0, code={"kernels": [{"spilled_bytes": 0}, {"spilled_bytes": 16}]})
    found = change(COMPILED, spilling)
    assert found is not None and (found.verdict, found.why) == ("slower", "spills 16 bytes per thread, 0 before")
    assert change(ROW, COMPILED) is None, "a modelled time is no measurement"


def test_only_ours_can_regress() -> None:
    timm = replace(ROW, contender="timm")
    graphed = replace(ROW, contender=f"{OURS}, CUDA graph")
    before = [ROW, timm, graphed, replace(ROW, case="gone"), replace(ROW, case="alone")]
    slow = timed(20, 18, 22)
    missing = replace(ROW, source="not run", seconds=None, reason="wrong result")
    after = [slow, replace(slow, contender="timm"), replace(slow, contender=graphed.contender)]
    after += [replace(missing, case="gone"), replace(ROW, case="new")]
    found = compare(before, after)
    assert [one.before.contender for one in found.changes] == [OURS, "timm", graphed.contender]
    assert [one.before.contender for one in found.regressions] == [OURS, graphed.contender]
    assert [row.case for row in found.only_before] == ["alone"] and [row.case for row in found.only_after] == ["new"]
    assert [(one.case, other.reason) for one, other in found.gone] == [("gone", "wrong result")]
    assert found.failed
    assert not compare([timm], [replace(slow, contender="timm")]).failed
    assert not compare([timm, ROW], [replace(missing, contender="timm"), ROW]).failed, "a baseline may go"
    assert compare([ROW], [missing]).failed, "ours may not"
    with pytest.raises(ValueError, match="no case, contender, device and dtype"):
        compare([ROW], [replace(ROW, device="A100")])


SLOW = timed(20, 18, 22)
BOUND = replace(COMPILED, modelled_s=None)
NOT_RUN = replace(ROW, source="not run", seconds=None, reason="wrong result")


@pytest.mark.parametrize(
    ("before", "after", "ratios", "failed"),
    [
        ([ROW], [SLOW, COMPILED], [2.0], True),
        ([ROW], [COMPILED, SLOW], [2.0], True),
        ([ROW, COMPILED], [ROW, replace(COMPILED, modelled_s=3.0)], [1.0, 1.5], True),
        ([ROW, COMPILED], [COMPILED], [1.0], False),
        ([BOUND], [replace(COMPILED, modelled_s=9.0)], [1.0], False),
        ([ROW], [SLOW, NOT_RUN, timed(5, 4, 6)], [0.5], False),
    ],
    ids=["compiled later", "compiled before", "both kinds", "one kind left", "a model is new", "run again"],
)
def test_measured_and_compiled_rows_of_a_case_are_compared_apart(before, after, ratios, failed) -> None:
    found = compare(before, after)
    assert [one.ratio for one in found.changes] == ratios and found.failed is failed
    assert not found.gone and not found.apart


@pytest.mark.parametrize(
    ("before", "after", "gone", "apart"),
    [
        ([ROW], [COMPILED], 0, 1),
        ([COMPILED], [ROW], 0, 1),
        ([COMPILED], [BOUND], 1, 0),
        ([BOUND], [replace(BOUND, bound_s=None)], 1, 0),
        ([COMPILED], [NOT_RUN], 1, 0),
        ([ROW], [COMPILED, NOT_RUN], 1, 0),
        ([NOT_RUN, ROW], [NOT_RUN], 1, 0),
    ],
    ids=["only compiled", "only measured", "no model", "no bound", "compiled no more", "none any more", "run once"],
)
def test_what_nobody_can_compare_fails_where_it_is_ours(before, after, gone, apart) -> None:
    found = compare(before, after)
    assert (len(found.changes), len(found.gone), len(found.apart), found.failed) == (0, gone, apart, True)
    assert not found.only_before and not found.only_after, "each is said once"
    timm = ([replace(row, contender="timm") for row in rows] for rows in (before, after))
    assert not compare(*timm).failed


def test_rows_of_one_run_alone_are_told_by_kind() -> None:
    found = compare([ROW, COMPILED], [COMPILED, replace(ROW, case="new")])
    assert found.only_before == [ROW] and [row.case for row in found.only_after] == ["new"]


def test_runs_are_named_by_number() -> None:
    results = Results([RUN, RUN, RUN], [ROW, replace(ROW, run=1, case="second")])
    assert rows_of(results) == results.rows
    (latest,) = compare([ROW, timed(40, 36, 44, run=1)], [ROW]).changes
    assert latest.ratio == 0.25 and latest.before.run == 1
    assert rows_of(results, 0) == [ROW] and rows_of(results, -3) == [ROW] and rows_of(results, 2) == []
    with pytest.raises(ValueError, match="it has 3 runs, so run must be from -3 to 2; got 3"):
        rows_of(results, 3)
    with pytest.raises(ValueError, match="it has no rows"):
        rows_of(Results([RUN], []))


RUN = Run("now", "vit-engine bench", {"device": "H100 SXM", "versions": {"torch": "2"}, "kernel_sources": {}})


def test_a_run_goes_on_only_where_it_began() -> None:
    elsewhere = replace(RUN, environment=RUN.environment | {"device": "A100"})
    results = Results([RUN, elsewhere], [])
    assert begin(results, replace(RUN, started="later"), resume=True) == 0 and len(results.runs) == 2
    newer = replace(RUN, environment=RUN.environment | {"versions": {"torch": "3"}})
    assert begin(results, newer, resume=True) == 2 and results.runs[2] == newer
    assert begin(results, RUN, resume=False) == 3


def test_a_run_that_measures_does_not_go_on_with_one_that_compiles() -> None:
    compiling, measuring = (
        replace(RUN, environment=RUN.environment | {"times": how}) for how in ("compiled", "measured")
    )
    results = Results([compiling], [])
    assert begin(results, measuring, resume=True) == 1 and begin(results, compiling, resume=True) == 0


class Measures:
    label = "H100 SXM"

    def __init__(self, until: int = 99) -> None:
        self.asked: list[tuple[str, str]] = []
        self._until = until

    def rows(self, case: Case, dtype: str, run: int) -> list[Row]:
        if len(self.asked) == self._until:
            raise KeyboardInterrupt
        self.asked.append((case.name, dtype))
        return [replace(ROW, run=run, case=case.name, dtype=dtype, contender=name) for name in (OURS, "timm")]


class Watch:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def started(self, case: Case, dtype: str, number: int, count: int) -> None:
        self.seen.append((number, count))

    def done(self, rows: Any) -> None:
        self.seen.append(len(rows))


def test_an_interrupted_run_keeps_what_it_has_and_goes_on_behind_it() -> None:
    cases, saved = select(("model",), ["vit_tiny_patch16_224"], [1, 8]), []
    names = [case.name for case in cases]
    results, first = Results([RUN, RUN]), Measures(until=3)
    job = Job(cases, ["fp16", "bf16"], first)
    with pytest.raises(KeyboardInterrupt):
        perform(job, results, 0, lambda: saved.append(len(results.rows)), Watch())
    assert first.asked == [(names[0], "fp16"), (names[1], "fp16"), (names[0], "bf16")], "one dtype after the other"
    assert saved == [2, 4, 6], "after every case"
    second, watch = Measures(), Watch()
    perform(Job(cases, ["fp16", "bf16"], second), results, 0, lambda: None, watch)
    assert second.asked == [(names[1], "bf16")] and watch.seen == [(4, 4), 2]
    third = Measures()
    perform(Job(cases, ["fp16"], third), results, 1, lambda: None, Watch())
    assert len(third.asked) == 2, "another run begins anew"


@pytest.mark.parametrize(
    ("times", "row", "asked"),
    [
        ("measured", COMPILED, 1),
        ("measured", ROW, 0),
        ("compiled", ROW, 1),
        ("compiled", COMPILED, 0),
        ("measured", NOT_RUN, 0),
        (None, COMPILED, 0),
    ],
    ids=["compiled", "measured", "measured where compiled", "compiled there", "not run", "a run of before"],
)
def test_a_step_is_done_by_rows_of_the_runs_own_kind(times: str | None, row: Row, asked: int) -> None:
    (case,) = select(("model",), ["vit_tiny_patch16_224"], [1])
    run, measures = replace(RUN, environment=RUN.environment | ({"times": times} if times else {})), Measures()
    results = Results([run], [replace(row, case=case.name)])
    perform(Job([case], ["bf16"], measures), results, 0, lambda: None, Watch())
    assert len(measures.asked) == asked


def test_machines_are_called_by_what_is_known_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, known in (
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA A100-SXM4-80GB", A100),
        ("NVIDIA H200", H200),
        ("NVIDIA GeForce RTX 4090", RTX_4090),
    ):
        assert known_gpu(name) == known and gpu_label(name) == known.name
    for name in (
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "Tesla T4",
    ):
        assert known_gpu(name) is None and gpu_label(name) == name, "its datasheet would be another one's"
    assert datasheet(H100) == {"bandwidth": 3.35e12, "half": 989.4e12, "single": 66.9e12} and datasheet(None) is None
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert cpu_label().startswith("cpu (") and cpu_label().endswith(", 1 thread)")
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert cpu_label().endswith(", 2 threads)")
    assert version("no-such-package") is None


def test_the_environment_tells_what_results_depend_on() -> None:
    found = environment("cpu (some)")
    assert found["device"] == "cpu (some)" and found["versions"]["torch"] == version("torch")
    assert found["versions"]["xformers"] == version("xformers")
    assert set(found["kernel_sources"]) >= {"linear", "attention"} and "gpu" not in found
