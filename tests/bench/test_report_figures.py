"""What a report shows of results: which rows, which values, and in which words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.bench.report_results import BASE, GPU, TINY, attention, compiled, kernel, results, row, run, spread
from vit_bench.report import facts, kernels, models
from vit_bench.report.data import Book, all_measured, evidence, kernels_of, merged
from vit_bench.report.figures import Bars, Curves, Strips
from vit_bench.report.sections import figures
from vit_bench.results import OURS, Ceilings, Results, Row


def book(*rows: Row, **changes: Any) -> Book:
    return Book(Results([run(**changes)], list(rows)))


def figure(section: Any, of: Any, number: int = 0) -> Any:
    found = section.items[number].figure
    assert isinstance(found, of)
    return found


# --- which rows -----------------------------------------------------------------------------------------------------


def test_files_become_one_with_earlier_runs_first():
    late = Results([run("2026-03-01"), run("2026-01-01")], [row(batch=1), replace(row(batch=2), run=1)])
    whole = merged([late, Results([run("2026-02-01")], [row(batch=3)])])
    assert [one.started for one in whole.runs] == ["2026-01-01", "2026-02-01", "2026-03-01"]
    assert [(one.run, one.images) for one in whole.rows] == [(0, 2), (1, 3), (2, 1)]


def test_the_latest_row_of_a_thing_counts_but_a_failure_forgets_nothing():
    old, new = row(seconds=spread(1.0)), row(seconds=spread(2.0))
    gone = row(source="not run", reason="no GPU today")
    assert book(old, new, gone).rows == [new]
    assert book(gone, old).rows == [old] and book(gone).rows == [gone]


def test_what_was_compiled_later_does_not_replace_what_was_measured():
    old, new = compiled(modelled_s=1.0), compiled(modelled_s=2.0)
    for measured in (row(), row(device="cpu", source="cpu")):
        others = [replace(one, device=measured.device) for one in (old, new)]
        assert book(measured, *others).rows == [measured] and book(*others, measured).rows == [measured]
    assert book(old, new).rows == [new]


def test_launches_that_were_compiled_are_shown_beside_a_whole_pass_that_was_measured():
    given = book(compiled(), row(), row(batch=8), row(suite="kernels", case="kernels/x"))
    assert given.passes == [compiled()] and models.breakdown(given) and models.timeline(given)
    assert kernels.roofline(given) is not None


def test_colours_are_ours_first():
    found = book(row("b"), row(), row("a"), row("b", batch=1)).colours
    assert found == {OURS: 0, "b": 1, "a": 2}
    many = book(*(row(str(number)) for number in range(9)))
    assert set(many.colours.values()) <= set(range(7)) and list(many.colours.values()).count(0) == 1


def test_gpus_come_first_and_measured_before_modelled():
    cpu = row(device="cpu", source="cpu", model=BASE)
    found = book(cpu, compiled(device="A100"), row(model=TINY), row()).groups("model", "device", "model")
    assert [key for key, _ in found] == [(GPU, BASE), (GPU, TINY), ("A100", BASE), ("cpu", BASE)]


def test_words_for_evidence():
    assert evidence([row()]) == f"measured on {GPU}"
    assert evidence([compiled()]) == f"modelled for {GPU}, nothing was timed"
    assert evidence([compiled(modelled_s=None)]) == f"bound of {GPU} by datasheet, nothing was timed"
    assert evidence([row(), compiled(device="A100")]) == "measured on H100 SXM; the rest modelled for A100"
    bound = compiled(device="A100", modelled_s=None)
    assert evidence([compiled(), bound]).endswith(
        "SXM, nothing was timed; bound of A100 by datasheet, nothing was timed"
    )
    assert all_measured(evidence([row(), row(device="A100")])) and not all_measured(evidence([row(), bound]))
    assert not all_measured(evidence([compiled()]))


def test_a_kernels_time_is_measured_or_modelled_and_at_least_its_bound():
    given = [
        kernel("a", 1, 4e-6, seconds=9e-6), kernel("b", 1, 4e-6), kernel("c", 1, 4e-6, bound_s=5e-6),
        kernel("d", 1, 4e-6, modelled_s=None), kernel("e", 1, 0, modelled_s=None, bound_s=None),
    ]  # fmt: skip
    found = kernels_of(compiled(code={"kernels": given}))
    assert [(one["launch"], one["s"]) for one in found] == [("a", 9e-6), ("b", 4e-6), ("c", 5e-6), ("d", 2e-6)]


# --- throughput and memory ------------------------------------------------------------------------------------------


def test_throughput_is_images_over_the_median_ours_first_then_the_fastest():
    given = book(row("slow", seconds=spread(9e-3)), row("fast", seconds=spread(7e-3)), row(bound_s=2e-3), row(batch=1))
    bars = figure(models.throughput(given), Bars)
    assert [title for title, _ in bars.groups] == ["batch 1", "batch 64"]
    ours, *others = bars.groups[1][1]
    assert (ours.name, ours.value, ours.label) == (OURS, pytest.approx(12_800), "12,800 images/s, 5 ms")
    assert (ours.low, ours.high) == (pytest.approx(64 / 5.1e-3), pytest.approx(64 / 4.9e-3))
    assert ours.limit == pytest.approx(32_000) and not ours.modelled
    assert [bar.name for bar in others] == ["fast", "slow"] and others[0].limit is None
    assert bars.says == "Ours beside the fastest of the others: batch 64, 1.40 times the speed of fast."


def test_no_winner_inside_the_noise():
    bars = figure(models.throughput(book(row(), row("other", seconds=spread(5.1e-3)))), Bars)
    assert "batch 64, within the noise of other" in bars.says
    slower = figure(models.throughput(book(row(), row("other", seconds=spread(4e-3)))), Bars)
    assert "batch 64, 0.80 times the speed of other" in slower.says


def test_our_own_variants_are_no_others():
    graphed = row(f"{OURS}, CUDA graph", seconds=spread(1e-3), peak_bytes=10**6)
    given = book(row(peak_bytes=2 * 10**6), graphed, row("timm", seconds=spread(7e-3), peak_bytes=4 * 10**6))
    bars = figure(models.throughput(given), Bars)
    assert bars.says == "Ours beside the fastest of the others: batch 64, 1.40 times the speed of timm."
    assert figure(models.memory(given), Bars).says == "At batch 64 ours holds 0.50 times what timm does."
    alone = book(row(peak_bytes=2 * 10**6), graphed)
    assert "others" not in figure(models.throughput(alone), Bars).says
    assert figure(models.memory(alone), Bars).says == ""


def test_modelled_throughput_says_so():
    bars = figure(models.throughput(book(compiled(1), compiled(64))), Bars)
    assert all(bar.modelled for _, group in bars.groups for bar in group) and bars.evidence.startswith("modelled for")
    assert bars.says == "Batch 64: 10,667 images/s, 50% of what the datasheet allows."


def test_a_bound_alone_is_no_modelled_time():
    given = book(
        compiled(64, modelled_s=None), *(attention(n, source="compiled", seconds=None) for n in (64, 197, 512))
    )
    bars = figure(models.throughput(given), Bars)
    assert bars.evidence == f"bound of {GPU} by datasheet, nothing was timed" and bars.groups[0][1][0].limit is None
    assert bars.says == "There is no time model for this: bars are what the datasheet allows at most."
    assert kernels.attention(given) is None


def test_the_first_model_of_each_device_is_open():
    section = models.throughput(book(row(), row(model=TINY), row(device="cpu", source="cpu", bound_s=1e-3)))
    assert section is not None and [item.folded for item in section.items] == [False, True, False]
    assert figure(section, Bars, 2).groups[0][1][0].limit is None, "a datasheet of a CPU is not known"


def test_the_table_has_shares_of_both_ceilings():
    given = book(row(), ceilings=Ceilings(3.0e12, {"bf16": 400e12}))
    section = models.throughput(given)
    assert section is not None and section.items[0].table is not None
    cells = dict(zip(section.items[0].table.heads, section.items[0].table.rows[0], strict=True))
    assert (cells["of datasheet"], cells["of measured peak"]) == ("20%", "50%")
    assert cells["p20 to p80"] == "4.9 to 5.1" and cells["settings"] == "torch 2.14.1"


def test_memory_is_compared_at_the_largest_batch():
    given = book(row(peak_bytes=3 * 10**6), row("eager", peak_bytes=6 * 10**6), row(batch=1, peak_bytes=10**6))
    bars = figure(models.memory(given), Bars)
    assert [(b.name, b.value) for b in bars.groups[1][1]] == [(OURS, 3.0), ("eager", 6.0)]
    assert bars.says == "At batch 64 ours holds 0.50 times what eager does." and bars.evidence == f"measured on {GPU}"
    counted = compiled(peak_bytes=3 * 10**6, modelled_s=None, bound_s=None)
    assert figure(models.memory(book(counted)), Bars).evidence == "counted from recorded allocations, no GPU used"
    assert models.memory(book(row())) is None


@pytest.mark.parametrize(
    ("sources", "said", "hatched"),
    [
        (["gpu"], "measured on here", [False]),
        (["cpu"], "counted from recorded allocations on here", [True]),
        (["compiled"], "counted from recorded allocations, no GPU used", [True]),
        (["gpu", "compiled"], "measured on here; the rest counted from recorded allocations", [False, True]),
    ],
    ids=["measured", "cpu", "compiled", "both"],
)
def test_memory_says_by_whom_it_was_counted(sources, said, hatched):
    made = {"gpu": row, "cpu": row, "compiled": lambda batch, **changes: compiled(batch, **changes)}
    rows = [
        made[source](batch=8 * (n + 1), device="here", source=source, peak_bytes=10**6)
        for n, source in enumerate(sources)
    ]
    bars = figure(models.memory(book(*rows)), Bars)
    assert bars.evidence == said and [bar.modelled for _, group in bars.groups for bar in group] == hatched


# --- where time goes ------------------------------------------------------------------------------------------------


def test_a_block_is_cut_by_its_kernels():
    section = models.breakdown(book(compiled(1), compiled(8)))
    strips = figure(section, Strips)
    assert [(label, total) for label, total, _ in strips.strips] == [
        ("batch 1, modelled", "30.0 µs a block"),
        ("batch 8, modelled", "240.0 µs a block"),
    ]
    parts = {part.name: part.value for part in strips.strips[0][2]}
    assert parts == pytest.approx({"qkv": 8e-6, "attention": 4e-6, "projection": 3e-6, "fc1": 9e-6, "fc2": 6e-6})
    assert strips.says == "At batch 8 most of it is fc1, 72 µs." and strips.evidence.startswith("modelled")
    assert section is not None and section.items[0].table is not None
    assert section.items[0].table.rows[0][:6] == ("1", "qkv", "qkv_kernel", "8.0", "27%", "4.0")


def test_each_strip_says_whether_it_was_measured():
    timed = [one | {"seconds": 3e-6} for one in compiled().code["kernels"]]
    strips = figure(models.breakdown(book(compiled(1), row(batch=8, code={"kernels": timed}))), Strips)
    assert [label for label, _, _ in strips.strips] == ["batch 1, modelled", "batch 8, measured"]
    assert strips.evidence == f"measured on {GPU}; the rest modelled for {GPU}"


def test_a_timeline_has_every_launch_of_the_pass_in_order():
    strips = figure(models.timeline(book(compiled(1), compiled(8))), Strips)
    (title, total, launches), (_, block_total, block) = strips.strips
    names = ["qkv", "attention", "projection", "fc1", "fc2"]
    assert [part.name for part in launches] == ["stem", *names * 2, "head"] and [part.name for part in block] == names
    assert title == "forward, 12 launches"
    assert total == f"{8 * 63:.1f} µs" and block_total == "240.0 µs"


def test_what_a_block_moves_is_listed_where_it_was_counted():
    moved = {"ours": {"launches": 5, "activations": 21.5, "weight_bytes": 14_200_000}}
    moved |= {"eager": {"operators": 10, "activations": 38.0, "weight_bytes": 14_200_000}}
    moved |= {"quoted": {"torch.compile": {"launches": 8, "activations": 36.0, "quoted for": "somewhere else"}}}
    section = models.breakdown(book(compiled(code={"kernels": compiled().code["kernels"], "block": moved})))
    assert section is not None and (table := section.items[1].table) is not None
    assert table.rows == (
        (OURS, "5", "21.5", "14.2"),
        ("eager PyTorch", "10", "38.0", "14.2"),
        ("torch.compile (quoted)", "8", "36.0", ""),
    )
    assert "somewhere else" in section.items[1].note


def test_without_kernels_there_is_no_breakdown():
    assert models.breakdown(book(row())) is None and models.timeline(book(row())) is None


# --- kernels --------------------------------------------------------------------------------------------------------


def test_a_roofline_has_the_kernels_below_their_roof():
    curves = figure(kernels.roofline(book(compiled(1), compiled(8), compiled(64), compiled(256))), Curves)
    sheet, many, one = curves.lines
    assert (sheet.kind, many.name, one.name, one.hollow) == ("limit", "batch 64", "batch 1", True)
    assert [(dot.x, dot.y) for dot in sheet.dots][1] == (pytest.approx(989.4 / 3.35), pytest.approx(989.4))
    assert sheet.dots[0].y == pytest.approx(sheet.dots[0].x * 3.35)
    points = {dot.label: (dot.x, dot.y) for dot in one.dots}
    assert points["qkv"] == (pytest.approx(800), pytest.approx(1000)), "8 GFLOP in 8 us, 10 MB"
    assert "stem" not in points, "its bound alone would put it on the roof"
    assert curves.x.log and curves.y.log and "989 TFLOP/s and 3.35 TB/s (datasheet)" in curves.says


def test_measured_kernels_go_before_modelled_ones_and_bring_measured_ceilings():
    timed = [row(suite="kernels", case=c, label=c, flops=10**11, nbytes=10**8, seconds=spread(2e-4)) for c in "ab"]
    given = book(compiled(64), *timed, ceilings=Ceilings(3.0e12, {"bf16": 741e12}))
    curves = figure(kernels.roofline(given), Curves)
    assert [one.name for one in curves.lines] == ["datasheet", "measured peaks", "batch 64"]
    assert [(dot.label, dot.x, dot.y) for dot in curves.lines[2].dots] == [("a", 1000, 500), ("b", 1000, 500)]
    assert curves.evidence == f"measured on {GPU}"


def test_a_datasheet_that_the_run_does_not_tell_is_looked_up():
    curves = figure(kernels.roofline(book(compiled(64), datasheet=None)), Curves)
    assert curves.lines[0].dots[-1].y == pytest.approx(989.4)
    assert kernels.roofline(book(compiled(64, device="unknown GPU"), datasheet=None)) is None


def test_attention_curves_take_the_batch_with_as_many_tokens_everywhere():
    rows = [attention(n) for n in (64, 197, 512)] + [attention(197, batch=1), attention(197, batch=4096)]
    curves = figure(kernels.attention(book(*rows)), Curves)
    bound, ours = curves.lines
    assert [dot.x for dot in ours.dots] == [64, 197, 512] and curves.x.ticks == (64, 512)
    assert ours.dots[1].y == pytest.approx(4 * 197**2 * 12 * 83 * 64 / 1e-4 / 1e12)
    assert [dot.label for dot in ours.dots] == ["", "197", ""] and bound.dots[0].y == pytest.approx(5 * ours.dots[0].y)
    assert ours.dots[0].low == pytest.approx(ours.dots[0].y / 1.02)


def test_attention_over_heads_and_beside_others():
    rows = [attention(197, heads) for heads in (3, 6, 12)] + [attention(n) for n in (64, 512)]
    rows += [attention(n, contender="SDPA", bound_s=None) for n in (64, 197, 512)]
    section = kernels.attention(book(*rows))
    lengths, heads = (figure(section, Curves, number) for number in (0, 1))
    assert [one.name for one in lengths.lines] == ["bound by datasheet", OURS, "SDPA"]
    assert [dot.x for dot in heads.lines[1].dots] == [3, 6, 12] and heads.title.startswith("Head count: 197 tokens")
    assert kernels.attention(book(attention(64), attention(197))) is None, "two points are no curve"


# --- facts ----------------------------------------------------------------------------------------------------------


def test_accuracy_has_the_classifier_and_the_comparison_nearest_to_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "digits", lambda: (360, 364))
    near, far = {"row": 3e-3, "row_allowed": 4e-3}, {"row": 1e-3, "row_allowed": 4e-3}
    section = facts.accuracy(book(row(errors=far), row(batch=1, errors=near), row("eager")), tmp_path)
    assert "360 of 364" in section.intro and "98.90%" in section.intro
    (item,) = section.items
    assert item.table is not None and len(item.table.rows) == 1
    assert item.table.rows[0] == (OURS, "model", "bf16", GPU, "2", f"model/{BASE}/b1", "3.0e-03", "4.0e-03", "75%")


def test_records_of_other_source_count_for_nothing(tmp_path):
    from vit_bench import records

    def record(source: str) -> records.Record:
        shown = {"case": {"y": {"row": 1e-3, "row_allowed": 2e-3}}, "other": {"y": {"row": 1e-3, "row_allowed": 4e-3}}}
        return records.Record("attention", "float16", 90, source, True, {}, "2026-01-01", {"passed": shown})

    for source, count in ((records.source_hash("attention"), 1), ("older", 0)):
        records.merge(tmp_path / "emulated.json", "emulated", [record(source)])
        rows = facts._records(tmp_path).rows
        assert rows == (("attention", "float16", "emulated", "2", "1.0e-03", "2.0e-03", "50%"),) * count


def test_the_classifier_reads_its_digits():
    """As many as the training script saw, give or take one: sums are rounded elsewhere on other CPUs."""
    from vit_engine import digits

    right, every = facts.digits()
    known = digits.training()["heldout"]
    assert every == known["images"] and abs(every - right - known["wrong"]) <= 1


def test_environment_and_what_was_not_run():
    given = Book(results())
    section = facts.environment(given)
    assert [item.folded for item in section.items] == [False, True], "the latest run is open"
    assert section.items[0].title.startswith("2026-02-03") and section.items[0].table is not None
    assert section.items[1].table is not None
    found = {line[0]: line[1] for line in section.items[1].table.rows}
    assert found["versions"] == "torch 2.14.1" and found["cores"] == "2"
    assert found["datasheet"] == "989 TFLOP/s in 16 bits, 67 in fp32, 3.35 TB/s"
    assert found["reached by a large copy and product"] == "3 TB/s; bf16 741 TFLOP/s"
    gone = facts.not_run(given)
    assert gone is not None and gone.items[0].table is not None
    ((name, why, case),) = gone.items[0].table.rows
    assert (name, case) == ("flash-attn", f"model/{BASE}/b64 bf16") and "not installed" in why
    assert facts.not_run(book(row())) is None


def test_every_figure_has_a_title_its_evidence_and_a_name():
    found = figures(Book(results()))
    assert {type(one) for one in found} == {Bars, Curves, Strips}
    assert all(one.title and ("measured on" in one.evidence or "modelled for" in one.evidence) for one in found)
    assert len({one.name for one in found}) == len(found)
