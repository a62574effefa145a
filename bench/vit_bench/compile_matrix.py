"""Compiles every kernel, as the preset models and others launch it, for every GPU generation: no GPU needed.

    python -m vit_bench.compile_matrix --gpu sm_90 --model vit_base_patch16_224 --dtype float16 --json out/matrix.json
    python -m vit_bench.compile_matrix --quick

--quick compiles every distinct variant for sm_90, and for the other generations a sample in which every pair of GPU,
dtype, tile and option that occurs together still does.

Fails on a compile error, on shared memory over the GPU's limit, on any spill, and on a 16-bit matrix product that runs
without tensor cores. Compiled code is not executed here.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from vit_bench import records
from vit_bench.arguments import command, positive
from vit_bench.compiled_variants import Variant, compile_for
from vit_bench.plan import BATCHES, HEADS
from vit_bench.recording import gpu
from vit_bench.tile_choices import all_choices
from vit_bench.variant_listing import Listed, list_variants, pairwise_sample
from vit_engine.config import PRESETS
from vit_kernels.device import KNOWN_DEVICES, interpreting

GPUS = tuple(dict.fromkeys(f"sm_{device.capability}" for device in KNOWN_DEVICES))
WHOLE = ("sm_90",)  # compiled whole in the quick matrix: most kernels in Gluon are for it alone


def evidence(variants: list[Variant], models: Sequence[str], batches: Sequence[int]) -> list[records.Record]:
    """One record per kernel, dtype and GPU: passed when every variant may ship."""
    groups: dict[tuple[str, str, str], list[Variant]] = {}
    for variant in variants:
        groups.setdefault((variant.kernel, variant.dtype, variant.gpu), []).append(variant)
    chosen = functools.cache(
        lambda dtype, gpu_name: all_choices(getattr(torch, dtype), gpu(gpu_name), models, batches=batches)
    )
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
                    "models": [heads.family for heads in HEADS] if kernel == "qk_rope" else list(models),
                    "batches": list(batches),
                    "tiles": sorted(str(choice) for choice in chosen(dtype, gpu_name)[kernel]),
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
        f"{variant.shared:6}/{variant.shared_limit} B shared {variant.ctas_per_sm:2} CTAs/SM  "
        f"{variant.tensor:7}{loads:6}{'  FAILED: ' + variant.error if variant.error else ''}"
    )


_COLUMNS = (
    "GPU", "dtype", "kernel", "tile", "options", "warps", "stages", "registers", "stack, B", "shared, B", "of, B",
    "CTAs/SM", "tensor", "loads", "first used by", "verdict",
)  # fmt: skip


def markdown(variants: Sequence[Variant]) -> str:
    """All variants as one Markdown table, and a line that says what it is."""
    rows = []
    for v in variants:
        tile = "x".join(str(value) for name, value in v.constants.items() if name.startswith("BLOCK_"))
        options = ", ".join(
            name if value is True else f"{name}={value}"
            for name, value in v.constants.items()
            if not name.startswith("BLOCK_") and value not in (False, "none")
        )
        loads = "TMA" if v.tma else f"{v.load_bytes} B"
        rows.append(
            (v.gpu, v.dtype, v.function or v.kernel, tile, options, v.num_warps, v.num_stages, v.registers, v.stack,
             v.shared, v.shared_limit, v.ctas_per_sm, v.tensor, loads, v.used_by, v.error or "ok")
        )  # fmt: skip
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    lines += ["| " + " | ".join(str(value).replace("|", "\\|") for value in row) + " |" for row in rows]
    bad = sum(bool(v.error) for v in variants)
    return f"{len(variants)} kernel variants, compiled only (nothing was executed); {bad} unfit to ship.\n\n" + (
        "\n".join(lines) + "\n"
    )


def quick_selection(
    gpus: Sequence[str], dtypes: Sequence[str], models: Sequence[str], kernels: Sequence[str], batches: Sequence[int]
) -> list[Listed]:
    """What --quick compiles besides everything for WHOLE: a pairwise sample of the other generations' variants."""
    others = [name for name in gpus if name not in WHOLE]
    listed = [
        entry for name in others for dtype in dtypes for entry in list_variants(name, dtype, models, kernels, batches)
    ]
    return pairwise_sample(listed)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command("compile_matrix", __doc__)
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--model", nargs="+", choices=sorted(PRESETS), default=sorted(PRESETS), metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=records.DTYPES, default=list(records.DTYPES))
    parser.add_argument("--kernel", nargs="+", choices=records.KERNELS, default=list(records.KERNELS))
    parser.add_argument("--batch", nargs="+", type=positive, default=list(BATCHES))
    parser.add_argument("--quick", action="store_true", help="a pairwise sample for all but sm_90")
    parser.add_argument("--workers", type=int, choices=(1, 2), default=2)
    parser.add_argument("--json", type=Path, help="write every variant to this file")
    parser.add_argument("--table", type=Path, help="write every variant as a Markdown table to this file")
    parser.add_argument("--evidence", type=Path, help="merge one record per kernel, dtype and GPU into this file")
    parser.add_argument("--verbose", action="store_true", help="let Triton print its own diagnostics")
    options = parser.parse_args(arguments)
    if options.quick and options.evidence:
        parser.error("--evidence records whole generations, and --quick compiles samples of some: leave one out")
    for name, path in (("json", options.json), ("table", options.table), ("evidence", options.evidence)):
        if path and path.is_dir():
            parser.error(f"argument --{name}: must be a file; {path} is a folder")
    if options.evidence:
        try:
            records.load(options.evidence)  # the records are merged into it, when all is compiled
        except ValueError as error:
            parser.error(f"argument --evidence: {error}")
    return options


def _write(path: Path | None, text: str) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if interpreting():
        print("TRITON_INTERPRET is set: unset it, kernels can only be compiled without it", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    only: dict[tuple[str, str], set[str]] = {}
    if options.quick:
        chosen = quick_selection(options.gpu, options.dtype, options.model, options.kernel, options.batch)
        only = {(n, d): set() for n in options.gpu if n not in WHOLE for d in options.dtype}
        for entry in chosen:
            only[entry.gpu, entry.dtype].add(entry.used_by)
    variants: list[Variant] = []
    # A fresh process per GPU and dtype: Triton keeps what it compiled for as long as the process lives.
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        jobs = [
            pool.apply_async(
                compile_for,
                (name, dtype, options.model, options.kernel, options.batch, options.verbose, only.get((name, dtype))),
            )
            for name in options.gpu
            for dtype in options.dtype
        ]
        for job in jobs:
            for variant in job.get():
                variants.append(variant)
                print(_line(variant), flush=True)
    _write(options.json, json.dumps([asdict(v) for v in variants], indent=1, default=str) + "\n")
    _write(options.table, markdown(variants))
    if options.evidence:
        records.merge(options.evidence, "compiled", evidence(variants, options.model, options.batch))
    bad = sum(bool(v.error) for v in variants)
    counts = ", ".join(f"{count} for {name}" for name, count in Counter(v.gpu for v in variants).items())
    seconds = time.perf_counter() - begin
    print(f"{len(variants)} kernel variants compiled ({counts}) in {seconds:.0f} s, {bad} of them unfit to ship")
    return 1 if bad or not variants else 0


if __name__ == "__main__":
    sys.exit(main())
