"""``vit-engine verify --full``: options, exit codes, and a report that survives kernels, Ctrl-C and broken drivers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.rung import RUNG, child_environment
from vit_bench.records import KERNELS
from vit_engine.cli.app import app

pytestmark = pytest.mark.skipif(RUNG == "sanitized", reason="verify itself decides where kernels run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--report", "r.json"], ("--report", "needs --full")),
        (["--only", "cases/*"], ("--only", "needs --full")),
        (["--list"], ("--list", "needs --full")),
        (["--full", "--model", "vit_tiny_patch16_224"], ("--model", "cannot be combined with --full")),
        (["--full", "--kernel", "mlp"], ("--kernel", "cannot be combined with --full")),
        (["--full", "--dtype", "fp16"], ("--dtype", "cannot be combined with --full")),
        (["--full", "--json"], ("--json", "cannot be combined with --full")),
        (["--full", "--report", "r.txt"], ("--report", "must end in .json")),
        (["--full", "--report", "missing/r.json"], ("--report", "does not exist")),
        (["--full", "--only", "softmax/*"], ("--only", "no check matches", "softmax/*")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_ends_before_anything_runs(
    arguments: list[str], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vit_bench.full import environment, runner

    def never(*arguments: object, **options: object) -> Any:
        raise RuntimeError("something was run")

    monkeypatch.setattr(environment, "examine", never)
    monkeypatch.setattr(runner, "run_all", never)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["verify", *arguments])
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


# A machine with one H100 that is not there, and children that do what their check's name says.
STUBBED = """
import json, os, signal, sys
from pathlib import Path
# Ignored where the tests themselves run in a shell's background.
signal.signal(signal.SIGINT, signal.default_int_handler)
from vit_bench.full import checks, environment, runner
from vit_engine.cli import verify_full

BEHAVIOUR = json.loads(sys.argv[3])
CHILD = '''
import json, os, signal, sys, time
events, behaviour = sys.argv[1:3]
def note(**event):
    with open(events, "a") as file:
        file.write(json.dumps(event) + chr(10))
note(event="plan", parts=["only"])
note(event="start", part=0)
print("hello from", os.getpid(), flush=True)
if behaviour == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if behaviour == "hang":
    time.sleep(30)
status = "failed" if behaviour == "fail" else "passed"
note(event="end", part=0, status=status, reason="wrong" * (status == "failed"), figures={}, seconds=0.0)
note(event="done")
'''

def command(check, events, start):
    return [sys.executable, "-S", "-c", CHILD, str(events), BEHAVIOUR.get(check.name, "pass")]

gpu = {"index": 0, "name": "FAKE H100", "capability": "9.0", "multiprocessors": 132, "memory_gib": 79.1,
       "refused": None}
facts = checks.Facts("FAKE H100", "", triton=True, timm=True, sanitizer=None)
described = {"gpu": gpu, "gpus": [gpu], "cuda": {}, "versions": {}, "python": "3", "system": "s", "processor": "p",
             "cores": 1, "compute_sanitizer": None, "kernel_sources": {}, "git": None}
environment.examine = lambda: (facts, described, runner.Outcome("gpu", "executed", "passed"))
run_all = runner.run_all
runner.run_all = lambda chosen: run_all(chosen, command=command)
code = verify_full.full_command(Path(sys.argv[1]) if sys.argv[1] else None, json.loads(sys.argv[2]), False)
assert "torch" not in sys.modules and "triton" not in sys.modules
sys.exit(code)
"""


def stubbed(path: Path | str, only: list[str], **behaviour: str) -> list[str]:
    named = {name.replace("__", "/"): how for name, how in behaviour.items()}
    return [sys.executable, "-c", STUBBED, str(path), json.dumps(only), json.dumps(named)]


def run(path: Path | str, only: list[str], **behaviour: str) -> tuple[int, str]:
    done = subprocess.run(
        stubbed(path, only, **behaviour), capture_output=True, text=True, timeout=120, env=child_environment()
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_a_crash_and_a_failure_cost_themselves_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    count = 3 * len(KERNELS)
    code, output = run(path, ["cases/*"], cases__attention__fp16="crash", cases__mlp__bf16="fail")
    assert code == 1
    report = json.loads(path.read_text())
    assert report["complete"] and report["verdict"] == "failed" and report["only"] == ["cases/*"]
    assert report["summary"] == {"passed": count - 1, "failed": 1, "timed out": 0, "crashed": 1, "not run": 0}
    by_name = {check["name"]: check for check in report["checks"]}
    assert by_name["cases/attention/fp16"]["reason"] == "only: ended by signal 11 (SIGSEGV)"
    assert "hello from" in by_name["cases/attention/fp16"]["output"] and not by_name["cases/mlp/fp16"]["output"]
    assert f"[5/{count}] cases/attention/fp16" in output and f"/{count}] cases/mlp/bf16" in output
    assert f"{count - 1} passed, 1 failed, 1 crashed" in output and str(path) in output
    assert "FAKE H100" in (tmp_path / "r.html").read_text()


def test_a_model_whose_logits_are_wrong_is_not_timed(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    timed = {"throughput/vit_tiny_patch16_224/b1", "throughput/vit_small_patch16_224/b1"}
    code, _ = run(path, ["throughput/*/b1"], timm__vit_tiny_patch16_224__bf16="fail")
    assert code == 1
    found = {
        c["name"]: (c["status"], c["reason"]) for c in json.loads(path.read_text())["checks"] if c["name"] in timed
    }
    assert found["throughput/vit_small_patch16_224/b1"][0] == "passed"
    assert found["throughput/vit_tiny_patch16_224/b1"] == (
        "not run",
        "needs timm/vit_tiny_patch16_224/bf16, which is 'failed'",
    )


def test_not_run_is_neither_a_pass_nor_a_failure() -> None:
    code, output = run("", ["memcheck/*", "graph/*tiny*"])
    assert code == 0
    assert f"2 passed, {len(KERNELS)} not run" in output and "--report FILE.json" in output
    assert output.count("compute-sanitizer is neither on PATH nor in $CUDA_HOME/bin") == len(KERNELS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "SIGTERM", "SIGHUP"])
def test_an_interrupted_run_keeps_what_was_done(tmp_path: Path, number: int) -> None:
    path = tmp_path / "r.json"
    command = stubbed(path, ["cases/linear/*"], cases__linear__fp16="hang")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment()) as process:
        wait_until(lambda: path.is_file() and statuses(path).get("cases/linear/fp32") == "passed")
        time.sleep(0.3)  # the child that hangs has been started, or is about to be
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    report = json.loads(path.read_text())
    assert report["complete"] is False and report["ended"] is None
    assert statuses(path) == {
        "gpu": "passed",
        "cases/linear/fp32": "passed",
        "cases/linear/fp16": "not run",
        "cases/linear/bf16": "not run",
    }
    assert "interrupted; 2 passed, 2 not run" in output
    assert "Incomplete" in path.with_suffix(".html").read_text()


def test_a_run_that_is_killed_leaves_a_valid_report(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    command = stubbed(path, ["cases/linear/*"], cases__linear__fp16="hang")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment()) as process:
        wait_until(lambda: path.is_file() and statuses(path).get("cases/linear/fp32") == "passed")
        process.kill()
        process.communicate(timeout=60)
    report = json.loads(path.read_text())
    assert report["complete"] is False and report["summary"]["passed"] == 2


def wait_until(true: Any) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("waited for half a minute")


def statuses(path: Path) -> dict[str, str]:
    return {check["name"]: check["status"] for check in json.loads(path.read_text())["checks"]}


@pytest.mark.interpreted_only
def test_the_real_command_on_a_machine_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    command = [sys.executable, "-m", "vit_engine.cli", "verify", "--full", "--report", str(path)]
    done = subprocess.run(
        [*command, "--only", "cases/row_stats/?p32", "--only", "cases/row_stats/bf16", "--only", "graph/*tiny*"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**child_environment(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert report["summary"] == {"passed": 1, "failed": 0, "timed out": 0, "crashed": 0, "not run": 3}
    by_name = {check["name"]: check for check in report["checks"]}
    run = by_name["cases/row_stats/fp32"]
    assert run["status"] == "passed" and run["rung"] == "interpreted" and len(run["parts"]) == 3
    assert by_name["gpu"]["reason"] == by_name["graph/vit_tiny_patch16_224/bf16"]["reason"]
    assert "no NVIDIA GPU" in by_name["gpu"]["reason"] and "bfloat16" in by_name["cases/row_stats/bf16"]["reason"]
    assert set(report["environment"]["versions"]) >= {"torch", "triton", "timm", "python"}
    assert "interpreted" in path.with_suffix(".html").read_text()


def test_the_list_says_what_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_bench.full import checks, environment, runner

    facts = checks.Facts(None, "no NVIDIA GPU", triton=True, timm=False, sanitizer=None)
    monkeypatch.setattr(environment, "examine", lambda: (facts, {}, runner.Outcome("gpu", "executed", "not run")))
    result = CliRunner().invoke(app, ["verify", "--full", "--list", "--only", "cases/mlp/*", "--only", "torch/*"])
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.output.splitlines()]
    assert [name for name, _ in lines] == [
        *(f"cases/mlp/{dtype}" for dtype in ("fp32", "fp16", "bf16")),
        *(f"torch/{model}/fp32" for model in ("vit_tiny_patch16_224", "vit_small_patch16_224")),
    ]
    assert lines[0][1] == "interpreted" and lines[2][1].startswith("not run: Triton's interpreter")
    assert "not run: timm is not installed" in lines[3][1]


def test_help_names_the_options() -> None:
    text = CliRunner().invoke(app, ["verify", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--full", "--report", "--only", "--list"):
        assert option in text
