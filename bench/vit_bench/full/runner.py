"""Runs checks one after the other, each in a process of its own, and says how each of them ended.

Nothing here imports torch or touches a GPU: a kernel that crashes, hangs or prints nonsense takes its own process down
and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vit_bench.full.checks import INTERPRETED, PARTS_FAILED, TOOL_FOUND_ERRORS, Check

PASSED, FAILED, CRASHED, TIMED_OUT, NOT_RUN = "passed", "failed", "crashed", "timed out", "not run"
BAD = (CRASHED, TIMED_OUT, FAILED)  # the worst first
STATUSES = (PASSED, *reversed(BAD), NOT_RUN)
MOST_PROCESSES = 12  # for one check: how often it may crash and go on behind the part that crashed
OUTPUT_LINES, OUTPUT_BYTES = 60, 12_000

PART_KEYS = ("status", "reason", "figures", "seconds")

Command = Callable[[Check, Path, int], list[str]]


@dataclass
class Outcome:
    """How a check ended. parts: dicts with name, status, reason, figures, seconds; output: last lines of the processes
    that did not end well."""

    name: str
    rung: str
    status: str
    reason: str = ""
    parts: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""
    seconds: float = 0.0
    processes: int = 0


def part(name: str, status: str, reason: str = "") -> dict[str, Any]:
    """A part of a check that has no figures."""
    return {"name": name, "status": status, "reason": reason, "figures": {}, "seconds": 0.0}


def command(check: Check, events: Path, start: int) -> list[str]:
    """The command line that runs a check from part number `start` on."""
    child = [sys.executable, "-m", "vit_bench.full.child", check.name, "--events", str(events), "--start", str(start)]
    return [*check.wrapper, *child]


def environment(check: Check) -> dict[str, str]:
    """The environment of a check's process."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found |= {
        # The child finds the modules that the parent found, and none that lies in the current folder by accident.
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a segmentation fault leaves a traceback in the output
        "PYTHONIOENCODING": "utf-8",
    }
    if check.rung == INTERPRETED:
        found["TRITON_INTERPRET"] = "1"
    if check.wrapper:
        # Every tensor then is an allocation of its own, with bounds that compute-sanitizer sees.
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return found


def run_all(
    checks: Sequence[Check], done: dict[str, Outcome] | None = None, command: Command = command
) -> Iterator[Outcome]:
    """The outcome of every check, in order; a check whose requirements have not passed is not run.

    done: outcomes from before that count as requirements; it is added to.
    """
    done = {} if done is None else done
    for check in checks:
        missing = [name for name in check.requires if name not in done or done[name].status != PASSED]
        if check.not_run:
            outcome = Outcome(check.name, check.rung, NOT_RUN, check.not_run)
        elif missing:
            state = done[missing[0]].status if missing[0] in done else NOT_RUN
            more = f", and {len(missing) - 1} more" if missing[1:] else ""
            reason = f"needs {missing[0]}, which is {state!r}{more}"
            outcome = Outcome(check.name, check.rung, NOT_RUN, reason)
        else:
            outcome = run_check(check, command)
        done[check.name] = outcome
        yield outcome


def run_check(check: Check, command: Command = command) -> Outcome:
    """Runs one check. A process that ends before its last part is followed by another one that starts behind the part
    which ended it, until the check's time is over."""
    outcome = Outcome(check.name, check.rung, PASSED)
    begin = time.monotonic()
    problems: list[tuple[str, str]] = []
    outputs: list[str] = []
    start, plan = 0, None
    with tempfile.TemporaryDirectory(prefix="vit-engine-verify-") as name:
        folder = Path(name)
        while outcome.processes < MOST_PROCESSES:
            outcome.processes += 1
            left = check.timeout - (time.monotonic() - begin)
            events, output = folder / f"events-{outcome.processes}", folder / "output"
            status = _wait(command(check, events, start), environment(check), folder, output, left)
            notes = _Notes(events)
            problem = _problem(check, status, notes)
            outcome.parts += notes.finished(problem)
            plan = plan if notes.plan is None else notes.plan
            reached, start = start, max(start, notes.next_part)
            if problem or any(part["status"] in BAD for part in outcome.parts[reached:]):
                outputs.append(_tail(output))
            if problem:
                problems.append(problem)
            if not problem or problem[0] == TIMED_OUT or plan is None or not reached < start < len(plan):
                break
        outcome.parts += _never_reached(plan, start, problems)
    outcome.seconds = round(time.monotonic() - begin, 2)
    outcome.status, outcome.reason = _verdict(outcome.parts, problems)
    outcome.output = "\n".join(filter(None, outputs))[-OUTPUT_BYTES:]
    return outcome


class _Notes:
    """What a process wrote into its file of events: a line that was cut off by its end is left out."""

    def __init__(self, path: Path) -> None:
        self.plan: list[str] | None = None
        self.started: int | None = None
        self.next_part = 0
        self.done = False
        self.garbled = False
        self._ended: list[dict[str, Any]] = []
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for line in text.split("\n")[:-1]:
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, KeyError, IndexError, AttributeError):
                self.garbled = True

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "plan":
            self.plan = event["parts"]
        elif kind == "done":
            self.done = True
        elif kind == "start":
            self.started = int(event["part"])
            self.next_part = self.started + 1
        else:
            self.started = None
            names = self.plan or []
            self._ended.append({"name": names[event["part"]], **{key: event[key] for key in PART_KEYS}})

    @property
    def failed(self) -> bool:
        """Whether a part ended so."""
        return any(ended["status"] == FAILED for ended in self._ended)

    def finished(self, problem: tuple[str, str] | None) -> list[dict[str, Any]]:
        """The parts that ended, and the one that was running when the process did."""
        if self.started is None or self.plan is None:
            return self._ended
        return [*self._ended, part(self.plan[self.started], *(problem or (CRASHED, "ended without a result")))]


def run_program(check: Check, command: list[str]) -> tuple[tuple[str, str] | None, str]:
    """Runs any command within the check's time: (None or status and reason where it ended badly, the end of what it
    printed)."""
    with tempfile.TemporaryDirectory(prefix="vit-engine-verify-") as name:
        output = Path(name) / "output"
        status = _wait(command, environment(check), Path(name), output, check.timeout)
        return _bad_end(check, status), _tail(output)


def _bad_end(check: Check, status: int | None) -> tuple[str, str] | None:
    """(status of the check, reason) for the exit status of a process, None where it is 0."""
    if status is None:
        return TIMED_OUT, f"stopped after {check.timeout} s"
    if status < 0:
        return CRASHED, f"ended by signal {-status} ({_signal_name(-status)})"
    if check.wrapper and status == TOOL_FOUND_ERRORS:
        return FAILED, f"{' '.join(check.wrapper[1:3])}: compute-sanitizer found errors"
    return (CRASHED, f"ended with exit status {status}") if status else None


def _problem(check: Check, status: int | None, notes: _Notes) -> tuple[str, str] | None:
    """(status of the check, reason) where a process did not end as it should; None where it did."""
    told = status == PARTS_FAILED and notes.done and notes.failed
    bad = None if told else _bad_end(check, status)
    if bad is not None:
        return bad
    if notes.garbled:
        return CRASHED, "wrote notes that cannot be read"
    return None if notes.done else (CRASHED, "ended with exit status 0, but before its work was done")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _never_reached(plan: list[str] | None, start: int, problems: list[tuple[str, str]]) -> list[dict[str, Any]]:
    reason = f"the check ended before it: {problems[-1][1]}" if problems else "the check ended before it"
    return [part(name, NOT_RUN, reason) for name in (plan or [])[start:]]


def _verdict(parts: list[dict[str, Any]], problems: list[tuple[str, str]]) -> tuple[str, str]:
    """The check's status, the worst that was seen, with its reason. A check that compared nothing has not passed."""
    seen = [*((part["status"], f"{part['name']}: {part['reason']}") for part in parts), *problems]
    for bad in BAD:
        reasons = [reason for status, reason in seen if status == bad]
        if reasons:
            return bad, reasons[0]
    if any(part["status"] == PASSED for part in parts):
        return PASSED, ""
    skipped = [part["reason"] for part in parts]
    return (NOT_RUN, skipped[0]) if skipped else (FAILED, "nothing was checked")


def _wait(command: list[str], environment: dict[str, str], folder: Path, output: Path, seconds: float) -> int | None:
    """The exit status of a process (negative: the signal that ended it), None if it took longer than `seconds`.

    Whatever it started ends with it. Raises nothing for a program that is missing: exit status 127, as a shell's.
    """
    with output.open("wb") as sink:
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                # A group of its own: Ctrl-C reaches the parent alone, which then ends all that the child started.
                start_new_session=True,
            )
        except OSError as error:
            sink.write(f"{error}\n".encode())
            return 127
        try:
            return process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # There is nothing left to kill where all of it has ended already.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(path: Path) -> str:
    """The last lines of what a process printed, whatever it printed."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - OUTPUT_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    printable = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "\n".join(printable.splitlines()[-OUTPUT_LINES:])
