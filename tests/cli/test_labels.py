"""``vit-engine run``: class names and true labels from files."""

from __future__ import annotations

import json

import pytest

from tests.cli.support import only_object
from vit_engine import digits, load_model, save_checkpoint


def test_true_labels_from_a_file(run, some, monkeypatch):
    known = {path.name: label for path, label in digits.heldout().items()}
    names = sorted(path.name for path in some.iterdir())
    wrong = {names[0]: str((int(known[names[0]]) + 1) % 10)}
    rows = [f"{name},{wrong.get(name, known[name])}" for name in names[:4]]
    (some / "truth.csv").write_text("\n".join(["file,label", *rows]))
    found = only_object(run(some, "--truth", some / "truth.csv", "--json"))
    assert found["accuracy"] == 0.75
    monkeypatch.chdir(some.parent)
    assert only_object(run("some", "--truth", "some/truth.csv", "--json"))["accuracy"] == 0.75
    assert [p.get("truth") is None for p in found["predictions"]] == [False] * 4 + [True] * 2
    assert f"{wrong[names[0]]} (wrong)" in run(some, "--truth", some / "truth.csv").stdout
    (some / "truth.csv").write_text("a,b\n")
    assert (
        "must be a CSV file with the columns file and label" in run(some, "--truth", some / "truth.csv", code=2).stderr
    )


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nïne"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.txt", "\n".join(NAMES) + "\n"),
        ("l.json", json.dumps(NAMES)),
        ("l.json", json.dumps({str(i): name for i, name in enumerate(NAMES)})),
        ("l.json", json.dumps({str(i): [f"n{i:08}", name] for i, name in enumerate(NAMES)})),
        ("l.json", json.dumps({name: i for i, name in enumerate(NAMES)})),
    ],
)
def test_class_names(run, some, tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    plain = only_object(run(some, "--json"))["predictions"]
    named = only_object(run(some, "--json", "--labels", tmp_path / name))["predictions"]
    assert [p["label"] for p in named] == [NAMES[p["index"]] for p in plain]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("l.txt", "a\nb\n", "2 class names for a model with 10 classes"),
        ("l.json", "{", "not valid JSON"),
        ("l.json", "[" * 200_000, "not valid JSON"),
        ("l.json", "[1]", "must be a list of names"),
        ("l.json", '{"0": "a", "2": "b"}', "numbers must run from 0 to 1"),
        ("l.json", '{"a": 0, "b": "c"}', "must map numbers to names or names to numbers"),
        ("l.json", '{"0": 1.5}', "1.5 is no class name"),
        ("l.txt", b"\xff\xfe\xfa", "not UTF-8 text"),
        ("gone.txt", None, "No such file or directory"),
    ],
)
def test_unusable_class_names(run, some, tmp_path, name, content, text):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    result = run(some, "--labels", tmp_path / name, code=2)
    assert text in result.stderr
    assert result.stderr.startswith("vit-engine run: ")
    assert result.stdout == ""


def test_labels_in_the_metadata_that_are_no_json_name_their_file(run, some, tmp_path):
    save_checkpoint(load_model(digits.CHECKPOINT), tmp_path / "odd.safetensors", {"labels": "zero, one"})
    result = run(some, "--checkpoint", tmp_path / "odd.safetensors", code=2)
    assert "odd.safetensors, labels in its metadata: not valid JSON" in result.stderr


def test_a_field_that_is_too_long_names_its_file_and_line(run, some, tmp_path):
    (tmp_path / "truth.csv").write_text("file,label\na.png,1\n" + "x" * 140_000 + ",2\n")
    result = run(some, "--truth", tmp_path / "truth.csv", code=2)
    assert "truth.csv: behind line 2: field larger than field limit" in result.stderr


def test_a_truth_file_without_any_of_the_images_is_told(run, some, tmp_path):
    lines = [f"{path.name},0" for path in sorted(some.iterdir())]
    for folder, told in ((tmp_path, True), (some, False)):
        truth = folder / "truth.csv"
        truth.write_text("\n".join(["file,label", *lines]))
        result = run(some, "--truth", truth)
        assert (f"no image is named in {truth} (names count from {folder})" in result.stderr) is told
