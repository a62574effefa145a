"""Attention over sequence lengths and head counts, measured on the GPU at hand.

Every contender is compared with float64 first, on some of the queries, because the scores of 16384 tokens fill no
memory in float64; what is found wrong is not timed. Times are of CUDA graphs with a cold L2 cache, in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

import vit_kernels
from vit_bench import records, tolerance
from vit_bench.profiling.attention import Progress, _no_progress, bytes_of, compiled_rows, flops_of, packed_qkv
from vit_bench.profiling.contenders import Contender
from vit_bench.profiling.model import spread
from vit_bench.profiling.sweep import Point
from vit_bench.results import OURS, Row
from vit_bench.tuning_candidates import reason
from vit_bench.tuning_gpu import cold_times
from vit_kernels import reference
from vit_kernels.device import KNOWN_DEVICES, Device, device_of

QUERIES_COMPARED = 64
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def known_device(gpu: torch.device) -> Device | None:
    """The GPU at hand among those with a datasheet here; None for any other."""
    here = device_of(torch.empty(0, device=gpu))
    same = (d for d in KNOWN_DEVICES if (d.capability, d.sm_count) == (here.capability, here.sm_count))
    return next(same, None)


def ours() -> Contender:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = vit_kernels.attention(q, k, v)
        assert isinstance(result, torch.Tensor)
        return result

    return Contender(OURS, {"triton": records.versions()["triton"]}, run)


def judge(run: Attention, point: Point, qkv: tuple[torch.Tensor, ...]) -> tolerance.Errors:
    """Queries spread over the sequence, the first and the last among them, against float64; AssertionError if wrong."""
    q, k, v = qkv
    count = min(QUERIES_COMPARED, point.tokens)
    some = torch.linspace(0, point.tokens - 1, count, device=q.device).round().long()
    found = run(q, k, v)[:, some]
    errors = []
    for image in sorted({0, point.batch - 1}):  # a wrong stride shows in the last one
        here = slice(image, image + 1)
        eager, _ = reference.attention(q[here, some], k[here], v[here])
        truth, _ = reference.attention(q[here, some].double(), k[here].double(), v[here].double())
        errors.append(tolerance.check(found[here], eager, truth, name=str(point), on=q.device))
    return max(errors, key=lambda one: one.row)


def measured_rows(
    points: Iterable[Point],
    gpu: torch.device,
    name: str,
    contenders: Mapping[str, Contender],
    run: int,
    model: str,
    progress: Progress = _no_progress,
) -> Iterator[Row]:
    """A row for each contender at each point. name: of the GPU; run: place of the run in the file's list."""
    known = known_device(gpu)
    for point in points:
        progress(point)
        qkv = packed_qkv(point, gpu)
        errors: dict[str, dict[str, float]] = {}
        refused: dict[str, str] = {}
        for title, contender in contenders.items():
            try:
                found = judge(contender.run, point, qkv)
                errors[title] = {"row": found.row, "row_allowed": found.row_allowed, "largest": found.largest}
            except AssertionError as error:
                refused[title] = f"found wrong, so not timed: {error}"
            except (RuntimeError, ValueError, TypeError) as error:
                refused[title] = f"cannot run this: {reason(error)}"
        calls = [_bound(contenders[title].run, qkv) for title in errors]
        times = dict(zip(errors, cold_times(calls, gpu) if calls else [], strict=True))
        code = {} if known is None else {OURS: next(compiled_rows([point], known, run, model))}
        for title, contender in contenders.items():
            taken = times.get(title, refused.get(title, ""))
            timed, figures = isinstance(taken, list), code.get(title)
            yield Row(
                run, "attention", str(point), "attention", title, name, point.dtype, "gpu" if timed else "not run",
                model=model,
                shape=point.shape,
                settings=contender.settings,
                reason="" if timed else str(taken),
                seconds=spread(taken) if isinstance(taken, list) else None,
                flops=flops_of(point),
                nbytes=bytes_of(point),
                launches=figures.launches if figures else None,
                modelled_s=figures.modelled_s if figures else None,
                bound_s=figures.bound_s if figures else None,
                errors=errors.get(title, {}),
                code=figures.code if figures else {},
            )  # fmt: skip


def _bound(run: Attention, qkv: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
    return lambda: run(*qkv)
