"""The ttsem sanitizer as a session of the evidence runs, with the PTX instructions that it lacks.

ttsem executes the IR of every launch on the CPU and checks bounds and races, but it knows inline assembly only by its
text. The kernels' pieces of it are taught here: the hardware's tanh as an exact tanh (bounds and races do not depend on
its last bits, and its error on a GPU is covered by tests that inject the 2^-11 that PTX promises), the rounding of two
numbers to bf16, and the wait for the launch before, which is over when ttsem begins a launch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

TANH = "tanh.approx.f32 $0, $1;"
ROUND = "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;"
WAIT = "griddepcontrol.wait; // dummy $0"
LAUNCH = "griddepcontrol.launch_dependents; // dummy $0"


def _tanh(x: Any) -> list[np.ndarray]:
    return [np.tanh(np.asarray(x, np.float32))]


def _round(x: Any) -> list[np.ndarray]:
    """To the nearest bf16, ties to even, as its bits and as fp32; what is no number stays none."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) & np.uint32(0xFFFF0000)
    kept = np.where(np.isnan(x), np.uint32(0x7FFF0000), nearest).astype(np.uint32)
    return [(kept >> 16).astype(np.uint16), kept.view(np.float32)]


def _nothing() -> list[np.ndarray]:
    return [np.zeros((), np.int32)]


def teach_assembly() -> None:
    """Give ttsem 0.1.0 a meaning for the kernels' inline assembly. Calling it again changes nothing."""
    ops = importlib.import_module("ttsem.ops")
    try:
        for text, meaning in ((TANH, (_tanh, "div")), (ROUND, (_round, None)), (WAIT, (_nothing, None))):
            ops.PTX_FRAGMENTS.setdefault(ops._norm_asm(text), meaning)
        ops.PTX_FRAGMENTS.setdefault(ops._norm_asm(LAUNCH), (_nothing, None))
    except AttributeError as error:
        raise RuntimeError(f"this ttsem keeps its PTX fragments elsewhere ({error}); 0.1.0 is what is known") from error


@contextmanager
def sanitized(capability: int) -> Iterator[None]:
    """Every Triton launch in this block runs under ttsem, compiled for `capability`.

    Raises AssertionError at the end when a launch was too large for the race check: it would claim more than was done.
    """
    teach_assembly()
    sanitize = importlib.import_module("ttsem.sanitize")
    with sanitize.session(cc=capability) as state:
        yield
    if not hasattr(state, "races_unchecked"):
        raise RuntimeError("this ttsem does not count launches that were not checked for races; 0.1.0 does")
    if state.races_unchecked:
        raise AssertionError(f"{state.races_unchecked} launch(es) were not checked for races")
