"""Runs the default tests on a copy of the source tree, in a forked child that has not paid for its imports.

The parent imports what is slow and never changes (torch, Triton in interpreting mode, timm, ...), but nothing of this
project; each child puts the copy in front of its import path and of that of the processes its tests start. A child that
dies of a signal has caught its mutant: kernels with wrong offsets do that in the interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

PACKAGES = ("tests", "vit_kernels", "vit_engine", "vit_bench", "conftest")
HEAVY = (
    "torch", "torch.export", "triton.language", "numpy", "hypothesis", "timm", "transformers", "torchvision",
    "sklearn.datasets", "safetensors.torch", "PIL.Image", "typer.testing", "rich.console",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a run of the tests on one tree came to.

    verdict: "passed", or "caught" with "(crash)" or "(timeout)" behind it when no assertion did it; test: the node id
    that was running; how: the first line of its error; seconds: wall clock.
    """

    verdict: str
    test: str = ""
    how: str = ""
    seconds: float = 0.0
    passed: int = 0


class _Watch:
    """pytest plugin: puts the tests in order, notes the first failure and the running test, stops one that hangs."""

    def __init__(self, notes: Path, first: Sequence[str], limit: float) -> None:
        self.notes, self.first, self.limit = notes, first, limit
        self.state: dict[str, object] = {"running": "collection", "passed": 0}

    def write(self) -> None:
        self.notes.write_text(json.dumps(self.state))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def rank(item: pytest.Item) -> int:
            return next((i for i, start in enumerate(self.first) if item.nodeid.startswith(start)), len(self.first))

        items.sort(key=rank)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.state["running"] = nodeid
        self.write()
        # Python never regains control inside a loop of native code, so the default action, death, has to serve.
        signal.setitimer(signal.ITIMER_REAL, self.limit)

    def pytest_runtest_logfinish(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed(report)
        elif report.when == "call" and report.passed:
            self.state["passed"] = int(str(self.state["passed"])) + 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed(report)

    def _failed(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if "failed" not in self.state:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(report.longrepr) if crash is None else crash.message
            lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
            # A collection error ends with what was raised; a failed test begins with it.
            line = lines[0] if crash is not None else lines[-1]
            self.state |= {"failed": report.nodeid, "how": line[:200]}
            self.write()


def preload() -> None:
    """Imports, once for all children, what their tests would import. Kernels will be interpreted."""
    os.environ["TRITON_INTERPRET"] = "1"
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    loaded = {name.split(".")[0] for name in sys.modules} & {"vit_kernels", "vit_engine", "vit_bench"}
    if loaded:
        raise RuntimeError(f"the parent of the test runs has already imported {sorted(loaded)}: children would keep it")


class Run:
    """One run of pytest in a forked child on `tree`; poll() until there is an outcome."""

    def __init__(self, tree: Path, arguments: Sequence[str], *, first: Sequence[str] = (), limit: float = 300) -> None:
        """first: beginnings of node ids that run before the others, in this order; limit: seconds for one test."""
        self.tree = tree
        self.notes = tree.parent / f"{tree.name}.notes.json"
        self.log = tree.parent / f"{tree.name}.log"
        self.notes.unlink(missing_ok=True)
        self.begin = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(tree, list(arguments), _Watch(self.notes, first, limit), self.log)

    def stop(self) -> None:
        """Ends the run and what its tests started and did not live to stop."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def poll(self, block: bool = False) -> Outcome | None:
        pid, status = os.waitpid(self.pid, 0 if block else os.WNOHANG)
        if pid == 0:
            return None
        self.stop()
        seconds = round(time.monotonic() - self.begin, 1)
        notes = json.loads(self.notes.read_text()) if self.notes.exists() else {}
        running, passed = str(notes.get("running", "start")), int(notes.get("passed", 0))
        if "failed" in notes:
            return Outcome("caught", notes["failed"], notes["how"], seconds, passed)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            kind = "timeout" if number == signal.SIGALRM else "crash"
            return Outcome(f"caught ({kind})", running, signal.Signals(number).name, seconds, passed)
        code = os.waitstatus_to_exitcode(status)
        if code != 0 or "exit" not in notes:
            return Outcome("caught (crash)", running, f"exit status {code}: {_last_line(self.log)}", seconds, passed)
        if notes["exit"] != 0:
            # Usage error, no tests: nobody caught anything.
            raise RuntimeError(f"pytest ended with status {notes['exit']} in {self.tree}: {_last_line(self.log)}")
        return Outcome("passed", seconds=seconds, passed=passed)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _child(tree: Path, arguments: list[str], watch: _Watch, log: Path) -> NoReturn:
    """Never returns: the parent's stack lies below."""
    code = 70
    try:
        os.setpgid(0, 0)
        faulthandler.disable()
        # The parent's objects are never garbage here, and looking through them would copy their pages.
        gc.freeze()
        # The first to go when a wrong size asks for all memory.
        Path("/proc/self/oom_score_adj").write_text("1000")
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.chdir(tree)
        here = Path(__file__).resolve().parents[2]
        roots = [str(tree), str(tree / "kernels"), str(tree / "bench")]
        sys.path[:] = roots + [path for path in sys.path if path and Path(path).resolve() != here]
        os.environ["PYTHONPATH"] = os.pathsep.join(roots)
        os.environ.pop("PYTEST_ADDOPTS", None)
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        for name in list(sys.modules):
            if name.split(".")[0] in PACKAGES:
                del sys.modules[name]
        importlib.invalidate_caches()
        watch.write()
        # Native tracebacks cost no search for the source among all that the parent has imported.
        options = ["-x", "-q", "--tb=native", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--rootdir", str(tree)]
        watch.state["exit"] = int(pytest.main([*options, *arguments], plugins=[watch]))
        watch.write()
        code = 0
    except BaseException as error:  # whatever it was, the parent must read it and not the rest of this program run on
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(code)
