"""Attention over sequence lengths and head counts, measured on the GPU at hand.

Every contender is compared with float64 first, on some of the queries, because no memory holds the scores of 16384
tokens in float64; what is found wrong is not timed. Times are of CUDA graphs with a cold L2 cache, in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from vit_bench import tolerance
from vit_bench.profiling.attention import Progress, bytes_of, compiled_rows, flops_of, no_progress, packed_qkv
from vit_bench.profiling.sweep import Point
from vit_bench.results import OURS, Row, Spread
from vit_bench.timed.contenders import CannotRunError, Contender, Run
from vit_bench.timed.machine import gpu_label, known_gpu
from vit_bench.timed.timing import single_kernels
from vit_bench.tuning_candidates import reason
from vit_bench.tuning_gpu import exact_products
from vit_kernels import reference

QUERIES_COMPARED = 64
Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def judge(run: Run, point: Point, problem: Problem) -> tolerance.Errors:
    """Queries spread over the sequence, the first and the last among them, against float64; AssertionError if wrong."""
    q, k, v = problem
    count = min(QUERIES_COMPARED, point.tokens)
    some = torch.linspace(0, point.tokens - 1, count, device=q.device).round().long()
    found = run()[:, some]
    errors = []
    for image in sorted({0, point.batch - 1}):  # a wrong stride shows in the last one
        here = slice(image, image + 1)
        with exact_products():
            eager, _ = reference.attention(q[here, some], k[here], v[here])
            truth, _ = reference.attention(q[here, some].double(), k[here].double(), v[here].double())
        errors.append(tolerance.check(found[here], eager, truth, name=str(point), on=q.device))
    return max(errors, key=lambda one: one.row)


@torch.inference_mode()
def measured_rows(
    points: Iterable[Point],
    gpu: torch.device,
    name: str,
    contenders: Sequence[Contender],
    run: int,
    model: str,
    progress: Progress = no_progress,
) -> Iterator[Row]:
    """A row for each contender at each point. name: PyTorch's of the GPU; run: place of the run in the file's list."""
    known = known_gpu(name)
    for point in points:
        progress(point)
        try:
            q, k, v = packed_qkv(point, gpu)
        except torch.OutOfMemoryError as error:
            # Smaller points may follow, and those before are not lost.
            why = f"not enough memory for q, k and v: {reason(error)}"
            for contender in contenders:
                yield Row(
                    run, "attention", str(point), "attention", contender.name, gpu_label(name), point.dtype, "not run",
                    model=model, shape=point.shape, settings=contender.labelled(), reason=why,
                )  # fmt: skip
            continue
        runs: dict[str, Run] = {}
        errors: dict[str, dict[str, float]] = {}
        refused: dict[str, str] = {}
        for contender in contenders:
            made = _entered(contender, point, (q, k, v))
            if isinstance(made, str):
                refused[contender.name] = made
            else:
                runs[contender.name], errors[contender.name] = made
        try:
            times = single_kernels(runs, gpu) if runs else {}
        except torch.OutOfMemoryError as error:
            times, refused = {}, refused | dict.fromkeys(runs, f"not enough memory to time it: {reason(error)}")
        ours = next(compiled_rows([point], known, run, model)) if known else None
        for contender in contenders:
            found = times.get(contender.name, refused.get(contender.name, ""))
            timed = isinstance(found, Spread)
            figures = ours if contender.name == OURS else None
            yield Row(
                run, "attention", str(point), "attention", contender.name, gpu_label(name), point.dtype,
                "gpu" if timed else "not run",
                model=model,
                shape=point.shape,
                settings=contender.labelled(),
                reason="" if isinstance(found, Spread) else found,
                seconds=found if isinstance(found, Spread) else None,
                flops=flops_of(point),
                nbytes=bytes_of(point),
                launches=figures.launches if figures else None,
                modelled_s=figures.modelled_s if figures else None,
                bound_s=figures.bound_s if figures else None,
                errors=errors.get(contender.name, {}),
                code=figures.code if figures else {},
            )  # fmt: skip


def _entered(contender: Contender, point: Point, problem: Problem) -> tuple[Run, dict[str, float]] | str:
    """What is to be timed with the figures of its errors, or why it is not."""
    try:
        run: Callable[[], torch.Tensor] = contender.make(problem)
        found = judge(run, point, problem)
    except CannotRunError as error:
        return str(error)
    except AssertionError as error:
        return f"wrong result, not timed: {reason(error)}"
    # Whatever a library raises is the reason why it was not timed, and the others go on.
    except Exception as error:
        return f"cannot run this: {reason(error)}"
    return run, {"row": found.row, "row_allowed": found.row_allowed, "largest": found.largest}
