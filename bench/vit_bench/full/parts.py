"""What each check does: its name as a list of parts, each of which returns figures or raises.

AssertionError means that a result is wrong, CannotRunError that this machine cannot do the part; any other exception is
a failure too.
A process that reaches this module has been told by TRITON_INTERPRET whether kernels are interpreted or executed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from vit_bench.cases import Case, cases_for, run_case
from vit_bench.full.checks import DTYPES, NAMES, TOOLS
from vit_bench.full.models import Pair, judge, pair, parity
from vit_bench.records import KERNELS
from vit_bench.tile_cases import tile_case
from vit_bench.tolerance import Errors
from vit_kernels import interpreting

Figures = dict[str, Any]

DROP_IN_FP32 = 1e-4  # of a result's largest value


class CannotRunError(Exception):
    """This part cannot run on this machine; the message says why. It is neither passed nor failed."""


@dataclass(frozen=True)
class Part:
    """One step of a check. run: returns figures for the report, or raises."""

    name: str
    run: Callable[[], Figures]


def parts_of(name: str) -> list[Part]:
    """The parts of the check of this name; ValueError for a name that no check has."""
    if name not in NAMES:
        raise ValueError(f"no check is called {name!r}; `vit-engine verify --full --list` prints the names")
    kind, first, second = name.split("/")
    return _KINDS[kind](first, second)


def _device() -> str:
    return "cpu" if interpreting() else "cuda"


def _backend() -> str:
    return "interpret" if interpreting() else "triton"


def _dtype(short: str) -> torch.dtype:
    return getattr(torch, DTYPES[short])


def worst(errors: dict[str, Errors]) -> Figures:
    """The figures of a result's worst output: the one that comes closest to what is allowed."""
    closest = max(errors.values(), key=lambda e: e.row / e.row_allowed if e.row_allowed else 0.0)
    return {**asdict(closest), "largest": max(e.largest for e in errors.values())}


def _cases(kernel: str, dtype: str) -> list[Part]:
    def run(case: Case) -> Figures:
        return worst(run_case(case, _dtype(dtype), _device()))

    return [Part(case.name, partial(run, case)) for case in cases_for(kernel)]


def _tiles(kernel: str, dtype: str) -> list[Part]:
    """Every tile that a preset gets on the GPU at hand, each on a problem a little larger than one tile."""
    from vit_bench.tile_choices import forced, shipped_choices
    from vit_engine.config import PRESETS
    from vit_kernels import device_of

    def run(case: Case, tile: Any) -> Figures:
        with forced(kernel, tile):
            return worst(run_case(case, _dtype(dtype), "cuda"))

    gpu = device_of(torch.empty(0, device="cuda"))
    choices = shipped_choices(kernel, _dtype(dtype), gpu, sorted(PRESETS))
    cases = [(tile_case(kernel, choice.tile, choice.width, choice.gated), choice.tile) for choice in choices]
    return [Part(case.name, partial(run, case, tile)) for case, tile in cases]


def _small(which: str, dtype: str) -> list[Part]:
    from vit_bench.whole_model import SMALL, run_model

    def run() -> Figures:
        if which == "timm":
            return asdict(parity("shrunken", _dtype(dtype), _device(), _backend()))
        return asdict(run_model(SMALL, _dtype(dtype), _device(), _backend()))

    return [Part("logits", run)]


def _drop_in(library: str, dtype: str) -> list[Part]:
    """A small model of each family of a library, accelerated, beside itself untouched."""
    from vit_bench.dropin_families import FAMILIES, Family
    from vit_bench.dropin_parity import compare_float32, compare_half

    def run(family: Family) -> Figures:
        if importlib.util.find_spec(library) is None:
            raise CannotRunError(f"{library} is not installed (pip install {library})")
        if dtype != "fp32":
            return asdict(compare_half(family, _dtype(dtype), _device()))
        error = compare_float32(family, _device())
        if not error < DROP_IN_FP32:
            raise AssertionError(f"relative error {error:.1e}, {DROP_IN_FP32:.0e} is allowed")
        return {"relative_error": error}

    return [Part(family.name, partial(run, family)) for family in FAMILIES if family.library == library]


def _torch(model: str, dtype: str) -> list[Part]:
    return [Part("logits", lambda: asdict(parity(model, _dtype(dtype), "cpu", "torch")))]


def _timm(model: str, dtype: str) -> list[Part]:
    return [Part("logits", lambda: asdict(parity(model, _dtype(dtype), "cuda", "triton")))]


def _compiled(gpu: str, dtype: str) -> list[Part]:
    """The kernels of two presets as they launch them, compiled for a GPU generation and judged, not executed."""
    from vit_bench.compiled_variants import compile_for

    def run(kernel: str) -> Figures:
        variants = compile_for(
            gpu, DTYPES[dtype], ["vit_tiny_patch16_224", "vit_base_patch16_224"], [kernel], batches=(1, 64)
        )
        unfit = [f"{v.function or v.kernel} ({v.used_by}): {v.error}" for v in variants if v.error]
        if unfit or not variants:
            raise AssertionError("; ".join(unfit) or "nothing was compiled")
        return {
            "variants": len(variants),
            "most_registers": max(v.registers for v in variants),
            "most_shared_bytes": max(v.shared for v in variants),
            "stack_bytes": max(v.stack for v in variants),
        }

    return [Part(kernel, partial(run, kernel)) for kernel in KERNELS]


def _on_gpu(model: str, dtype: str) -> tuple[Pair, Any]:
    models = pair(model, _dtype(dtype))
    return models, models.ours.set_backend("triton").to("cuda")


def _graph(model: str, dtype: str) -> list[Part]:
    from vit_bench.full.capture import check_engine_graphs, check_replay

    def run(check: Callable[..., Figures]) -> Figures:
        models, ours = _on_gpu(model, dtype)
        return check(ours, models.images(2, seed=1).cuda(), models.images(2, seed=2).cuda())

    return [Part("replay", partial(run, check_replay)), Part("set_graphs", partial(run, check_engine_graphs))]


def _throughput(model: str, batch: str) -> list[Part]:
    """Images per second in bf16. The batch's own first and last logits are judged first: another batch, other tiles."""
    from vit_bench.full.timing import interleaved, state_under_load

    size = int(batch.removeprefix("b"))

    def run() -> Figures:
        models, ours = _on_gpu(model, "bf16")
        images = models.images(size)
        on_gpu = images.cuda()
        with torch.inference_mode():
            logits = ours(on_gpu)
        ends = [0] if size == 1 else [0, -1]
        judge(models, logits[ends], images[ends], f"{model}, batch {size}")
        theirs = models.theirs.to(models.dtype).cuda()
        with torch.inference_mode():
            contenders = {"vit-engine": lambda: ours(on_gpu), "timm, eager": lambda: theirs(on_gpu)}
            times = interleaved(contenders)
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            state = state_under_load(contenders["vit-engine"], uuid)
        rates = {name: {"images_per_second": 1000 * size / t["median_ms"], **t} for name, t in times.items()}
        return {"model": model, "batch": size, "dtype": "bf16", "throughput": rates, "nvidia_smi_under_load": state}

    def run_if_memory_allows() -> Figures:
        try:
            return run()
        except torch.cuda.OutOfMemoryError as error:
            raise CannotRunError(f"batch {size} takes more memory than this GPU has free: {error}") from error

    return [Part("times", run_if_memory_allows)]


_KINDS: dict[str, Callable[[str, str], list[Part]]] = {
    "cases": _cases,
    "tiles": _tiles,
    "small": _small,
    "dropin": _drop_in,
    "torch": _torch,
    "timm": _timm,
    "compiled": _compiled,
    "graph": _graph,
    "throughput": _throughput,
    **dict.fromkeys(TOOLS, _cases),
}
