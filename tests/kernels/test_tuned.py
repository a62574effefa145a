"""Tuned files: read as they were written, refused where they do not belong, and followed to the launch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vit_kernels
from vit_bench.tile_choices import CHOOSERS
from vit_bench.tuning_candidates import as_winner, candidates
from vit_kernels import fold_norm, forget_tuned, gemm_tiles, mlp_tiles, qk_rope_tiles, tiles, tuned, use_tuned
from vit_kernels.device import H100, INTERPRETED, attach, device_of
from vit_kernels.tuned import Entry, Gpu, Tuned, TunedFileError, gpus_here, read_tuned, versions_here, write_tuned

from ..weights import Draw
from .common import attention, layer_norm, linear, mlp, patch_embed, qk_rope
from .test_launching import ATTENTION, GEMM, MLP, ROWS, Launch, launches

pytestmark = pytest.mark.interpreted_only
__all__ = ["launches"]

DRAW = Draw(torch.float16, seed=1)
HERE = Gpu(INTERPRETED.name, INTERPRETED.capability, INTERPRETED.sm_count)
EMPTY = Tuned(HERE, versions_here(), "2026-01-01")
WON = {"block_m": 1, "block_n": 64, "num_warps": 1}
ENTRY = Entry({"kernel": "layer_norm", "m": 3, "dtype": "float16"}, WON, {"times": {"1x64 w1": [1.0, 2.0, 3.0]}})


@pytest.fixture(autouse=True)
def nothing_tuned() -> Iterator[None]:
    yield
    forget_tuned()


class Asking(Tuned):
    """Notes what it is asked and answers with what it is told to."""

    def __init__(self, answer: Any) -> None:
        super().__init__(HERE, {}, "")
        vars(self).update(asked=[], answer=answer)

    def winner(self, problem: Mapping[str, Any]) -> Any:
        vars(self)["asked"].append(dict(problem))
        return vars(self)["answer"]


def asking(answer: Any) -> list[dict[str, Any]]:
    """From here on every problem has this winner; what was asked."""
    table = Asking(answer if isinstance(answer, str) or answer is None else asdict(answer))
    attach({None: table})
    return vars(table)["asked"]


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = EMPTY.extended(ENTRY).without({"kernel": "linear"}, "16x64x32 w4 s3", "an illegal address")
    write_tuned(tmp_path / "new" / "file.json", table)
    again = read_tuned(tmp_path / "new" / "file.json")
    assert (again.gpu, again.versions, again.date) == (HERE, versions_here(), "2026-01-01")
    assert again.entries == (ENTRY,) and again.lost == table.lost
    assert again.lost_of({"kernel": "linear"}) == {"16x64x32 w4 s3": "an illegal address"}
    assert again.winner({"dtype": "float16", "m": 3, "kernel": "layer_norm"}) == WON
    assert again.winner({"dtype": "bfloat16", "m": 3, "kernel": "layer_norm"}) is None
    assert again.winner({"dtype": "float16", "m": 3}) is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.json"]


def written(tmp_path: Path, **changes: Any) -> Path:
    write_tuned(tmp_path / "tuned.json", replace(EMPTY, entries=(ENTRY,), **changes))
    return tmp_path / "tuned.json"


def without_entries(content: dict[str, Any]) -> Any:
    return {name: value for name, value in content.items() if name != "entries"}


def of_one(problem: Any, winner: Any = None) -> Callable[[dict[str, Any]], Any]:
    """The file's content with one entry, of this problem and winner."""
    return lambda content: content | {"entries": [{"problem": problem, "winner": winner or WON}]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content | {"format": 2}, ("format must be 1", "got 2")),
        (lambda content: [content], ("format must be 1", "list")),
        (without_entries, ("entries must be a list", "nothing")),
        (lambda content: content | {"entries": [3]}, ("entries[0] must be an object", "got 3")),
        (lambda content: content | {"gpu": {"name": "H100"}}, ("gpu has no capability",)),
        (lambda content: content | {"gpu": content["gpu"] | {"capability": "90"}}, ("capability", "number", "'90'")),
        (lambda content: content | {"versions": "3.8"}, ("versions must be an object", "'3.8'")),
        (lambda content: content | {"lost": [{"problem": {"kernel": "mlp"}}]}, ("lost[0] has no candidate",)),
        (lambda content: content | {"entries": content["entries"] * 2}, ("two entries", "layer_norm")),
        (of_one({"m": 3}), ("entries[0]: problem", "kernel")),
        (of_one({"kernel": "mlp", "m": [3]}), ("entries[0]: m of the problem", "[3]")),
        (of_one({"kernel": "x"}, 3), ("entries[0]: winner", "3")),
    ],
)
def test_what_is_no_tuned_file_is_refused(tmp_path: Path, change: Callable[[Any], Any], words: tuple[str, ...]) -> None:
    path = written(tmp_path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(TunedFileError) as refusal:
        use_tuned(path)
    assert all(word in str(refusal.value) for word in (*words, f"{path}: "))
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(TunedFileError, match="no tuned file"):
            read_tuned(path)


MASKED = {"kernel": "attention", "mask": "batch", "queries": 9, "keys": 9}


@pytest.mark.parametrize(
    ("problem", "winner", "words"),
    [
        ({"kernel": "x"}, WON, ("kernel must be one of patch_embed, attention",)),
        (ENTRY.problem, {"block_m": 1}, ("winner has no block_n", "num_warps")),
        (ENTRY.problem, WON | {"block_k": 16}, ("has a field 'block_k'",)),
        (ENTRY.problem, WON | {"block_m": "16"}, ("block_m must be a whole number; got '16'",)),
        (ENTRY.problem, WON | {"block_m": True}, ("block_m must be a whole number; got True",)),
        (ENTRY.problem, WON | {"num_warps": 0}, ("num_warps of the winner must be 1 or more; got 0",)),
        (ENTRY.problem, WON | {"block_m": 48}, ("block_m of the winner must be a power of two; got 48",)),
        (ENTRY.problem, "two_products", ("must be the fields of a tile or 'torch'; got 'two_products'",)),
        ({"kernel": "mlp"}, "torch", ("must be the fields of a tile or 'two_products'; got 'torch'",)),
        ({"kernel": "linear"}, asdict(GEMM) | {"roles": 1}, ("roles must be true or false; got 1",)),
        (MASKED, "torch", ("must be the fields of a tile: 'torch' has no mask",)),
    ],
)
def test_a_winner_that_no_launch_could_follow_is_named(
    tmp_path: Path, problem: dict[str, Any], winner: Any, words: tuple[str, ...]
) -> None:
    path = written(tmp_path)
    path.write_text(json.dumps(of_one(problem, winner)(json.loads(path.read_text()))))
    with pytest.raises(TunedFileError) as refusal:
        use_tuned(path)
    assert all(word in str(refusal.value) for word in (*words, f"{path}: entries[0] ({problem['kernel']})"))


def test_winners_of_other_kernels_may_have_other_fields(tmp_path: Path) -> None:
    path = written(tmp_path, versions=versions_here() | {"kernels": "other"})
    path.write_text(json.dumps(of_one({"kernel": "x"}, {"block_q": 3})(json.loads(path.read_text()))))
    with pytest.raises(TunedFileError, match="measured with kernel source other"):
        use_tuned(path)
    with pytest.warns(UserWarning, match="none of its entries"):
        use_tuned(path, strict=False)


def test_every_tile_of_the_tables_may_win(tmp_path: Path) -> None:
    assert tuned.WINNERS.keys() == CHOOSERS.keys()
    shape = {"m": 64, "n": 64, "k": 64, "heads": 4, "tf32": False}
    for kernel in ("linear", "patch_embed", "attention", "mlp", "layer_norm", "qk_rope"):
        problem: Any = SimpleNamespace(kernel=kernel, fields=shape, default=ROWS, device=H100)
        choices = candidates(problem, with_pytorch=False, wide=True)[1:]
        entries = [Entry({"kernel": kernel, "m": m}, as_winner(choice)) for m, choice in enumerate(choices)]
        write_tuned(tmp_path / "tuned.json", replace(EMPTY, entries=tuple(entries)))
        assert len(read_tuned(tmp_path / "tuned.json").entries) == len(choices) > 5


def test_what_is_no_path_is_named() -> None:
    with pytest.raises(TypeError, match="path must be that of a tuned file; got 3"):
        use_tuned(3)  # type: ignore[arg-type]
    with pytest.raises(TunedFileError, match=r"^\. is a folder: name a file"):
        use_tuned(".")


def test_a_file_of_another_gpu_is_refused(tmp_path: Path) -> None:
    for gpu in (replace(HERE, name="H100"), replace(HERE, capability=90), replace(HERE, sm_count=132)):
        for strict in (True, False):
            with pytest.raises(TunedFileError) as refusal:
                use_tuned(written(tmp_path, gpu=gpu), strict=strict)
            assert str(gpu) in str(refusal.value) and str(HERE) in str(refusal.value)
    assert device_of(torch.zeros(1)).tuned is None


@pytest.mark.parametrize(("what", "name"), [("triton", "Triton"), ("kernels", "kernel source")])
def test_what_another_triton_or_other_kernels_were_measured_with_does_not_count(tmp_path, what, name):
    path = written(tmp_path, versions=versions_here() | {what: "1.2.3"})
    with pytest.raises(TunedFileError) as refusal:
        use_tuned(path)
    assert f"{name} 1.2.3, here is {versions_here()[what]}" in str(refusal.value)
    assert device_of(torch.zeros(1)).tuned is None
    with pytest.warns(UserWarning, match=f"{name} 1.2.3.*none of its entries"):
        assert use_tuned(path, strict=False).entries == ()
    assert device_of(torch.zeros(1)).tuned is not None


def test_another_pytorch_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"PyTorch 1\.2\.3"):
        assert use_tuned(written(tmp_path, versions=versions_here() | {"torch": "1.2.3"})).entries == (ENTRY,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_tuned(written(tmp_path)).entries == (ENTRY,)
    with pytest.raises(TypeError, match="strict"):
        use_tuned(written(tmp_path), strict=1)  # type: ignore[arg-type]


def test_the_source_of_the_kernels_is_known_by_its_bytes(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "tuned.py"))
    found = {tuned.source_of_kernels.__wrapped__()}
    (tmp_path / "a.py").write_text("2")
    found.add(tuned.source_of_kernels.__wrapped__())
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    found.add(tuned.source_of_kernels.__wrapped__())
    assert len(found) == 3


def test_the_tile_choice_asks_the_table_for_exactly_the_problem():
    call = tiles.described("layer_norm", torch.float16, kind="layer", weight=torch.zeros(1), bias=None)
    problem = {
        "kernel": "layer_norm",
        "dtype": "float16",
        "kind": "layer",
        "weight": True,
        "bias": False,
        "m": 9,
        "n": 20,
    }
    table = Tuned(HERE, {}, "", (Entry(problem, asdict(ROWS)), Entry(problem | {"m": 10}, "torch")))
    tuned, modelled = replace(H100, tuned=table), tiles.choose_rows(9, 20, 2, H100)
    assert modelled != ROWS
    assert tiles.choose_rows(9, 20, 2, tuned, call=call) == ROWS
    assert tiles.choose_rows(10, 20, 2, tuned, call=call) is tiles.TORCH
    other = tiles.described("layer_norm", torch.bfloat16, kind="layer", weight=torch.zeros(1), bias=None)
    for chosen in (
        tiles.choose_rows(9, 20, 2, tuned),
        tiles.choose_rows(9, 20, 2, tuned, call=other),
        tiles.choose_rows(9, 20, 2, H100, call=call),
        tiles.choose_rows(9, 20, 2, replace(H100, tuned=Tuned(HERE, {}, "")), call=call),
    ):
        assert chosen == modelled


def test_no_tile_for_one_kernel_is_a_winner_with_a_name():
    call = tiles.described("mlp", torch.float16)
    shape = {"m": 10**5, "width": 192, "hidden": 768, "gated": False, "always": False, "described": False}
    entry = Entry({"kernel": "mlp", "dtype": "float16", **shape}, mlp_tiles.TWO_PRODUCTS)
    assert mlp_tiles.choose_mlp(10**5, 192, 768, 2, H100) is not None
    assert (
        mlp_tiles.choose_mlp(10**5, 192, 768, 2, replace(H100, tuned=Tuned(HERE, {}, "", (entry,))), call=call) is None
    )


def test_an_interpreter_with_a_table_still_gets_tiles_for_the_interpreter():
    tuned = replace(INTERPRETED, tuned=EMPTY)
    assert gemm_tiles.choose_gemm(50, 50, 50, 4, tuned) == gemm_tiles.choose_gemm(50, 50, 50, 4, INTERPRETED)
    assert gpus_here() == {None: HERE}


def expect(asked: list[dict[str, Any]], launches: list[Launch], problem: dict[str, Any], **constants: Any) -> None:
    """The last problem asked has these fields, and the last launch these constants."""
    assert {name: asked[-1].get(name, "absent") for name in problem} == problem
    assert {name: launches[-1].constants[name] for name in constants} == constants


GEMM_CONSTANTS = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 2}


def test_linear_launches_the_winner(launches):
    asked = asking(GEMM)
    x, weight, column_sum = DRAW.rows(20, 48), *fold_norm(DRAW.weight(30, 48), None, DRAW.gamma(48))[:2]
    problem = {"kernel": "linear", "dtype": "float16", "m": 20, "n": 30, "k": 48, "norm": "none", "residual": False}
    linear(x, weight)
    expect(asked, launches, problem | {"bias": False, "activation": "none", "emit_stats": False}, **GEMM_CONSTANTS)
    linear(x, weight, DRAW.bias(30), residual=DRAW.rows(20, 30), activation="silu", emit_stats=True, tf32=False)
    expect(asked, launches, problem | {"residual": True, "bias": True, "activation": "silu", "emit_stats": True})
    stats = torch.zeros(2, 1, 20)
    linear(x, weight, norm="layer", stats=stats, column_sum=column_sum)
    expect(asked, launches, problem | {"norm": "layer"}, **GEMM_CONSTANTS)


def test_rows_launch_the_winner(launches):
    asked = asking(ROWS)
    layer_norm(DRAW.rows(9, 20), DRAW.gamma(20))
    problem = {
        "kernel": "layer_norm",
        "m": 9,
        "n": 20,
        "kind": "layer",
        "weight": True,
        "bias": False,
        "row_stride": 20,
    }
    expect(asked, launches, problem, BLOCK_M=4, BLOCK_N=32, num_warps=2)
    vit_kernels.row_stats(DRAW.rows(9, 40)[:, :20])
    expect(asked, launches, {"kernel": "row_stats", "row_stride": 40}, BLOCK_M=4, BLOCK_N=32, num_warps=2)


def test_attention_launches_the_winner(launches):
    asked = asking(ATTENTION)
    q, k, v = DRAW.normal(2, 20, 3, 6, 40).unbind(2)
    attention(q, k, v, causal=True, return_lse=True)
    problem = {"kernel": "attention", "heads": 12, "queries": 20, "keys": 20, "width": 40, "q_stride": 720}
    options = {"causal": True, "return_lse": True, "mask": "none", "key_lengths": False, "heads_k": 6}
    expect(asked, launches, problem | options, BLOCK_M=16, BLOCK_N=32, num_warps=2)


def test_mlp_launches_the_winner(launches):
    asked = asking(MLP)
    x, fc1, fc2 = DRAW.normal(20, 80), DRAW.weight(40, 80), DRAW.weight(80, 40)
    mlp(x, fc1, None, fc2, norm="none", layer_scale=DRAW.layer_scale(80))
    problem = {"kernel": "mlp", "m": 20, "width": 80, "hidden": 40, "fc1_bias": False, "layer_scale": True}
    expect(asked, launches, problem | {"activation": "gelu", "norm": "none"}, BLOCK_M=16, BLOCK_H=32, num_warps=2)


def test_patch_embed_launches_the_winner(launches):
    asked = asking(GEMM)
    patch_embed(DRAW.images(2, 3, 16, 24), DRAW.weight(70, 3, 4, 4), prefix=DRAW.normal(1, 70))
    problem = {
        "kernel": "patch_embed",
        "m": 50,
        "n": 70,
        "k": 48,
        "height": 16,
        "width": 24,
        "prefix": 1,
        "bias": False,
    }
    expect(asked, launches, problem | {"position": 0, "bytes": False}, **GEMM_CONSTANTS)


def test_qk_rope_launches_the_winner(launches):
    asked = asking(qk_rope_tiles.QkRopeTile(8, 2, 2))
    q, k = DRAW.normal(2, 9, 3, 22), DRAW.normal(2, 9, 1, 22)
    qk_rope(q, k, norm="rms", q_weight=DRAW.gamma(22))
    problem = {
        "kernel": "qk_rope",
        "heads": 3,
        "heads_q": 3,
        "heads_k": 1,
        "norm": "rms",
        "q_weight": True,
        "cos": False,
    }
    expect(asked, launches, problem, BLOCK_T=8, num_warps=2)
