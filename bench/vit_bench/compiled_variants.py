"""Kernel variants as a compiler makes them for one GPU, judged: what of them may not ship, and why."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from vit_bench import records
from vit_bench.occupancy import ctas_per_sm
from vit_bench.plan import BATCHES, Call, all_calls
from vit_bench.recording import Launch, gpu, recording
from vit_bench.sass import code_facts
from vit_bench.variant_listing import used_by

MATRIX_KERNELS = ("patch_embed", "attention", "linear", "mlp")  # those whose work is matrix products


@dataclass
class Variant:
    """One compiled kernel. kernel: the launcher that launched it; function: the kernel's own name; used_by: the first
    model and batch that needs it; constants: its compile-time arguments; stack: bytes per thread, spills included;
    shared, shared_limit: bytes per CTA; ctas_per_sm: CTAs that one SM holds at a time; load_bytes: widest global load
    of a thread; error: why it may not ship."""

    kernel: str
    function: str
    gpu: str
    dtype: str
    used_by: str
    constants: dict[str, object]
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    shared: int
    shared_limit: int
    ctas_per_sm: int
    tensor: str
    load_bytes: int
    tma: bool
    specialized: bool
    instructions: int
    error: str = ""


def _constants(launch: Launch) -> dict[str, object]:
    """The compile-time arguments: the ones in capitals of more than a letter (M, N and K are sizes)."""
    return {name: value for name, value in launch.arguments.items() if name.isupper() and len(name) > 1}


def _judge(variant: Variant) -> str:
    if variant.stack:
        return f"{variant.stack} bytes of stack per thread: registers are spilled"
    if variant.shared > variant.shared_limit:
        return f"{variant.shared} bytes of shared memory are over the limit of {variant.shared_limit}"
    multiplies = variant.kernel in MATRIX_KERNELS and variant.function != "linear_sum_kernel"
    if multiplies and variant.dtype != "float32" and variant.tensor in ("FFMA", "none"):
        return "no tensor-core instruction"
    return ""


def _from_launch(call: Call, launch: Launch, gpu_name: str, dtype: str, user: str) -> Variant:
    facts = code_facts(launch.binary.cubin)
    variant = Variant(
        kernel=call.kernel,
        function=launch.kernel,
        gpu=gpu_name,
        dtype=dtype,
        used_by=user,
        constants=_constants(launch),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        registers=launch.binary.resources.registers,
        stack=launch.binary.resources.spilled_bytes,
        shared=launch.shared,
        shared_limit=gpu(gpu_name).shared_memory,
        ctas_per_sm=ctas_per_sm(gpu(gpu_name), launch.binary.resources.registers, launch.shared, launch.num_warps),
        **asdict(facts),
    )
    variant.error = _judge(variant)
    return variant


def _failed(call: Call, gpu_name: str, dtype: str, user: str, error: BaseException) -> Variant:
    text = traceback.format_exception_only(type(error), error)[-1].strip()
    limit = gpu(gpu_name).shared_memory
    return Variant(
        call.kernel, "", gpu_name, dtype, user, {}, 0, 0, 0, 0, 0, limit, 0, "", 0, False, False, 0, error=text
    )


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Triton prints the whole module when a pass fails; the error itself reaches the table."""
    if verbose:
        yield
        return
    saved = os.dup(2)
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def compile_for(
    gpu_name: str,
    dtype: str,
    models: Sequence[str],
    kernels: Iterable[str] = records.KERNELS,
    batches: Sequence[int] = BATCHES,
    verbose: bool = False,
    only: Collection[str] | None = None,
) -> list[Variant]:
    """Every distinct kernel that these models, and the families without a preset, launch on one GPU in one dtype,
    compiled and judged.

    only: the calls to make, by `variant_listing.used_by`; all of them by default.
    """
    kernels = set(kernels)
    found: dict[tuple[str, int], Variant] = {}
    failures: dict[tuple[str, str], Variant] = {}
    with recording(gpu(gpu_name), torch_device="meta") as recorder, quiet(verbose):
        for model, batch, call in all_calls(models, batches, getattr(torch, dtype)):
            user = used_by(model, batch, call)
            if call.kernel not in kernels or (only is not None and user not in only):
                continue
            recorder.launches.clear()
            try:
                call.run()
            except Exception as error:  # one kernel that does not compile must not hide the others
                failure = _failed(call, gpu_name, dtype, user, error)
                failures.setdefault((call.kernel, failure.error), failure)
            for launch in recorder.launches:
                # The recorder gives every launch of the same machine code the same binary.
                key = call.kernel, id(launch.binary)
                if key not in found:
                    found[key] = _from_launch(call, launch, gpu_name, dtype, user)
    return [*found.values(), *failures.values()]
