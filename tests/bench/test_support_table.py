"""The README's table claims what the evidence files show for the current source, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_bench import current, dropin_table, modelled_table, records, support_table


def counts(rung: str, record: records.Record) -> bool:
    return record.passed and record.source == "current"


def write(
    folder: Path, rung: str, *, capability: int | None = 90, source: str = "current", passed: bool = True
) -> None:
    claim = records.Record("linear", "float16", capability, source, passed, {}, "2026-01-01")
    records.merge(folder / f"{rung}.json", rung, [claim])


def cell(folder: Path, capability: int = 90) -> str:
    return support_table.cell(support_table.shown(folder, counts), "linear", "float16", capability)


def test_a_cell_climbs_the_ladder_rung_by_rung(tmp_path: Path) -> None:
    assert cell(tmp_path) == "nothing shown"
    seen = []
    for rung in ("interpreted", "compiled", "sanitized", "emulated", "executed"):
        write(tmp_path, rung, capability=None if rung == "interpreted" else 90)
        seen.append(cell(tmp_path))
    assert seen == ["interpreted", "compiled only", "sanitized + compiled", "emulated", "executed on GPU"]


def test_a_cell_drops_to_the_next_rung_when_the_source_changed(tmp_path: Path) -> None:
    write(tmp_path, "interpreted", capability=None)
    write(tmp_path, "compiled")
    write(tmp_path, "emulated")
    assert cell(tmp_path) == "emulated"
    write(tmp_path, "emulated", source="older")
    assert cell(tmp_path) == "compiled only"
    write(tmp_path, "compiled", source="older")
    assert cell(tmp_path) == "interpreted"
    write(tmp_path, "interpreted", capability=None, source="older")
    assert cell(tmp_path) == "nothing shown"


@pytest.mark.parametrize("rung", ["executed", "emulated", "sanitized", "compiled"])
def test_a_run_on_one_generation_says_nothing_about_another(tmp_path: Path, rung: str) -> None:
    write(tmp_path, rung, capability=80)
    assert cell(tmp_path, capability=90) == "nothing shown"


def test_a_failed_run_counts_for_nothing(tmp_path: Path) -> None:
    write(tmp_path, "compiled")
    write(tmp_path, "emulated", passed=False)
    assert cell(tmp_path) == "compiled only"


def test_sanitized_alone_does_not_claim_that_it_compiles(tmp_path: Path) -> None:
    write(tmp_path, "sanitized")
    assert cell(tmp_path) == "nothing shown"


def test_dtypes_of_a_generation_share_a_row_where_the_same_is_shown_for_them() -> None:
    all_alike = support_table.table(set()).splitlines()[2:]
    assert [line.split(" | ")[1] for line in all_alike] == ["float32, float16, bfloat16"] * len(records.CAPABILITIES)
    hopper = [
        line.split(" | ")[1:5]
        for line in support_table.table({("compiled", "linear", "float16", 90)}).splitlines()[2:]
        if "sm_90" in line
    ]
    assert hopper == [
        ["float32, bfloat16", *["nothing shown"] * 3],
        ["float16", *["nothing shown"] * 2, "compiled only"],
    ]


def test_every_row_has_a_cell_per_kernel() -> None:
    assert {line.count("|") for line in support_table.table(set()).splitlines()} == {len(records.KERNELS) + 3}


def readme(folder: Path, text: str) -> Path:
    path = folder / "README.md"
    path.write_text(f"# Title\n\n{support_table.BEGIN}\n{text}\n{support_table.END}\n\nThe end.\n")
    return path


def test_check_fails_on_a_stale_table_and_passes_after_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = readme(tmp_path, "| executed on GPU |")
    options = ["--readme", str(path), "--evidence", str(tmp_path)]
    assert support_table.main(["--check", *options]) == 1
    assert "-| executed on GPU |" in capsys.readouterr().err
    assert support_table.main(options) == 0
    assert support_table.main(["--check", *options]) == 0
    text = path.read_text()
    assert text.startswith("# Title\n") and text.endswith("The end.\n") and "executed on GPU" not in text


def test_a_readme_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold the two marker lines once"):
        support_table.replaced("# Title\n", "table")


@pytest.mark.parametrize(
    "main", [support_table.main, dropin_table.main, modelled_table.main], ids=lambda m: m.__module__
)
@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "No such file"), ("# Title\n", "must hold the two marker lines once")],
    ids=["no README", "no markers"],
)
def test_without_a_place_for_the_table_nothing_is_done(main, text, words, tmp_path, capsys) -> None:
    path = tmp_path / "README.md"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["--readme", str(path)])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_damaged_evidence_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = readme(tmp_path, "")
    for name, text in (("compiled", "[]"), ("dropin", "no json")):
        (tmp_path / f"{name}.json").write_text(text)
    drop_in = f"{dropin_table.BEGIN}\n{dropin_table.END}\n"
    path.write_text(path.read_text() + drop_in)
    for main, options, words in (
        (support_table.main, ["--evidence", str(tmp_path)], "compiled.json: cannot be read as evidence"),
        (dropin_table.main, ["--evidence", str(tmp_path / "dropin.json")], "dropin.json cannot be read"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["--readme", str(path), *options])
        assert ended.value.code == 2 and words in capsys.readouterr().err


def test_the_interpreter_cannot_tell_which_tiles_a_record_must_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(current, "interpreting", lambda: True)
    current._choices.cache_clear()
    path = readme(tmp_path, "")
    claim = records.Record("linear", "float16", 90, records.source_hash("linear"), True, {}, "2026-01-01")
    records.merge(tmp_path / "executed.json", "executed", [claim])
    with pytest.raises(SystemExit) as ended:
        support_table.main(["--readme", str(path), "--evidence", str(tmp_path)])
    assert ended.value.code == 2 and "TRITON_INTERPRET is set: unset it" in capsys.readouterr().err
