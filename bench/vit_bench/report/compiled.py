"""Results for a report where nobody brings any: compiled for a GPU that need not be here, bounded and modelled."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence

from vit_bench import recording
from vit_bench.plan import BATCHES
from vit_bench.profiling.attention import compiled_rows, rows_not_run
from vit_bench.profiling.model import planned, row
from vit_bench.profiling.runs import this_run
from vit_bench.profiling.sweep import points
from vit_bench.results import OURS, Results, Row
from vit_engine.config import ViTConfig

EAGER = "timm, eager"
_TOKENS, _HEADS = (50, 16384), (1, 32)


def compiled_results(
    model: str,
    gpu: str,
    dtype: str,
    command: str,
    batches: Sequence[int] = BATCHES,
    progress: Callable[[str], object] = print,
) -> Results:
    """Forward passes of a preset, attention over lengths and head counts, and memory, for one GPU.

    Raises ValueError for names that are not known, RuntimeError where Triton interprets instead of compiling.
    """
    device, config = recording.gpu(gpu), ViTConfig.preset(model)
    rows = []
    for batch in batches:
        progress(f"{model}, batch {batch}")
        rows.append(row(planned(model, device, batch, dtype), device.name, model, batch, dtype))
    some = points(config, _TOKENS, _HEADS, None, dtype)
    rows += compiled_rows(some, device, 0, model, lambda point: progress(str(point)))
    rows += rows_not_run(dtype, device.name, 0, model, gpu=False)
    progress(f"{model}, memory")
    rows += memory_rows(model, device.name, max(batches), dtype)
    return Results([this_run(command, device.name, device)], rows)


def memory_rows(model: str, gpu: str, batch: int, dtype: str) -> Iterator[Row]:
    """Peak activation memory of timm's model of that name, ours beside eager; nothing where timm has none of it."""
    if importlib.util.find_spec("timm") is None:
        return
    from timm import is_model

    from vit_bench.memory import measure

    if not is_model(model):
        return
    found = measure(model, batch, dtype, gpu, depth=2)
    for name, peak in ((OURS, found.repeated), (EAGER, found.eager)):
        yield Row(
            run=0,
            suite="model",
            case=f"model/{model}/b{batch}/memory",
            label="memory",
            contender=name,
            device=gpu,
            dtype=dtype,
            source="compiled",
            model=model,
            shape={"batch": batch},
            reason="counted from recorded allocations; nothing was executed",
            images=batch,
            peak_bytes=peak.nbytes,
        )
