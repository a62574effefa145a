"""The file of benchmark results: what is written is read again, and what is none is refused by name."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from vit_bench.results import COLUMNS, Ceilings, Results, Row, Run, Spread, Sustained, load, save, write_csv

RUN = Run("2026-01-02T03:04:05Z", "vit-engine bench", {"device": "H100 SXM"}, Ceilings(3e12, {"bf16": 8e14}))
ROW = Row(
    run=0,
    suite="model",
    case="model/some/b8",
    label="forward",
    contender="vit-engine",
    device="H100 SXM",
    dtype="bf16",
    source="gpu",
    shape={"batch": 8, "tokens": 197},
    settings={"torch": "2.14", "graphs": "no"},
    seconds=Spread(0.002, 0.001, 0.004, 25),
    images=8,
    flops=4 * 10**11,
    nbytes=3 * 10**9,
)
WITHOUT_A_PAUSE = replace(ROW, sustained=Sustained(0.003, 1.25e9))
KNOWN = replace(RUN, datasheet={"bandwidth": 3e12, "half": 1e15, "single": 5e13})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    compiled = replace(ROW, source="compiled", seconds=None, code={"kernels": [_KERNEL | {"registers": 128}]})
    saved = Results([RUN, replace(RUN, ceilings=None)], [ROW, WITHOUT_A_PAUSE, compiled])
    save(saved, path)
    assert load(path) == saved
    assert [child.name for child in tmp_path.iterdir()] == ["results.json"]


def test_files_without_sustained_times_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(Results([RUN], [WITHOUT_A_PAUSE]), path)
    data = json.loads(path.read_text())
    del data["rows"][0]["sustained"]
    path.write_text(json.dumps(data))
    assert load(path).rows == [ROW]


def test_an_interrupted_save_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    save(Results([RUN], [ROW]), path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(Results([RUN], [ROW, ROW]), path)
    assert load(path).rows == [ROW] and len(list(tmp_path.iterdir())) == 1


def _changed(change: Any) -> str:
    data = json.loads(json.dumps({"format": "vit-engine benchmark results", "version": 1, "runs": [], "rows": []}))
    return json.dumps(change(data))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json", "cannot be read as benchmark results"),
        ("[" * 100_000, "cannot be read as benchmark results"),
        ("[]", "is no file of benchmark results"),
        (_changed(lambda d: d | {"format": "other"}), "'format' must be 'vit-engine benchmark results'"),
        (_changed(lambda d: d | {"version": 2}), "version must be 1; got 2"),
        (_changed(lambda d: d | {"runs": [{"started": ""}]}), "damaged benchmark results"),
        (_changed(lambda d: {k: v for k, v in d.items() if k != "rows"}), "damaged benchmark results: KeyError"),
        (
            _changed(lambda d: d | {"rows": [vars(replace(ROW, seconds=None, source="not run"))]}),
            "model/some/b8 belongs to run 0 of 0",
        ),
    ],
    ids=["text", "deep", "list", "format", "version", "run", "rows", "place"],
)  # fmt: skip
def test_other_files_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as failure:
        load(path)
    assert str(path) in str(failure.value)


def _with(row: dict[str, Any] | None = None, run: dict[str, Any] | None = None) -> str:
    """A file of one run and one row with these values in place of right ones."""
    rows, runs = [asdict(WITHOUT_A_PAUSE) | (row or {})], [asdict(KNOWN) | (run or {})]
    return _changed(lambda data: data | {"runs": runs, "rows": rows})


_KERNEL = {"launch": "qkv", "kernel": "k", "times": 1}
_BLOCK = {"ours": {"activations": 22.25, "weight_bytes": 1}, "eager": {"activations": 38.0}}
_SPREAD = {"median": 0.002, "p20": 0.001, "p80": 0.004, "timings": 25}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_with({"run": "x"}), "rows[0].run must be a whole number; got 'x'"),
        (_with({"run": None}), "rows[0].run must be a whole number; got None"),
        (_with({"seconds": _SPREAD | {"median": None}}), "rows[0].seconds.median must be a positive number; got None"),
        (_with({"seconds": _SPREAD | {"median": "2"}}), "rows[0].seconds.median must be a positive number; got '2'"),
        (_with({"seconds": _SPREAD | {"median": 0}}), "rows[0].seconds.median must be a positive number; got 0"),
        (_with({"seconds": _SPREAD | {"p80": float("nan")}}), "rows[0].seconds.p80 must be a positive number; got nan"),
        (_with({"seconds": 0.002}), "rows[0].seconds must be an object; got 0.002"),
        (_with({"sustained": {"seconds": 0, "clock": 1}}), "rows[0].sustained.seconds must be a positive number"),
        (_with({"modelled_s": 0}), "rows[0].modelled_s must be null or a positive number; got 0"),
        (_with({"flops": "many"}), "rows[0].flops must be null or a number from 0 on; got 'many'"),
        (_with({"code": None}), "rows[0].code must be an object; got None"),
        (_with({"shape": None}), "rows[0].shape must be an object of positive numbers; got None"),
        (_with({"code": {"kernels": {}}}), "rows[0].code.kernels must be a list; got {}"),
        (_with({"code": {"kernels": [_KERNEL | {"bound_s": "1"}]}}), "rows[0].code.kernels[0].bound_s must be null or"),
        (_with({"code": {"kernels": [{"kernel": "k", "times": 1}]}}), "kernels[0].launch must be a string; got None"),
        (_with({"modelled_s": 10**400}), "rows[0].modelled_s must be null or a positive number; got 1000"),
        (_with({"shape": {"batch": float("nan")}}), "rows[0].shape must be an object of positive numbers; got"),
        (_with({"code": {"kernels": [_KERNEL | {"waves": "2"}]}}), "kernels[0].waves must be a number from 0 on; got"),
        (_with({"code": {"kernels": [_KERNEL | {"bytes": -1}]}}), "kernels[0].bytes must be null or a number from 0"),
        (_with({"code": {"block": "x"}}), "rows[0].code.block must be an object; got 'x'"),
        (_with({"code": {"block": {"ours": {}}}}), "block.ours.activations must be a number from 0 on; got None"),
        (_with({"code": {"block": _BLOCK | {"eager": None}}}), "rows[0].code.block.eager must be an object; got None"),
        (_with({"code": {"block": _BLOCK | {"quoted": {"a": 1}}}}), "code.block.quoted.a must be an object; got 1"),
        (_with(run={"environment": None}), "runs[0].environment must be an object; got None"),
        (_with(run={"ceilings": {"copy": 0, "matmul": {}}}), "runs[0].ceilings.copy must be a positive number; got 0"),
        (_with(run={"datasheet": {"half": 0}}), "runs[0].datasheet must be null or an object of positive numbers"),
        (_changed(lambda d: d | {"rows": ["row"]}), "rows[0] must be an object; got 'row'"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: damaged benchmark results: ")) as failure:
        load(path)
    assert words in str(failure.value)


def test_an_error_may_be_infinite(tmp_path: Path) -> None:
    """Of what came out wrong, and is not timed."""
    path = tmp_path / "results.json"
    wrong = replace(ROW, source="not run", seconds=None, reason="wrong result", errors={"row": float("inf")})
    save(Results([RUN], [wrong]), path)
    assert load(path).rows == [wrong]


def test_only_what_was_measured_has_seconds() -> None:
    with pytest.raises(ValueError, match=r"model/some/b8: a row has seconds exactly if .* source is 'compiled'"):
        replace(ROW, source="compiled")
    with pytest.raises(ValueError, match="source is 'gpu'"):
        replace(ROW, seconds=None)
    with pytest.raises(ValueError, match="source must be one of gpu, cpu, compiled, not run; got 'guess'"):
        replace(ROW, source="guess")
    with pytest.raises(ValueError, match="suite must be one of kernels, model, attention; got 'all'"):
        replace(ROW, suite="all")


def test_rates_and_shares_of_what_is_known() -> None:
    assert ROW.per_second(ROW.images) == 4000
    assert ROW.per_second(0) is None and replace(ROW, source="not run", seconds=None).per_second(8) is None
    shares = Results([KNOWN], [ROW]).shares(ROW)
    assert shares == {
        "datasheet flops": pytest.approx(0.2),
        "measured flops": pytest.approx(0.25),
        "datasheet bytes": pytest.approx(0.5),
        "measured bytes": pytest.approx(0.5),
    }
    single = replace(ROW, dtype="fp32")
    shares = Results([KNOWN], [single]).shares(single)
    assert shares["datasheet flops"] == pytest.approx(4.0) and "measured flops" not in shares
    assert Results([replace(RUN, ceilings=None)], [ROW]).shares(ROW) == {}


def test_rows_of_one_thing_have_one_key() -> None:
    assert ROW.key == replace(ROW, run=1, images=3).key
    for change in ({"case": "x"}, {"contender": "timm"}, {"device": "A100"}, {"dtype": "fp16"}, {"suite": "kernels"}):
        assert replace(ROW, **change).key != ROW.key


def test_the_table_has_a_line_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    missing = replace(ROW, source="not run", seconds=None, reason="not installed", contender="xFormers")
    write_csv(Results([KNOWN], [WITHOUT_A_PAUSE, missing]), [WITHOUT_A_PAUSE, missing], path)
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert tuple(first) == COLUMNS
    assert (first["median_s"], first["p20_s"], first["timings"]) == ("0.002", "0.001", "25")
    assert (first["sustained_s"], first["sustained_ghz"], second["sustained_s"]) == ("0.003", "1.25", "")
    assert float(first["images_per_s"]) == 4000 and float(first["tflops"]) == 200 and float(first["gb_per_s"]) == 1500
    assert first["settings"] == "torch 2.14; graphs no" and (first["tokens"], first["m"]) == ("197", "")
    assert float(first["share of datasheet flops"]) == pytest.approx(0.2)
    assert (second["median_s"], second["reason"]) == ("", "not installed") and second["share of measured flops"] == ""
