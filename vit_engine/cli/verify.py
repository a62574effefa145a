"""``vit-engine verify``: every kernel and a whole model against float64 references, on this machine's best rung.

That is the GPU where there is one the kernels run on, and Triton's interpreter otherwise (in a child process, because
Triton decides at its import).
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .in_child import run_in_child
from .interrupt import INTERRUPTED, termination_as_interrupt

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def verify_command(
    model: Annotated[
        str | None,
        typer.Option("--model", help="Also run this preset with drawn weights, whole (default: a small ViT)."),
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option("--kernel", help="Only these operations, and no model; repeatable.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="fp32, fp16 or bf16; repeatable (default: all the rung has).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Everything this machine can check, each in its own process; takes minutes."),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.json", help="With --full: write the results here, and FILE.html."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="GLOB", help="With --full: only checks with such names; repeatable."),
    ] = None,
    just_list: Annotated[
        bool, typer.Option("--list", help="With --full: print the names of the checks and run nothing.")
    ] = False,
) -> None:
    """Compare every kernel and a whole model with float64 references; exit code 1 if anything misses its tolerance.

    Ctrl-C ends it with exit code 130 and with what was compared before.

    With --full: all kernels, tiles and preset models, sanitizer, graph capture and throughput, as far as this machine
    allows; the rest is marked as not run. Exit code 1 if any check failed, crashed or timed out.
    """
    if full:
        _refuse("cannot be combined with --full, which chooses by --only", model, kernel, dtype, as_json)
        from .verify_full import full_command

        raise typer.Exit(full_command(report, only or [], just_list))
    for option, value in (("--report", report), ("--only", only), ("--list", just_list)):
        if value:
            raise typer.BadParameter("needs --full", param_hint=option)
    if model and kernel:
        raise typer.BadParameter("cannot be combined with --kernel, which runs no model", param_hint="--model")
    for name in dtype or ():
        if name not in _DTYPES:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(_DTYPES)}", param_hint="--dtype")
    raise typer.Exit(_dispatch(model, kernel or [], dtype or [], as_json))


def _refuse(why: str, *values: object) -> None:
    for option, value in zip(("--model", "--kernel", "--dtype", "--json"), values, strict=True):
        if value:
            raise typer.BadParameter(why, param_hint=option)


def _dispatch(model: str | None, kernels: list[str], dtypes: list[str], as_json: bool) -> int:
    import torch

    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return _verify(model, kernels, dtypes, as_json)
    arguments = ["--json"] * as_json + ([] if model is None else ["--model", model])
    arguments += [word for name in kernels for word in ("--kernel", name)]
    arguments += [word for name in dtypes for word in ("--dtype", name)]
    return run_in_child(["verify", *arguments], {**os.environ, "TRITON_INTERPRET": "1"})


def _verify(model: str | None, kernels: list[str], dtypes: list[str], as_json: bool) -> int:
    from vit_bench.cases import CASES

    known = list(dict.fromkeys(case.kernel for case in CASES))
    unknown = [name for name in kernels if name not in known]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: the operations are {', '.join(known)}", param_hint="--kernel")
    if model is not None:
        _check_preset(model)
    rung, device, allowed = _rung()
    wanted = dtypes or allowed
    refused = [name for name in wanted if name not in allowed]
    if refused:
        raise typer.BadParameter(
            f"{', '.join(refused)} cannot be verified here: the interpreter computes bfloat16 wrongly; use a GPU",
            param_hint="--dtype",
        )
    if not as_json:
        typer.echo(f"rung: {rung}")
        heads = "".join(f"{head:>11}" for head in ("max error", "row error", "allowed", "eager"))
        typer.echo(f"{'what':<52}{'dtype':<7}{heads}{'s':>7}  verdict")
    planned = _planned(kernels or known, model, bool(kernels), wanted, device)
    rows: list[dict[str, Any]] = []
    try:
        with termination_as_interrupt():
            for one in planned:
                rows.append(_judged(*one))
                if not as_json:
                    _print_row(rows[-1])
    except KeyboardInterrupt:
        typer.echo(f"vit-engine verify: interrupted: {len(rows)} of {len(planned)} done", err=True)
    failed, left = sum(not row["passed"] for row in rows), len(planned) - len(rows)
    if as_json:
        counts = {"passed": len(rows) - failed, "failed": failed, "not_run": left}
        print(json.dumps({"rung": rung, **counts, "results": rows}))
    else:
        not_run = f", {left} not run" if left else ""
        typer.echo(f"{len(rows) - failed} passed, {failed} failed{not_run} ({rung})")
    if left:
        return INTERRUPTED
    return 1 if failed else 0


def _check_preset(name: str) -> None:
    from vit_engine import ViTConfig

    try:
        ViTConfig.preset(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error


def _rung() -> tuple[str, str, list[str]]:
    """(name of the rung, device, dtypes that can be verified on it)."""
    import torch

    from vit_kernels import accepts, interpreting

    if interpreting():
        # numpy mentions the infinities and overflows that the formulas mean to have.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
        return "interpreted (no GPU used)", "cpu", ["fp32", "fp16"]
    if not accepts("cuda"):
        raise typer.BadParameter("this GPU is older than compute capability 8.0, which the kernels need")
    return f"executed on {torch.cuda.get_device_name()}", "cuda", list(_DTYPES)


def _planned(
    kernels: list[str], model: str | None, only_kernels: bool, dtypes: list[str], device: str
) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Name, dtype and how to run it, of everything that is to be compared."""
    import torch

    from vit_bench.cases import cases_for, run_case
    from vit_bench.whole_model import SMALL, run_model
    from vit_engine import ViTConfig

    found: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
        (str(case), dtype, partial(run_case, case, getattr(torch, _DTYPES[dtype]), device))
        for kernel in kernels
        for case in cases_for(kernel)
        for dtype in dtypes
    ]
    if not only_kernels:
        config = SMALL if model is None else ViTConfig.preset(model)
        backend = "interpret" if device == "cpu" else "triton"

        def whole(dtype: str) -> dict[str, Any]:
            return {"logits": run_model(config, getattr(torch, _DTYPES[dtype]), device, backend)}

        found += [(f"whole model: {model or 'small ViT'}", dtype, partial(whole, dtype)) for dtype in dtypes]
    return found


def _judged(name: str, dtype: str, run: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "dtype": dtype, "passed": True}
    started = time.perf_counter()
    try:
        errors = run()
    except AssertionError as error:
        row |= {"passed": False, "reason": str(error)}
    except Exception as error:  # a kernel that does not compile must not hide the others
        first = (str(error).strip().splitlines() or ["no message"])[0]
        row |= {"passed": False, "reason": f"{type(error).__name__}: {first}"}
    else:
        worst = max(errors.values(), key=lambda e: e.row / e.row_allowed if e.row_allowed else 0.0)
        row |= {
            "max_abs_error": max(e.largest for e in errors.values()),
            "row_error": worst.row,
            "row_allowed": worst.row_allowed,
            "row_eager": worst.row_eager,
        }
    return {**row, "seconds": round(time.perf_counter() - started, 2)}


def _print_row(row: dict[str, Any]) -> None:
    start = f"{row['name'][:51]:<52}{row['dtype']:<7}"
    if row["passed"]:
        figures = (row["max_abs_error"], row["row_error"], row["row_allowed"], row["row_eager"])
        typer.echo(start + "".join(f"{value:>11.2e}" for value in figures) + f"{row['seconds']:>7.1f}  ok")
    else:
        typer.echo(f"{start}FAILED: {row['reason']}")
