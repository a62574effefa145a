"""Which records of the evidence files say something about the kernels at hand.

A record does that if its kernel's source is still the same and it has run every tile that the preset models get now.
What tiles cost, and which GPUs there are, is no part of that source: it decides which tile a launch gets, never what
the launch computes. So costs may be fitted anew without taking anything from a record, until a tile is chosen that it
has not run.
"""

from __future__ import annotations

import functools

import torch

from vit_bench import records
from vit_bench.evidence import tile_work
from vit_bench.recording import gpu
from vit_bench.tile_choices import Choice, all_choices
from vit_engine.config import PRESETS
from vit_kernels.device import interpreting


@functools.cache
def _source_hash(kernel: str) -> str:
    return records.source_hash(kernel)


@functools.cache
def _choices(dtype: str, capability: int) -> dict[str, list[Choice]]:
    if interpreting():
        raise ValueError("TRITON_INTERPRET is set: unset it, the interpreter does not choose the tiles that a GPU gets")
    return all_choices(getattr(torch, dtype), gpu(f"sm_{capability}"), sorted(PRESETS))


def tiles_to_run(rung: str, record: records.Record) -> set[str]:
    """What a record of this rung, kernel, dtype and GPU must have run, by the names that such a record uses."""
    if record.capability is None:
        return set()
    choices = _choices(record.dtype, record.capability)[record.kernel]
    if rung == "compiled":
        return {str(choice) for choice in choices}
    return {case.name for case, _ in tile_work(record.kernel, choices)}


def counts(rung: str, record: records.Record) -> bool:
    """Whether the record passed, with the source at hand and every tile that is chosen now.

    Raises ValueError in Triton's interpreter, where that cannot be asked.
    """
    if not record.passed or record.source != _source_hash(record.kernel):
        return False
    ran = record.detail.get("tiles" if rung == "compiled" else "passed", ())
    return tiles_to_run(rung, record) <= set(ran)
