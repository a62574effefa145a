"""Arguments of the commands under vit_bench that cannot be meant: refused by name, with exit status 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from vit_bench import compile_matrix, dropin_host_cost, host_cost, memory

NUMBER = "must be a whole number from 1 on; got"


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (memory.main, ["--gpu", "nope"], "argument --gpu: gpu must be one of"),
        (memory.main, ["--model", "nope"], "argument --model: timm has no model 'nope'"),
        (memory.main, ["--batch", "0"], f"argument --batch: {NUMBER} '0'"),
        (memory.main, ["--depth", "0"], f"argument --depth: {NUMBER} '0'"),
        (memory.main, ["--batch", "many"], f"argument --batch: {NUMBER} 'many'"),
        (host_cost.main, ["--rounds", "0"], f"argument --rounds: {NUMBER} '0'"),
        (host_cost.main, ["--depth", "-1"], f"argument --depth: {NUMBER} '-1'"),
        (dropin_host_cost.main, ["--rounds", "0"], f"argument --rounds: {NUMBER} '0'"),
        (compile_matrix.main, ["--batch", "8", "0"], f"argument --batch: {NUMBER} '0'"),
        (compile_matrix.main, ["--json", "/"], "argument --json: must be a file; / is a folder"),
        (compile_matrix.main, ["--table", "/"], "argument --table: must be a file; / is a folder"),
        (compile_matrix.main, ["--evidence", "/"], "argument --evidence: must be a file; / is a folder"),
        (compile_matrix.main, ["--evidence", __file__], "argument --evidence: " + __file__ + ": cannot be read as"),
        (dropin_host_cost.main, ["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_argument(
    main: Callable[[Sequence[str]], int], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("main", [memory.main, host_cost.main, dropin_host_cost.main], ids=lambda main: main.__module__)
def test_help_is_given(main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and "--json" in capsys.readouterr().out


def test_more_images_than_memory_holds_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr(memory, "interpreting", lambda: False)
    with pytest.raises(SystemExit) as ended:
        memory.main(["--batch", str(10**12), "--depth", "1"])
    assert ended.value.code == 2 and f"argument --batch: no memory here for {10**12} images" in capsys.readouterr().err


def test_a_model_that_accelerate_does_not_take_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")

    def measure(*_: object) -> None:
        raise TypeError("the reason")

    monkeypatch.setattr(memory, "interpreting", lambda: False)
    monkeypatch.setattr(memory, "measure", measure)
    with pytest.raises(SystemExit) as ended:
        memory.main(["--model", "resnet18"])
    assert ended.value.code == 2 and "argument --model: 'resnet18': the reason" in capsys.readouterr().err
