"""The runner against processes that crash, hang, print nonsense or lie: each costs its own check and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vit_bench.full.checks import EXECUTED, INTERPRETED, TOOL_FOUND_ERRORS, Check
from vit_bench.full.runner import Command, Outcome, command, environment, run_all, run_check, run_program

PRELUDE = """
import json, os, signal, sys, time
events, start = sys.argv[1], int(sys.argv[2])
def note(**event):
    with open(events, "a") as file:
        file.write(json.dumps(event) + "\\n")
def plan(*names):
    note(event="plan", parts=list(names))
def begin(part):
    note(event="start", part=part)
def end(part, status="passed", reason="", figures={}):
    note(event="end", part=part, status=status, reason=reason, figures=figures, seconds=0.1)
def part(number, **result):
    begin(number)
    end(number, **result)
"""


def stub(body: str) -> Command:
    """A command that runs `body` in place of a check; it has the events' file, the first part's number and helpers."""
    program = PRELUDE + textwrap.dedent(body)
    return lambda check, events, start: [sys.executable, "-S", "-c", program, str(events), str(start)]


def run(body: str, *, timeout: int = 60, wrapper: tuple[str, ...] = ()) -> Outcome:
    return run_check(Check("kind/one/two", EXECUTED, timeout, wrapper), stub(body))


def statuses(outcome: Outcome) -> list[str]:
    return [part["status"] for part in outcome.parts]


def test_parts_that_pass() -> None:
    outcome = run("plan('a', 'b'); part(0, figures={'row': 0.5}); part(1); note(event='done'); print('chatter')")
    assert (outcome.status, outcome.reason, outcome.output, outcome.processes) == ("passed", "", "", 1)
    assert outcome.parts[0] == {"name": "a", "status": "passed", "reason": "", "figures": {"row": 0.5}, "seconds": 0.1}
    assert 0 < outcome.seconds < 30


@pytest.mark.parametrize("status", [0, 1])
def test_a_part_that_fails_fails_the_check_and_keeps_its_output(status: int) -> None:
    outcome = run(
        "plan('a', 'b'); part(0, status='failed', reason='error 2 is over 1'); part(1); note(event='done')\n"
        f"print('why'); sys.exit({status})"
    )
    assert (outcome.status, outcome.reason, outcome.output) == ("failed", "a: error 2 is over 1", "why")
    assert statuses(outcome) == ["failed", "passed"]


def test_a_segmentation_fault_costs_its_part_and_the_next_process_goes_on_behind_it() -> None:
    outcome = run(
        """
        plan("a", "b", "c")
        for number in range(start, 3):
            begin(number)
            if number == 1:
                print("about to read address 0", flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            end(number)
        note(event="done")
        """
    )
    assert (outcome.status, outcome.reason) == ("crashed", "b: ended by signal 11 (SIGSEGV)")
    assert [(part["name"], part["status"]) for part in outcome.parts] == [
        ("a", "passed"),
        ("b", "crashed"),
        ("c", "passed"),
    ]
    assert outcome.processes == 2 and "about to read address 0" in outcome.output


def test_a_lost_gpu_ends_the_process_behind_its_part() -> None:
    outcome = run(
        """
        plan("a", "b")
        part(start, status=("crashed", "passed")[start], reason=("an illegal memory access", "")[start])
        if start == 0:
            sys.exit(3)
        note(event="done")
        """
    )
    assert (outcome.status, outcome.reason) == ("crashed", "a: an illegal memory access")
    assert statuses(outcome) == ["crashed", "passed"]


def test_a_process_that_always_crashes_is_not_started_for_ever() -> None:
    outcome = run("plan(*map(str, range(50))); begin(start); os._exit(1)")
    assert outcome.status == "crashed" and outcome.processes == 12
    assert statuses(outcome) == ["crashed"] * 12 + ["not run"] * 38
    assert "the check ended before it: ended with exit status 1" in outcome.parts[-1]["reason"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit(7)", "ended with exit status 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9 (SIGKILL)"),
        ("print('{}')", "ended with exit status 0, but before its work was done"),
        ("plan('a'); begin(0)", "a: ended with exit status 0, but before its work was done"),
        ("plan('a'); part(0); sys.exit(1)", "ended with exit status 1"),
        ("plan('a'); part(0); note(event='done'); sys.exit(1)", "ended with exit status 1"),
        ("plan('a'); part(0, status='failed'); sys.exit(1)", "ended with exit status 1"),
        ("plan('a'); part(0); open(events, 'a').write('[]\\n%%\\n'); note(event='done')", "notes that cannot be read"),
        ("plan('a'); part(5); note(event='done')", "notes that cannot be read"),
        ("note(event='end', part=0)", "notes that cannot be read"),
    ],
    ids=[
        "before its plan",
        "killed",
        "silent",
        "unfinished",
        "at its end",
        "behind its end",
        "failed, at its end",
        "garbage",
        "no such part",
        "no plan",
    ],
)
def test_a_process_that_does_not_do_its_work_has_crashed(body: str, reason: str) -> None:
    outcome = run(body)
    assert outcome.status == "crashed" and reason in outcome.reason
    assert outcome.processes == 1


def test_a_line_cut_off_by_a_crash_is_left_out() -> None:
    outcome = run(
        "plan('a', 'b')\nif start: part(1); note(event='done')\n"
        "else: part(0); begin(1); open(events, 'a').write('{\"event\": \"en'); os._exit(1)"
    )
    assert statuses(outcome) == ["passed", "crashed"]


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    begin = time.monotonic()
    outcome = run(
        f"""
        import subprocess
        plan("a", "b", "c")
        part(0)
        begin(1)
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        open({str(pid)!r}, "w").write(str(child.pid))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("waiting", flush=True)
        time.sleep(600)
        """,
        timeout=3,
    )
    assert time.monotonic() - begin < 30
    assert (outcome.status, outcome.reason) == ("timed out", "b: stopped after 3 s")
    assert statuses(outcome) == ["passed", "timed out", "not run"] and outcome.output == "waiting"
    assert outcome.processes == 1
    for _ in range(100):
        if not alive(int(pid.read_text())):
            break
        time.sleep(0.05)
    assert not alive(int(pid.read_text()))


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_nonsense_in_the_output_harms_nothing() -> None:
    outcome = run(
        "os.write(1, bytes(range(256)) * 400); os.write(1, b'\\nlast line\\n'); plan('a');"
        " part(0, status='failed', reason='x'); note(event='done')"
    )
    assert outcome.status == "failed" and outcome.output.endswith("\nlast line")
    assert len(outcome.output) <= 12_000 and "\x00" not in outcome.output and "\x1b" not in outcome.output
    json.dumps(outcome.output)


def test_of_an_endless_output_the_end_alone_is_read() -> None:
    begin = time.monotonic()
    outcome = run("os.truncate(1, 2**28); os.lseek(1, 0, os.SEEK_END); os.write(1, b'\\nlast line\\n'); sys.exit(1)")
    assert outcome.output.endswith("\nlast line") and len(outcome.output) <= 12_000
    assert time.monotonic() - begin < 10  # going through all of it takes minutes


def test_a_check_that_compared_nothing_has_not_passed() -> None:
    assert run("plan(); note(event='done')").status == "failed"
    outcome = run("plan('a'); part(0, status='not run', reason='too little memory'); note(event='done')")
    assert (outcome.status, outcome.reason) == ("not run", "too little memory")
    outcome = run("plan('a', 'b'); part(0, status='not run', reason='x'); part(1); note(event='done')")
    assert (outcome.status, outcome.reason) == ("passed", "")


def test_what_the_sanitizer_finds_fails_the_check_although_every_part_passed() -> None:
    wrapper = ("compute-sanitizer", "--tool", "memcheck")
    body = f"plan('a'); part(0); note(event='done'); print('Invalid __global__ read'); sys.exit({TOOL_FOUND_ERRORS})"
    outcome = run(body, wrapper=wrapper)
    assert (outcome.status, outcome.reason) == ("failed", "--tool memcheck: compute-sanitizer found errors")
    assert outcome.output == "Invalid __global__ read"
    assert run(body).status == "crashed"


def test_a_program_that_is_missing_is_reported() -> None:
    check = Check("memcheck/linear/fp16", EXECUTED, 60, ("/nowhere/compute-sanitizer", "--tool", "memcheck"))
    outcome = run_check(check)
    assert (outcome.status, outcome.reason) == ("crashed", "ended with exit status 127")
    assert "/nowhere/compute-sanitizer" in outcome.output


def test_requirements_decide_whether_a_check_runs() -> None:
    checks = [
        Check("good", EXECUTED, 60),
        Check("bad", EXECUTED, 60),
        Check("absent", EXECUTED, 60, not_run="no NVIDIA GPU"),
        Check("timed", EXECUTED, 60, requires=("good",)),
        Check("spared", EXECUTED, 60, requires=("good", "bad", "absent")),
        Check("odd", EXECUTED, 60, requires=("never listed",)),
    ]
    started = []

    def one(check: Check, events: Path, start: int) -> list[str]:
        started.append(check.name)
        status = "failed" if check.name == "bad" else "passed"
        return stub(f"plan('a'); part(0, status={status!r}); note(event='done')")(check, events, start)

    outcomes = {outcome.name: outcome for outcome in run_all(checks, command=one)}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "good": "passed",
        "bad": "failed",
        "absent": "not run",
        "timed": "passed",
        "spared": "not run",
        "odd": "not run",
    }
    assert started == ["good", "bad", "timed"]
    assert outcomes["spared"].reason == "needs bad, which is 'failed', and 1 more"
    assert outcomes["absent"].reason == "no NVIDIA GPU"
    assert "needs never listed" in outcomes["odd"].reason


def test_the_interpreter_is_asked_for_where_it_is_meant_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in environment(Check("a", EXECUTED, 1))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert environment(Check("a", INTERPRETED, 1))["TRITON_INTERPRET"] == "1"
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in environment(Check("a", EXECUTED, 1))
    assert environment(Check("a", EXECUTED, 1, ("tool",)))["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_the_command_line_of_a_check() -> None:
    words = command(Check("cases/mlp/fp16", EXECUTED, 1, ("tool", "--flag")), Path("/x/events"), 3)
    assert words[:3] == ["tool", "--flag", sys.executable]
    assert words[3:6] == ["-m", "vit_bench.full.child", "cases/mlp/fp16"]
    assert words[6:] == ["--events", "/x/events", "--start", "3"]


def test_any_program_can_be_run_within_a_time() -> None:
    check = Check("gpu", EXECUTED, 60)
    assert run_program(check, [sys.executable, "-S", "-c", "print('fine')"]) == (None, "fine")
    ended, _ = run_program(check, [sys.executable, "-S", "-c", "import os; os.abort()"])
    assert ended == ("crashed", "ended by signal 6 (SIGABRT)")
    hangs = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    assert run_program(Check("gpu", EXECUTED, 1), hangs)[0] == ("timed out", "stopped after 1 s")


def test_the_parent_never_imports_torch() -> None:
    program = """
        import sys
        import vit_bench.full.checks, vit_bench.full.environment, vit_bench.full.report, vit_bench.full.runner
        import vit_engine.cli.verify_full
        print([name for name in ("torch", "triton", "vit_kernels", "numpy") if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout == "[]\n", done.stderr
