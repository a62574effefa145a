"""The checks of a full verification, as a pure function of what the machine has.

The names are the same on every machine. A check that cannot run here carries the reason; nothing is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vit_bench.records import KERNELS

MODELS = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
)
SMALLEST_MODELS = MODELS[:2]  # those that PyTorch alone runs in seconds on one core, in float64 too
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
BATCHES = (1, 8, 64, 256)
LIBRARIES = ("timm", "torchvision", "transformers")
TOOLS = ("memcheck", "racecheck")
COMPILED_FOR = "sm_90"
PARTS_FAILED = 1  # the exit status of a process that did its work and found something wrong
TOOL_FOUND_ERRORS = 9  # the exit status that compute-sanitizer is told to end with

EXECUTED, INTERPRETED, COMPILED, PYTORCH = "executed", "interpreted", "compiled only", "PyTorch"
NO_BFLOAT16 = "Triton's interpreter computes bfloat16 wrongly; needs an NVIDIA GPU"


@dataclass(frozen=True)
class Facts:
    """What the checks depend on.

    gpu: name of the GPU that the kernels run on, None without one; no_gpu: why there is none; triton, timm: whether
    they are installed; sanitizer: where compute-sanitizer is, None without it.
    """

    gpu: str | None
    no_gpu: str
    triton: bool
    timm: bool
    sanitizer: str | None


@dataclass(frozen=True)
class Check:
    """One process of the verification.

    rung: what the check shows if it passes; timeout: seconds it may take; wrapper: command line in front of the
    process; requires: names of checks that must have passed before; not_run: why it cannot run here, "" if it can.
    """

    name: str
    rung: str
    timeout: int
    wrapper: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    not_run: str = ""


def all_checks(facts: Facts) -> list[Check]:
    """Every check in the order in which it runs: small and telling ones first, times last."""
    return [
        *_kernel_checks(facts),
        *_model_checks(facts),
        *_compiled_checks(facts),
        *_sanitizer_checks(facts),
        *_gpu_model_checks(facts),
    ]


def select(checks: Sequence[Check], patterns: Sequence[str]) -> list[Check]:
    """The checks whose names match one of the patterns (as in a shell: * ? [..]), and those that they require.

    Raises ValueError for a pattern that matches nothing.
    """
    if not patterns:
        return list(checks)
    by_name = {check.name: check for check in checks}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in by_name):
            raise ValueError(f"no check matches {pattern!r}; --list prints the names")
    waiting = [name for name in by_name if any(fnmatchcase(name, pattern) for pattern in patterns)]
    wanted: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting.extend(by_name[name].requires)
    return [check for check in checks if check.name in wanted]


def _first(*reasons: str) -> str:
    return next((reason for reason in reasons if reason), "")


def _needs_triton(facts: Facts) -> str:
    return "" if facts.triton else "triton is not installed"


def _needs_timm(facts: Facts) -> str:
    return "" if facts.timm else "timm is not installed (pip install timm)"


def _needs_gpu(facts: Facts) -> str:
    return "" if facts.gpu else facts.no_gpu


def _on_best_rung(facts: Facts, name: str, dtype: str, timeout: int, *reasons: str) -> Check:
    """A check of kernels that runs on the GPU where there is one, and in the interpreter otherwise."""
    if facts.gpu:
        return Check(name, EXECUTED, timeout, not_run=_first(_needs_triton(facts), *reasons))
    bfloat16 = NO_BFLOAT16 if dtype == "bf16" else ""
    return Check(name, INTERPRETED, timeout, not_run=_first(_needs_triton(facts), *reasons, bfloat16))


def _kernel_checks(facts: Facts) -> list[Check]:
    cases = [_on_best_rung(facts, f"cases/{k}/{d}", d, 900) for k in KERNELS for d in DTYPES]
    no_tiles = _first(_needs_gpu(facts), _needs_triton(facts))
    tiles = [Check(f"tiles/{k}/{d}", EXECUTED, 1800, not_run=no_tiles) for k in KERNELS for d in DTYPES]
    return [*cases, *tiles]


def _model_checks(facts: Facts) -> list[Check]:
    """Small models, ours and accelerated ones, on the best rung; the presets against timm on the GPU; the torch backend
    against timm anywhere."""
    small = [_on_best_rung(facts, f"small/vit/{d}", d, 600) for d in DTYPES]
    shrunken = [_on_best_rung(facts, f"small/timm/{d}", d, 600, _needs_timm(facts)) for d in DTYPES]
    drop_in = [_on_best_rung(facts, f"dropin/{library}/{d}", d, 900) for library in LIBRARIES for d in DTYPES]
    torch = [Check(f"torch/{m}/fp32", PYTORCH, 600, not_run=_needs_timm(facts)) for m in SMALLEST_MODELS]
    no_presets = _first(_needs_gpu(facts), _needs_triton(facts), _needs_timm(facts))
    presets = [Check(f"timm/{m}/{d}", EXECUTED, 1800, not_run=no_presets) for m in MODELS for d in DTYPES]
    return [*small, *shrunken, *drop_in, *torch, *presets]


def _compiled_checks(facts: Facts) -> list[Check]:
    return [Check(f"compiled/{COMPILED_FOR}/bf16", COMPILED, 900, not_run=_needs_triton(facts))]


def _sanitizer_checks(facts: Facts) -> list[Check]:
    missing = "" if facts.sanitizer else "compute-sanitizer is neither on PATH nor in $CUDA_HOME/bin"
    not_run = _first(_needs_gpu(facts), _needs_triton(facts), missing)
    checks = []
    for tool in TOOLS:
        wrapper = (facts.sanitizer or "compute-sanitizer", "--tool", tool)
        wrapper += ("--error-exitcode", str(TOOL_FOUND_ERRORS))
        checks += [Check(f"{tool}/{k}/fp16", EXECUTED, 1800, wrapper, not_run=not_run) for k in KERNELS]
    return checks


def _gpu_model_checks(facts: Facts) -> list[Check]:
    """Graph capture, and times: only of models whose logits, and of tiles that, were found right in this run."""
    no_kernels = _first(_needs_gpu(facts), _needs_triton(facts))
    graphs = [Check(f"graph/{m}/bf16", EXECUTED, 900, not_run=no_kernels) for m in MODELS]
    no_times = _first(no_kernels, _needs_timm(facts))
    tiles = tuple(f"tiles/{k}/bf16" for k in KERNELS)
    times = [
        Check(f"throughput/{m}/b{b}", EXECUTED, 1800, requires=(f"timm/{m}/bf16", *tiles), not_run=no_times)
        for m in MODELS
        for b in BATCHES
    ]
    return [*graphs, *times]


# A machine that was not looked at: the names of its checks are those of every machine.
UNKNOWN = Facts(None, "not looked for", triton=False, timm=False, sanitizer=None)
NAMES = tuple(check.name for check in all_checks(UNKNOWN))
