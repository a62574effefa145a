"""The tuner: of all that may serve a problem, the fastest that was found right on this GPU.

A candidate is compiled before it runs, runs against the float64 reference before it is timed, and is out as soon as it
fails at either: a wrong kernel cannot win, however fast it is. Those left are timed in turns. The modelled choice stays
unless another is faster beyond the noise.

Compiling, running and timing are given as functions (`Bench`), so that all of this can be tested without a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vit_bench.tuning_candidates import as_winner, candidates, reason, title
from vit_bench.tuning_problems import Problem
from vit_kernels.tuned import Entry, Tuned


class GpuLostError(RuntimeError):
    """A candidate has left the GPU unusable for this process; the message names it."""


@dataclass(frozen=True)
class Spread:
    """Microseconds of one candidate: the 20th percentile, the median and the 80th percentile."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        cuts = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(1e6 * cuts[1], 1e6 * statistics.median(seconds), 1e6 * cuts[7])

    def as_json(self) -> list[float]:
        return [round(value, 2) for value in (self.p20, self.median, self.p80)]


def beats(a: Spread, b: Spread) -> bool:
    """Faster beyond the noise: four of five timings of one are below four of five of the other."""
    return a.p80 < b.p20


@dataclass(frozen=True)
class Bench:
    """What the tuner does with candidates, given from outside.

    compile: "" for a candidate whose kernels may run, or what is wrong with them. verify: runs it once against the
    reference; figures of its error, or AssertionError (wrong) or any other exception (failed); GpuLostError where
    nothing can run any more. time: seconds of several runs each of all candidates, in turns, in their order, or why one
    could not be timed.
    use: from now on the tile choice knows what was measured so far.
    """

    compile: Callable[[Problem, Any], str]
    verify: Callable[[Problem, Any], dict[str, Any]]
    time: Callable[[Problem, Sequence[Any]], Sequence[list[float] | str]]
    use: Callable[[Tuned], None]


@dataclass
class Outcome:
    """What came of one problem. entry: None where no candidate was right; discarded: candidate and reason."""

    problem: Problem
    entry: Entry | None
    discarded: list[tuple[Any, str]] = field(default_factory=list)
    times: dict[Any, Spread] = field(default_factory=dict)


def choose(times: Mapping[Any, Spread], default: Any) -> Any:
    """The fastest by its median, but the default where that is not faster beyond the noise."""
    fastest = min(times, key=lambda choice: times[choice].median)
    if default in times and not beats(times[fastest], times[default]):
        return default
    return fastest


def tune_problem(problem: Problem, choices: Sequence[Any], bench: Bench, known: Mapping[str, str]) -> Outcome:
    """Compiles, runs, times and chooses. known: titles of candidates that are not to be tried again, and why."""
    outcome, errors = Outcome(problem, None), {}
    for choice in choices:
        if title(choice) in known:
            outcome.discarded.append((choice, known[title(choice)]))
            continue
        try:
            if unfit := bench.compile(problem, choice):
                outcome.discarded.append((choice, unfit))
                continue
            errors[choice] = bench.verify(problem, choice)
        except GpuLostError:
            raise
        except Exception as error:  # a candidate that fails is no reason to end
            outcome.discarded.append((choice, reason(error)))
    right = list(errors)
    for choice, found in zip(right, bench.time(problem, right) if right else [], strict=True):
        if isinstance(found, str):
            outcome.discarded.append((choice, found))
        else:
            outcome.times[choice] = Spread.of(found)
    while outcome.times and outcome.entry is None:
        winner = choose(outcome.times, problem.default)
        try:
            # Once more, now that it has run many times: a race need not show the first time.
            errors[winner] = bench.verify(problem, winner)
        except GpuLostError:
            raise
        except Exception as error:
            del outcome.times[winner]
            outcome.discarded.append((winner, f"right at first, but not after it had been timed: {reason(error)}"))
        else:
            outcome.entry = Entry(problem.fields, as_winner(winner), _measured(outcome, winner, errors[winner]))
    return outcome


def _measured(outcome: Outcome, winner: Any, error: dict[str, Any]) -> dict[str, Any]:
    others = sorted((c for c in outcome.times if c != winner), key=lambda choice: outcome.times[choice].median)
    return {
        "unit": "us: p20, median, p80",
        "times": {title(choice): outcome.times[choice].as_json() for choice in (winner, *others)},
        "default": title(outcome.problem.default),
        "runner_up": title(others[0]) if others else None,
        "error": error,
        "discarded": {title(choice): why for choice, why in outcome.discarded},
        "labels": outcome.problem.labels,
    }


class Watcher(Protocol):
    """What is told of the progress: a problem begins, its number and how many there are; what came of it."""

    def started(self, problem: Problem, number: int, count: int) -> None: ...

    def done(self, outcome: Outcome) -> None: ...


def tune(
    problems: Iterable[Problem],
    table: Tuned,
    bench: Bench,
    save: Callable[[Tuned], None],
    *,
    with_pytorch: bool = True,
    wide: bool = False,
    progress: Watcher | None = None,
) -> Tuned:
    """Tunes every problem that the table has no entry for yet; the table with all entries.

    save is called after each problem, so an interruption loses one problem at most; KeyboardInterrupt goes through.
    with_pytorch, wide: see `candidates`.
    """
    waiting = [problem for problem in problems if table.entry(problem.fields) is None]
    for number, problem in enumerate(waiting, 1):
        if progress is not None:
            progress.started(problem, number, len(waiting))
        bench.use(table)
        choices = candidates(problem, with_pytorch=with_pytorch, wide=wide)
        try:
            outcome = tune_problem(problem, choices, bench, table.lost_of(problem.fields))
        except GpuLostError as error:
            save(table.without(problem.fields, *error.args[1:]))
            raise
        if outcome.entry is not None:
            table = table.extended(outcome.entry)
            save(table)
        if progress is not None:
            progress.done(outcome)
    return table
