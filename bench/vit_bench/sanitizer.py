"""The ttsem sanitizer as a session of the evidence runs, with the PTX instructions that it lacks.

ttsem executes the IR of every launch on the CPU and checks bounds and races, but it knows inline assembly only by its
text. The kernels' pieces of it are taught here: the hardware's tanh as an exact tanh (bounds and races do not depend
on its last bits, and its error on a GPU is covered by tests that inject the 2^-11 that PTX promises), the rounding of
two numbers to bf16 and the way back, a copy of a register, the wait for the launch before, which is over when ttsem
begins a launch, and what is asked of a cache ahead of that wait, which changes no memory.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

TANH = "tanh.approx.f32 $0, $1;"
ROUND = "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;"
WIDEN = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
COPY = "mov.b32 $0, $1;"
WAIT = "griddepcontrol.wait; // dummy $0"
LAUNCH = "griddepcontrol.launch_dependents; // dummy $0"
FETCH = (
    "{ .reg .pred p; .reg .b64 a; mov.u32 $0, %tid.x; mad.wide.u32 a, $0, 32, $1; setp.lt.u32 p, $0, 128; "
    "shl.b32 $0, $0, 5; setp.lt.and.s32 p, $0, $2, p; @p prefetch.global.L2 [a]; }"
)


def _tanh(x: Any) -> list[np.ndarray]:
    return [np.tanh(np.asarray(x, np.float32))]


def _round(x: Any) -> list[np.ndarray]:
    """To the nearest bf16, ties to even, as its bits and as fp32; what is no number stays none."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) & np.uint32(0xFFFF0000)
    kept = np.where(np.isnan(x), np.uint32(0x7FFF0000), nearest).astype(np.uint32)
    return [(kept >> 16).astype(np.uint16), kept.view(np.float32)]


def _widen(x: Any) -> list[np.ndarray]:
    """From the bits of a bf16 number to fp32."""
    return [(np.asarray(x, np.uint16).astype(np.uint32) << 16).view(np.float32)]


def _copy(x: Any) -> list[np.ndarray]:
    return [np.asarray(x)]


def _nothing(*operands: Any) -> list[np.ndarray]:
    return [np.zeros((), np.int32)]


def teach_assembly() -> None:
    """Give ttsem 0.1.0 a meaning for the kernels' inline assembly. Calling it again changes nothing."""
    ops = importlib.import_module("ttsem.ops")
    try:
        meanings = dict.fromkeys((WAIT, LAUNCH, FETCH), (_nothing, None))
        meanings |= {TANH: (_tanh, "div"), ROUND: (_round, None), WIDEN: (_widen, None), COPY: (_copy, None)}
        for text, meaning in meanings.items():
            ops.PTX_FRAGMENTS.setdefault(ops._norm_asm(text), meaning)
    except AttributeError as error:
        raise RuntimeError(f"this ttsem keeps its PTX fragments elsewhere ({error}); 0.1.0 is what is known") from error


def teach_gluon() -> None:
    """Let ttsem 0.1.0 run kernels in Gluon. Calling it again changes nothing.

    It knows their operations, roles and barriers among them, but asks every kernel for its Triton IR, of which these
    have none, and it leaves what was written through a tensor descriptor unwritten.
    """
    harness: Any = importlib.import_module("ttsem.harness")
    sanitize: Any = importlib.import_module("ttsem.sanitize")
    # `python -m ttsem.sanitize` runs a second copy of that module.
    running: Any = sys.modules["__main__"]
    copies = [module for module in (sanitize, running) if getattr(module, "__package__", "") == "ttsem"]
    try:
        ir_for_launch, write_back = harness.ir_for_launch, sanitize._write_back
        flattened, is_descriptor = harness._flat_args, harness._is_descriptor
    except AttributeError as error:
        raise RuntimeError(f"this ttsem executes launches elsewhere ({error}); 0.1.0 is what is known") from error
    if getattr(ir_for_launch, "knows_gluon", False):
        return

    def ir(record: Any, stage: str, *rest: Any, **options: Any) -> str:
        gluon = getattr(record.fn, "is_gluon", lambda: False)()
        return ir_for_launch(record, "ttgir" if gluon else stage, *rest, **options)

    def write(record: Any, execution: Any) -> None:
        write_back(record, execution)
        for name, value in record.bound.items():
            for leaf, described in flattened(name, value):
                if is_descriptor(described):
                    storage = torch.empty(0, dtype=torch.uint8).set_(described.base.untyped_storage())
                    raw = np.ascontiguousarray(execution.buffer(record, leaf)).view(np.uint8).reshape(-1)
                    storage[: raw.size].copy_(torch.from_numpy(raw.copy()))

    ir.knows_gluon = True  # type: ignore[attr-defined]
    harness.ir_for_launch = ir
    for module in copies:
        module._write_back = write


@contextmanager
def sanitized(capability: int) -> Iterator[None]:
    """Every Triton launch in this block runs under ttsem, compiled for `capability`.

    Raises AssertionError at the end when a launch was too large for the race check: it would claim more than was done.
    """
    teach_assembly()
    teach_gluon()
    sanitize = importlib.import_module("ttsem.sanitize")
    with sanitize.session(cc=capability) as state:
        yield
    if not hasattr(state, "races_unchecked"):
        raise RuntimeError("this ttsem does not count launches that were not checked for races; 0.1.0 does")
    if state.races_unchecked:
        raise AssertionError(f"{state.races_unchecked} launch(es) were not checked for races")
