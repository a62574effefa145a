"""The tuner, whole, on the CPU: candidates run in the interpreter and a clock that tests set says how long."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import vit_kernels
from tests.kernels.test_launching import launches
from vit_bench import tuning_candidates
from vit_bench.cases import Prepared, prepare
from vit_bench.plan import HEADS, heads_call, model_calls
from vit_bench.tuning import Bench, GpuLostError, Outcome, Spread, beats, choose, tune, tune_problem
from vit_bench.tuning_candidates import as_winner, by_model, candidates, modelled_cycles, title, verified
from vit_bench.tuning_problems import LauncherCall, Problem, preset_calls, problems_of, taken_apart
from vit_bench.whole_model import SMALL
from vit_kernels import forget_tuned, gemm_tiles, tiles, use_tuned
from vit_kernels.device import A100, B200, H100, INTERPRETED
from vit_kernels.tuned import Gpu, Tuned, read_tuned, versions_here, write_tuned

from ..weights import Draw

pytestmark = pytest.mark.interpreted_only
__all__ = ["launches"]

HERE = Gpu(INTERPRETED.name, INTERPRETED.capability, INTERPRETED.sm_count)
EMPTY = Tuned(HERE, versions_here(), "2026-01-01")
DRAW = Draw(torch.float16, seed=1)


@pytest.fixture(autouse=True)
def nothing_tuned() -> Iterator[None]:
    yield
    forget_tuned()


def norm_call(rows: int = 9) -> LauncherCall:
    return taken_apart("layer_norm", "final norm", [DRAW.rows(rows, 20), DRAW.gamma(20), DRAW.bias(20)], {})


def norm_problem(rows: int = 9) -> Problem:
    (problem,) = problems_of([norm_call(rows)], INTERPRETED)
    return problem


PROBLEM = norm_problem()
DEFAULT, FAST, SLOW = PROBLEM.default, tiles.RowsTile(2, 32, 2), tiles.RowsTile(8, 32, 8)


class Workbench:
    """Runs candidates in the interpreter.

    seconds: by candidate, what its timings are around; trouble: by candidate, what goes wrong with it, and when:
    "compile", "run", "later" (once it has been timed), "lost" (with the GPU), "time".
    """

    def __init__(self, seconds: dict[Any, float], trouble: dict[Any, str] | None = None) -> None:
        self.seconds, self.trouble = seconds, trouble or {}
        self.ran: list[Any] = []
        self.timed: list[Any] = []
        self.tables: list[Tuned] = []
        self.prepared: dict[int, Prepared] = {}

    def compile(self, problem: Problem, choice: Any) -> str:
        return "spills 16 bytes" if self.trouble.get(choice) == "compile" else ""

    def verify(self, problem: Problem, choice: Any) -> dict[str, Any]:
        if self.trouble.get(choice) == "run" or (self.trouble.get(choice) == "later" and choice in self.timed):
            raise RuntimeError("an illegal instruction\nand more")
        if self.trouble.get(choice) == "lost":
            raise GpuLostError("the GPU is lost", title(choice), "an illegal address")
        self.ran.append(choice)
        if id(problem) not in self.prepared:
            self.prepared[id(problem)] = prepare(problem.case(), problem.dtype, "cpu")
        return verified(self.prepared[id(problem)], choice)

    def time(self, problem: Problem, choices: Sequence[Any]) -> list[list[float] | str]:
        self.timed += choices
        return [
            "cannot be captured" if self.trouble.get(choice) == "time" else self._around(self.seconds.get(choice, 1.0))
            for choice in choices
        ]

    def _around(self, seconds: float) -> list[float]:
        return [seconds * (1 + 0.001 * step) for step in range(-10, 11)]

    @property
    def bench(self) -> Bench:
        return Bench(self.compile, self.verify, self.time, self.tables.append)


def outcome(seconds: dict[Any, float], trouble: dict[Any, str] | None = None, choices: Sequence[Any] = ()) -> Outcome:
    choices = choices or (DEFAULT, FAST, SLOW, tiles.TORCH)
    return tune_problem(PROBLEM, choices, Workbench(seconds, trouble).bench, {})


def winner(found: Outcome) -> Any:
    assert found.entry is not None
    return found.entry.winner


def test_the_fastest_wins_and_the_file_says_why():
    found = outcome({DEFAULT: 2.0e-6, FAST: 1.0e-6, SLOW: 4.0e-6, tiles.TORCH: 3.0e-6})
    assert winner(found) == {"block_m": 2, "block_n": 32, "num_warps": 2}
    entry = found.entry
    assert entry is not None and entry.problem == PROBLEM.fields
    measured = entry.measured
    assert list(measured["times"]) == [title(FAST), title(DEFAULT), "PyTorch", title(SLOW)]
    assert measured["times"][title(FAST)] == [0.99, 1.0, 1.01] and measured["default"] == title(DEFAULT)
    assert measured["runner_up"] == title(DEFAULT) and measured["discarded"] == {}
    assert 0 < measured["error"]["y"]["row"] <= measured["error"]["y"]["row_allowed"]


def test_pytorch_wins_where_it_is_fastest():
    assert winner(outcome({DEFAULT: 2.0, tiles.TORCH: 1.0, FAST: 1.5, SLOW: 4.0})) == "torch"


@pytest.mark.parametrize(("other", "expected"), [(0.995, DEFAULT), (1.0, DEFAULT), (0.97, FAST)])
def test_within_the_noise_the_default_stays(other, expected):
    assert winner(outcome({DEFAULT: 1.0, FAST: other, SLOW: 2.0, tiles.TORCH: 2.0})) == as_winner(expected)


def test_noise_is_what_four_of_five_timings_span():
    slow, fast = Spread(9.0, 10.0, 11.0), Spread(7.0, 8.0, 8.9)
    assert beats(fast, slow) and not beats(slow, fast) and not beats(replace(fast, p80=9.0), slow)
    spread = Spread.of([1e-6 * n for n in range(11)])
    assert [round(v, 9) for v in (spread.p20, spread.median, spread.p80)] == [2.0, 5.0, 8.0]
    assert choose({"a": slow, "b": fast}, default="gone") == "b"


def plant(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.Tensor], Any], tile: tiles.RowsTile) -> None:
    """Wrong results from this tile."""
    from vit_kernels import norm

    launch = norm.launch

    def spoiling(on: torch.Tensor, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launch(on, kernel, programs, *arguments, **constants)
        if (constants["BLOCK_M"], constants["num_warps"]) == (tile.block_m, tile.num_warps):
            spoil(arguments[3])

    monkeypatch.setattr(norm, "launch", spoiling)


def test_a_wrong_kernel_never_wins_even_when_it_is_fastest(monkeypatch):
    plant(monkeypatch, lambda y: y[4, 7].add_(0.5), FAST)
    found = outcome({DEFAULT: 2.0, FAST: 0.001, SLOW: 1.0})
    assert winner(found) == as_winner(SLOW)
    ((choice, why),) = found.discarded
    assert choice == FAST and "row 4, column 7" in why
    assert FAST not in found.times, "what is wrong is not even timed"


def test_nan_is_wrong(monkeypatch):
    plant(monkeypatch, lambda y: y[0, 0].fill_(float("nan")), FAST)
    ((choice, why),) = outcome({FAST: 0.001}).discarded
    assert choice == FAST and "not finite" in why


def test_what_a_kernel_leaves_unwritten_is_wrong(monkeypatch):
    """The result of the candidate before it lies in the same memory."""
    from vit_kernels import norm

    launch = norm.launch

    def skipping(on: torch.Tensor, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launch(on, kernel, programs - (constants["BLOCK_M"] == FAST.block_m), *arguments, **constants)

    monkeypatch.setattr(norm, "launch", skipping)
    memory, empty = {}, torch.empty

    def reused(*shape: Any, **options: Any) -> torch.Tensor:
        return memory.setdefault((shape, *options.values()), empty(*shape, **options))

    monkeypatch.setattr(torch, "empty", reused)
    found = outcome({FAST: 0.001})
    assert [choice for choice, _ in found.discarded] == [FAST] and len(memory) == 1


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("compile", "spills 16 bytes"),
        ("run", "RuntimeError: an illegal instruction"),
        ("later", "right at first"),
        ("time", "cannot be captured"),
    ],
)
def test_what_spills_or_fails_is_discarded_with_the_reason(trouble, words):
    bench = Workbench({FAST: 0.001, DEFAULT: 1.0}, {FAST: trouble})
    found = tune_problem(PROBLEM, (DEFAULT, FAST), bench.bench, {})
    assert winner(found) == as_winner(DEFAULT)
    ((choice, why),) = found.discarded
    assert choice == FAST and words in why and "\n" not in why
    assert found.entry is not None and found.entry.measured["discarded"] == {title(FAST): why}
    if trouble == "compile":
        assert FAST not in bench.ran, "it must not run"


def test_a_default_that_is_wrong_gives_way():
    assert winner(outcome({FAST: 1.0, DEFAULT: 0.1}, {DEFAULT: "run"}, (DEFAULT, FAST))) == as_winner(FAST)
    nothing = outcome({}, {DEFAULT: "run", FAST: "compile"}, (DEFAULT, FAST))
    assert nothing.entry is None and len(nothing.discarded) == 2


def two_problems() -> list[Problem]:
    return problems_of([norm_call(9), norm_call(10)], INTERPRETED)


def only(*choices: Any) -> Callable[..., list[Any]]:
    return lambda problem, *, with_pytorch, wide: [problem.default, *choices]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_bench.tuning.candidates", only(FAST))


def test_every_problem_is_saved_as_soon_as_it_is_measured_and_known_to_the_next(few):
    saved: list[Tuned] = []
    bench = Workbench({FAST: 0.5})
    done = tune(two_problems(), EMPTY, bench.bench, saved.append)
    assert [len(table.entries) for table in saved] == [1, 2] and done is saved[-1]
    assert [len(table.entries) for table in bench.tables] == [0, 1]


def test_an_interruption_keeps_what_was_measured_and_resuming_measures_the_rest(few, tmp_path):
    save = functools.partial(write_tuned, tmp_path / "tuned.json")
    first, second = two_problems()
    bench = Workbench({FAST: 0.5})

    def interrupted(problem: Problem, choices: Sequence[Any]) -> list[list[float] | str]:
        if problem.fields == second.fields:
            raise KeyboardInterrupt
        return bench.time(problem, choices)

    with pytest.raises(KeyboardInterrupt):
        tune([first, second], EMPTY, replace(bench.bench, time=interrupted), save)
    kept = read_tuned(tmp_path / "tuned.json")
    assert [entry.problem for entry in kept.entries] == [first.fields]
    watch, again = Watch(), Workbench({FAST: 0.5})
    tune([first, second], kept, again.bench, save, progress=watch)
    assert watch.seen == [(second.fields, 1, 1), second.fields]
    assert [entry.problem for entry in read_tuned(tmp_path / "tuned.json").entries] == [first.fields, second.fields]


class Watch:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def started(self, problem: Problem, number: int, count: int) -> None:
        self.seen.append((problem.fields, number, count))

    def done(self, outcome: Outcome) -> None:
        self.seen.append(outcome.problem.fields)


def test_what_left_the_gpu_unusable_is_remembered_and_not_tried_again(few, tmp_path):
    save = functools.partial(write_tuned, tmp_path / "tuned.json")
    with pytest.raises(GpuLostError):
        tune([PROBLEM], EMPTY, Workbench({}, {FAST: "lost"}).bench, save)
    kept, again = read_tuned(tmp_path / "tuned.json"), Workbench({FAST: 0.1})
    assert kept.entries == ()
    done = tune([PROBLEM], kept, again.bench, save)
    assert FAST not in again.ran and done.entries[0].winner == as_winner(DEFAULT)
    assert done.entries[0].measured["discarded"] == {title(FAST): "an illegal address"}


def test_the_file_of_a_run_is_followed_by_the_launches(few, tmp_path, launches):
    tune([PROBLEM], EMPTY, Workbench({FAST: 0.5}).bench, functools.partial(write_tuned, tmp_path / "tuned.json"))
    use_tuned(tmp_path / "tuned.json")
    for rows, expected in ((9, FAST), (10, DEFAULT)):
        launches.clear()
        vit_kernels.layer_norm(DRAW.rows(rows, 20), DRAW.gamma(20), DRAW.bias(20))
        (launch,) = launches
        assert (launch.constants["BLOCK_M"], launch.constants["num_warps"]) == (expected.block_m, expected.num_warps)


def again(kernel: str, run: Any) -> LauncherCall:
    """The launcher call that a `functools.partial` would make."""
    return taken_apart(kernel, "again", run.args, run.keywords)


def small(kernel: str) -> Problem:
    return next(p for p in problems_of(list(preset_calls(SMALL, [1], torch.float16)), H100) if p.kernel == kernel)


@pytest.mark.parametrize("kernel", ["linear", "attention", "mlp", "patch_embed", "row_stats", "layer_norm"])
def test_candidates_are_the_tables_the_modelled_choice_first_and_pytorch(kernel):
    problem = small(kernel)
    found = candidates(problem)
    assert found[0] == problem.default and len(found) == len(set(found)) > 3
    assert len({title(choice) for choice in found}) == len(found), "titles tell candidates apart"
    assert (tiles.TORCH in found) == (kernel in ("linear", "attention", "layer_norm"))
    assert (None in found) == (kernel == "mlp")
    assert tiles.TORCH not in candidates(problem, with_pytorch=False)
    wide = candidates(problem, wide=True)
    assert (
        wide[0] == problem.default and set(found) <= set(wide) and len({title(choice) for choice in wide}) == len(wide)
    )
    assert (len(wide) > 2 * len(found)) == (kernel in ("linear", "attention", "mlp", "patch_embed"))


def test_tiles_that_the_model_cannot_tell_from_others_are_measured():
    assert set(gemm_tiles.TO_MEASURE) <= set(candidates(small("linear")))
    chosen = {
        gemm_tiles.choose_gemm(197 * batch, n, k, 2, H100, described=described)
        for batch in (1, 8, 64, 256) for n, k in ((768, 768), (3072, 768), (768, 3072)) for described in (True, False)
    }  # fmt: skip
    assert len(chosen) > 2 and not chosen & set(gemm_tiles.TO_MEASURE)


def test_tiles_that_share_out_k_are_measured_with_as_many_parts_as_the_gpu_has_room_for():
    """fc2 of ViT-B at batch 1, 48 steps: 24 tiles leave room for 5 parts, 48 for 2."""
    x, weight = DRAW.normal(197, 3072), DRAW.normal(768, 3072)
    for device, parts in ((H100, {(64, 128): 5, (64, 64): 2}), (A100, {(64, 128): 4, (64, 64): 2})):
        (problem,) = problems_of([taken_apart("linear", "", [x, weight], {})], device)
        shared = [tile for tile in candidates(problem) if getattr(tile, "parts", 1) > 1]
        assert {(tile.block_m, tile.block_n): tile.parts for tile in shared}.items() >= parts.items()
        assert len(shared) == len(gemm_tiles.SHARED_TILES), "those of other GPUs, too, which are refused there"
    (short,) = problems_of([taken_apart("linear", "", [x[:, :768], weight[:, :768].contiguous()], {})], H100)
    assert not [tile for tile in candidates(short) if getattr(tile, "parts", 1) > 1]


def test_neighbours_differ_in_one_field_and_none_is_impossible():
    tile = gemm_tiles.GemmTile(16, 64, 32, 1, 1, chunk=64)
    near = list(tuning_candidates._near(tile))
    differences = [{k: v for k, v in vars(other).items() if v != getattr(tile, k)} for other in near]
    assert {"num_stages": 2} in differences and {"num_warps": 2} in differences and {"tma": 2} in differences
    assert all(len(difference) <= 1 for difference in differences)
    assert {"num_stages": 0} not in differences and {"num_warps": 0} not in differences
    whole = [tile for tile in candidates(small("attention"), wide=True) if getattr(tile, "whole", 0)]
    assert sorted(tile.whole for tile in whole) == [1, 2, 4], "what is whole has no neighbours"


@pytest.mark.parametrize(("device", "width", "may"), [(B200, 72, False), (B200, 64, True), (H100, 72, True)])
def test_where_values_might_be_read_too_soon_two_stages_are_no_candidate(device, width, may):
    q = DRAW.normal(1, 300, 2, width)
    (problem,) = problems_of([taken_apart("attention", "", [q, q, q], {})], device)
    for wide in (False, True):
        stages = {tile.num_stages for tile in candidates(problem, wide=wide, with_pytorch=False) if tile.block_m >= 64}
        assert stages >= {3} and (2 in stages) == may


def test_pytorchs_attention_is_no_candidate_where_it_computes_something_else():
    q = DRAW.normal(1, 9, 2, 32)
    for options, possible in (
        ({}, True),
        ({"return_lse": True}, False),
        ({"mask": torch.ones(9, dtype=torch.bool)}, False),
    ):
        (problem,) = problems_of([taken_apart("attention", "", [q, q, q], options)], H100)
        assert (tiles.TORCH in candidates(problem)) == possible


def test_tiles_of_heads_are_candidates():
    call = heads_call(HEADS[0], 1, torch.float16)
    (problem,) = problems_of([again("qk_rope", call.run)], H100)
    default, *others = candidates(problem)
    assert default == problem.default and {choice.heads for choice in others} == {1, 2, 4, 8}


@pytest.mark.parametrize("kernel", ["linear", "attention"])
def test_the_model_orders_candidates(kernel):
    problem = small(kernel)
    ordered = by_model(problem, candidates(problem), H100)
    cycles = [modelled_cycles(problem, choice, H100) for choice in ordered[1:]]
    assert ordered[0] == problem.default and ordered[-1] is tiles.TORCH and cycles[-1] is None
    known = [value for value in cycles if value is not None]
    assert known == sorted(known) and len(known) > 2 and cycles[: len(known)] == known
    assert modelled_cycles(small("layer_norm"), DEFAULT, H100) is None


def test_every_launcher_call_of_a_preset_is_a_problem_whose_case_holds():
    """With the same shapes, strides and options: a problem asked by its case is the problem itself."""
    calls = list(preset_calls(SMALL, [1], torch.float16))
    problems = problems_of(calls, INTERPRETED)
    assert {p.kernel for p in problems} == {c.kernel for c in model_calls(SMALL, 1, torch.float16)}
    for problem in problems:
        prepared = prepare(problem.case(), torch.float16, "cpu")
        assert verified(prepared, problem.default)
        (again,) = problems_of(
            [taken_apart(problem.kernel, "", prepared.call.args, prepared.call.keywords)], INTERPRETED
        )[-1:]  # type: ignore[attr-defined]
        assert again.fields == problem.fields
