"""Runs the correctness cases on one rung and writes what passed into an evidence file.

    TRITON_INTERPRET=1 python -m vit_bench.evidence interpreted --out bench/evidence/interpreted.json
    python -m vit_bench.evidence sanitized --capability 80 90 --out bench/evidence/sanitized.json
    python -m vit_bench.evidence emulated --driver MODULE:CONTEXTMANAGER --capability 80 90 --out ...
    python -m vit_bench.evidence executed --workers 16 --out bench/evidence/executed.json

Every kernel runs its named cases in every dtype, and besides them each tile that the tile choice gives a preset model
on that GPU generation (not when interpreted: the interpreter has no tiles worth the name).

Most of the time goes into compiling, one kernel after the other; --workers shares each kernel's cases out to processes.

An emulating driver is any context manager that is called as `contextmanager(capability=80, races=True)` and under which
Triton launches execute compiled code on CPU tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vit_bench import records
from vit_bench.arguments import command
from vit_bench.cases import Case, cases_for, run_case
from vit_bench.recording import gpu
from vit_bench.sanitizer import sanitized
from vit_bench.tile_cases import tile_case
from vit_bench.tile_choices import Choice, forced, on_few_sms, shipped_choices
from vit_engine.config import PRESETS
from vit_kernels.device import interpreting

Session = Callable[[], AbstractContextManager[Any]]
Driver = Callable[..., AbstractContextManager[Any]]
Work = tuple[Case, AbstractContextManager[None]]


def load_driver(name: str) -> Driver:
    """What gives context managers behind "module:attribute", called with capability and races. Raises ValueError where
    there is no such thing: entered by every case, it would be a failure of every kernel."""
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ValueError(f"driver must be written MODULE:CONTEXTMANAGER; got {name!r}")
    try:
        driver = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"driver {name!r} cannot be imported: {error}") from error
    try:
        session = driver(capability=records.CAPABILITIES[0], races=True)
    except TypeError as error:
        raise ValueError(f"driver {name!r} must take capability and races: {error}") from error
    if not isinstance(session, AbstractContextManager):
        raise ValueError(f"driver {name!r} must give a context manager; it gave a {type(session).__name__}")
    return driver


# Five tiles: three and two of them whole on two SMs, one on each of four with a piece of the fifth. Of blocks of pixels
# six: three on each of two SMs, two or one on each of four.
WALKED_BY = (2, 4)


def _walked(case: Case, tile: Any, sms: int) -> Work:
    @contextlib.contextmanager
    def choice() -> Iterator[None]:
        with forced(case.kernel, tile), on_few_sms(sms):
            yield

    return replace(case, name=f"{case.name}, on {sms} SMs"), choice()


def tile_work(kernel: str, choices: Sequence[Choice]) -> list[Work]:
    """A case, or several, for each of these tiles, together with what makes the launcher use it."""
    work: list[Work] = []
    for choice in choices:
        case = tile_case(kernel, choice.tile, choice.width, choice.gated)
        # A program of `mlp` has one tile, whatever its roles.
        walks = any(getattr(choice.tile, kind, False) for kind in ("roles", "staying", "blocks"))
        if walks and kernel != "mlp":
            cases = [case]
            if kernel == "linear":
                cases.append(tile_case(kernel, choice.tile, choice.width, choice.gated, added=False))
            work += [_walked(case, choice.tile, sms) for case in cases for sms in WALKED_BY]
        else:
            work.append((case, forced(kernel, choice.tile)))
            if getattr(choice.tile, "columns", False):
                bare = tile_case(kernel, choice.tile, choice.width, choice.gated, added=False)
                work.append((bare, forced(kernel, choice.tile)))
    return work


def workload(kernel: str, dtype: torch.dtype, capability: int | None) -> list[Work]:
    """The cases of a kernel, and those of the tiles that the presets get on this GPU generation."""
    work: list[Work] = [(case, contextlib.nullcontext()) for case in cases_for(kernel)]
    if capability is not None:
        work += tile_work(kernel, shipped_choices(kernel, dtype, gpu(f"sm_{capability}"), sorted(PRESETS)))
    return work


def examine(
    kernel: str, dtype_name: str, capability: int | None, session: Session, device: str, work: list[Work] | None = None
) -> records.Record:
    """Run a kernel's cases inside `session()`; failures are kept, and one is enough for the record not to pass."""
    dtype = getattr(torch, dtype_name)
    work = workload(kernel, dtype, capability) if work is None else work
    passed, failed = {}, {}
    for case, choice in work:
        try:
            with session(), choice:
                errors = run_case(case, dtype, device)
            passed[case.name] = {
                name: {k: float(f"{v:.3e}") for k, v in asdict(found).items()} for name, found in errors.items()
            }
        except Exception as error:  # a failing case must not hide the others
            failed[case.name] = f"{type(error).__name__}: {error}"[:500]
    return records.Record(
        kernel=kernel,
        dtype=dtype_name,
        capability=capability,
        source=records.source_hash(kernel),
        passed=bool(passed) and not failed,
        versions=records.versions(),
        date=records.today(),
        detail={"passed": passed, "failed": failed},
    )


def _sessions(options: argparse.Namespace) -> list[tuple[int | None, Session, str]]:
    """(GPU generation, session, device of the tensors) for each run that the options ask for."""
    if options.rung == "interpreted":
        if not interpreting():
            raise SystemExit("interpreted: set TRITON_INTERPRET=1 before Python starts")
        return [(None, contextlib.nullcontext, "cpu")]
    if interpreting():
        raise SystemExit(f"{options.rung}: TRITON_INTERPRET is set; unset it")
    if options.rung == "executed":
        if not torch.cuda.is_available():
            raise SystemExit("executed: PyTorch finds no CUDA GPU here")
        major, minor = torch.cuda.get_device_capability()
        return [(10 * major + minor, contextlib.nullcontext, "cuda")]
    if options.rung == "sanitized":
        return [(capability, partial(sanitized, capability), "cuda") for capability in options.capability]
    if not options.driver:
        raise SystemExit("emulated: name the driver, --driver MODULE:CONTEXTMANAGER")
    try:
        driver = load_driver(options.driver)
    except ValueError as error:
        raise SystemExit(f"emulated: {error}") from error
    return [(c, partial(driver, capability=c, races=True), "cpu") for c in options.capability]


def _examine_share(options: argparse.Namespace, run: int, kernel: str, dtype: str, share: int) -> records.Record:
    """The record of every `options.workers`-th case from number `share` on, in the run-th of the sessions."""
    capability, session, device = _sessions(options)[run]
    work = workload(kernel, getattr(torch, dtype), capability)[share :: options.workers]
    return examine(kernel, dtype, capability, session, device, work)


def joined(shares: Sequence[records.Record]) -> records.Record:
    """One record of a kernel's cases, in their order, from the records of the processes that shared them out."""
    detail: dict[str, dict[str, Any]] = {}
    for kind in ("passed", "failed"):
        rounds = itertools.zip_longest(*(share.detail[kind].items() for share in shares))
        detail[kind] = dict(item for items in rounds for item in items if item is not None)
    return replace(shares[0], passed=bool(detail["passed"]) and not detail["failed"], detail=detail)


def _examined(options: argparse.Namespace, dtypes: Sequence[str]) -> Iterator[tuple[records.Record, float]]:
    """The record of each kernel and dtype, and the seconds since the one before."""
    sessions = range(len(_sessions(options)))
    asked = [(run, kernel, dtype) for run in sessions for kernel in options.kernel for dtype in dtypes]
    begin = time.perf_counter()
    if options.workers == 1:
        found = (_examine_share(options, run, kernel, dtype, 0) for run, kernel, dtype in asked)
        pool: AbstractContextManager[Any] = contextlib.nullcontext()
    else:
        # A process that was forked could not use CUDA.
        pool = executor = ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"))
        waiting: list[list[Future[records.Record]]] = [
            [executor.submit(_examine_share, options, run, kernel, dtype, share) for share in range(options.workers)]
            for run, kernel, dtype in asked
        ]
        found = (joined([share.result() for share in shares]) for shares in waiting)
    with pool:
        for record in found:
            end = time.perf_counter()
            yield record, end - begin
            begin = end


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command("evidence", __doc__)
    parser.add_argument("rung", choices=[rung for rung in records.RUNGS if rung != "compiled"])
    parser.add_argument("--out", type=Path, required=True, help="evidence file to merge the records into")
    parser.add_argument("--driver", help="MODULE:CONTEXTMANAGER of a Triton driver that executes compiled code")
    parser.add_argument("--capability", nargs="+", type=int, choices=records.CAPABILITIES, default=[80, 90])
    parser.add_argument("--kernel", nargs="+", choices=records.KERNELS, default=list(records.KERNELS))
    parser.add_argument(
        "--dtype", nargs="+", choices=records.DTYPES, help="default: all that the rung computes rightly"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that share the cases of each kernel")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be 1 or more; got {options.workers}")
    if options.out.is_dir():
        parser.error(f"--out must be a file; {options.out} is a folder")
    try:
        records.load(options.out)  # the records are merged into it, after hours
    except ValueError as error:
        parser.error(f"--out: {error}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    # Triton's interpreter computes bfloat16 wrongly (3.7 to 3.9), so it proves nothing there.
    allowed = records.DTYPES[:2] if options.rung == "interpreted" else records.DTYPES
    dtypes = options.dtype or allowed
    for dtype in dtypes:
        if dtype not in allowed:
            raise SystemExit(f"{options.rung}: {dtype} is not computed rightly on this rung")
    bad = 0
    for record, seconds in _examined(options, dtypes):
        records.merge(options.out, options.rung, [record])
        where = f"sm_{record.capability}" if record.capability else "any GPU"
        good, failed = len(record.detail["passed"]), record.detail["failed"]
        print(
            f"{record.kernel:12}{record.dtype:9}{where:8}{good:3} passed, {len(failed)} failed, {seconds:.0f} s",
            flush=True,
        )
        for name, message in failed.items():
            print(f"    {name}: {message}", flush=True)
        bad += not record.passed
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
