"""Compiles every kernel, as the preset models launch it, for every GPU generation: no GPU needed.

    python -m vit_bench.compile_matrix --gpu sm_90 --model vit_base_patch16_224 --dtype float16 --json out/matrix.json

Fails on a compile error, on shared memory over the GPU's limit, on any spill, and on a 16-bit matrix product that runs
without tensor cores. Compiled code is not executed here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vit_bench import records
from vit_bench.plan import BATCHES, Call, model_calls
from vit_bench.recording import Launch, gpu, recording
from vit_bench.sass import code_facts
from vit_engine.config import PRESETS, ViTConfig
from vit_kernels.device import KNOWN_DEVICES, interpreting

GPUS = tuple(f"sm_{device.capability}" for device in KNOWN_DEVICES)
MATRIX_KERNELS = ("patch_embed", "attention", "linear", "mlp")  # those whose work is matrix products


@dataclass
class Variant:
    """One compiled kernel. kernel: the launcher that launched it; function: the kernel's own name; used_by: the first
    model and batch that needs it; constants: its compile-time arguments; stack: bytes per thread, spills included;
    shared, shared_limit: bytes per CTA; load_bytes: widest global load of a thread; error: why it may not ship."""

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
    tensor: str
    load_bytes: int
    tma: bool
    specialized: bool
    instructions: int
    error: str = ""


def _constants(launch: Launch) -> dict[str, object]:
    """The compile-time arguments, which by convention are the ones in capitals."""
    return {name: value for name, value in launch.arguments.items() if name.isupper()}


def _judge(variant: Variant) -> str:
    if variant.stack:
        return f"{variant.stack} bytes of stack per thread: registers are spilled"
    if variant.shared > variant.shared_limit:
        return f"{variant.shared} bytes of shared memory are over the limit of {variant.shared_limit}"
    if variant.kernel in MATRIX_KERNELS and variant.dtype != "float32" and variant.tensor in ("FFMA", "none"):
        return "no tensor-core instruction"
    return ""


def _from_launch(call: Call, launch: Launch, gpu_name: str, dtype: str, used_by: str) -> Variant:
    facts = code_facts(launch.binary.cubin)
    variant = Variant(
        kernel=call.kernel,
        function=launch.kernel,
        gpu=gpu_name,
        dtype=dtype,
        used_by=used_by,
        constants=_constants(launch),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        registers=launch.binary.resources.registers,
        stack=launch.binary.resources.spilled_bytes,
        shared=launch.shared,
        shared_limit=gpu(gpu_name).shared_memory,
        **asdict(facts),
    )
    variant.error = _judge(variant)
    return variant


def _failed(call: Call, gpu_name: str, dtype: str, used_by: str, error: BaseException) -> Variant:
    text = traceback.format_exception_only(type(error), error)[-1].strip()
    limit = gpu(gpu_name).shared_memory
    return Variant(
        call.kernel, "", gpu_name, dtype, used_by, {}, 0, 0, 0, 0, 0, limit, "", 0, False, False, 0, error=text
    )


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
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
) -> list[Variant]:
    """Every distinct kernel that these models launch on one GPU in one dtype, compiled and judged."""
    kernels = set(kernels)
    found: dict[tuple[str, int], Variant] = {}
    failures: dict[tuple[str, str], Variant] = {}
    with recording(gpu(gpu_name), torch_device="meta") as recorder, _quiet(verbose):
        for model in models:
            for batch in batches:
                for call in model_calls(ViTConfig.preset(model), batch, getattr(torch, dtype)):
                    if call.kernel not in kernels:
                        continue
                    used_by = f"{model} batch {batch}: {call.label}"
                    recorder.launches.clear()
                    try:
                        call.run()
                    except Exception as error:  # one kernel that does not compile must not hide the others
                        failure = _failed(call, gpu_name, dtype, used_by, error)
                        failures.setdefault((call.kernel, failure.error), failure)
                    for launch in recorder.launches:
                        # The recorder gives every launch of the same machine code the same binary.
                        key = call.kernel, id(launch.binary)
                        if key not in found:
                            found[key] = _from_launch(call, launch, gpu_name, dtype, used_by)
    return [*found.values(), *failures.values()]


def evidence(variants: list[Variant], models: Sequence[str], batches: Sequence[int]) -> list[records.Record]:
    """One record per kernel, dtype and GPU: passed when every variant may ship."""
    groups: dict[tuple[str, str, str], list[Variant]] = {}
    for variant in variants:
        groups.setdefault((variant.kernel, variant.dtype, variant.gpu), []).append(variant)
    made = []
    for (kernel, dtype, gpu_name), group in groups.items():
        made.append(
            records.Record(
                kernel=kernel,
                dtype=dtype,
                capability=gpu(gpu_name).capability,
                source=records.source_hash(kernel),
                passed=not any(v.error for v in group),
                versions=records.versions(),
                date=records.today(),
                detail={
                    "models": list(models),
                    "batches": list(batches),
                    "variants": len(group),
                    "most_registers": max(v.registers for v in group),
                    "most_shared": max(v.shared for v in group),
                    "stack": max(v.stack for v in group),
                    "tensor": sorted({v.tensor for v in group if v.tensor}),
                    "errors": sorted({v.error for v in group if v.error}),
                },
            )
        )
    return made


def _line(variant: Variant) -> str:
    tile = " ".join(f"{k[6:].lower()}{v}" for k, v in variant.constants.items() if k.startswith("BLOCK_"))
    loads = "TMA" if variant.tma else f"{variant.load_bytes} B"
    return (
        f"{variant.gpu:7}{variant.dtype:9}{variant.function or variant.kernel:20}{tile:20}"
        f"w{variant.num_warps} s{variant.num_stages}  {variant.registers:3} regs {variant.stack:4} B stack "
        f"{variant.shared:6}/{variant.shared_limit} B shared  {variant.tensor:7}{loads:6}"
        f"{'  FAILED: ' + variant.error if variant.error else ''}"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vit_bench.compile_matrix", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--model", nargs="+", choices=sorted(PRESETS), default=sorted(PRESETS), metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=records.DTYPES, default=list(records.DTYPES))
    parser.add_argument("--kernel", nargs="+", choices=records.KERNELS, default=list(records.KERNELS))
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--workers", type=int, choices=(1, 2), default=2)
    parser.add_argument("--json", type=Path, help="write every variant to this file")
    parser.add_argument("--evidence", type=Path, help="merge one record per kernel, dtype and GPU into this file")
    parser.add_argument("--verbose", action="store_true", help="let Triton print its own diagnostics")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if interpreting():
        print("TRITON_INTERPRET is set: unset it, kernels can only be compiled without it", file=sys.stderr)
        return 2
    variants: list[Variant] = []
    # A fresh process per GPU and dtype: Triton keeps what it compiled for as long as the process lives.
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        jobs = [
            pool.apply_async(compile_for, (name, dtype, options.model, options.kernel, options.batch, options.verbose))
            for name in options.gpu
            for dtype in options.dtype
        ]
        for job in jobs:
            for variant in job.get():
                variants.append(variant)
                print(_line(variant), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(v) for v in variants], indent=1, default=str) + "\n")
    if options.evidence:
        records.merge(options.evidence, "compiled", evidence(variants, options.model, options.batch))
    bad = sum(bool(v.error) for v in variants)
    print(f"{len(variants)} kernel variants compiled, {bad} of them unfit to ship")
    return 1 if bad or not variants else 0


if __name__ == "__main__":
    sys.exit(main())
