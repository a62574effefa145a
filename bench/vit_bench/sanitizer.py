"""The ttsem sanitizer as a session of the evidence runs, with the one PTX instruction that it lacks.

ttsem executes the IR of every launch on the CPU and checks bounds and races, but it knows inline assembly only by its
text. The kernels' single piece of it is the hardware's tanh, which is taught here as an exact tanh: bounds and races
do not depend on its last bits, and its error on a GPU is covered by tests that inject the 2^-11 that PTX promises.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

TANH = "tanh.approx.f32 $0, $1;"


def _tanh(x: Any) -> list[np.ndarray]:
    return [np.tanh(np.asarray(x, np.float32))]


def teach_tanh() -> None:
    """Give ttsem 0.1.0 a meaning for the kernels' inline assembly. Calling it again changes nothing."""
    ops = importlib.import_module("ttsem.ops")
    try:
        ops.PTX_FRAGMENTS.setdefault(ops._norm_asm(TANH), (_tanh, "div"))
    except AttributeError as error:
        raise RuntimeError(f"this ttsem keeps its PTX fragments elsewhere ({error}); 0.1.0 is what is known") from error


@contextmanager
def sanitized(capability: int) -> Iterator[None]:
    """Every Triton launch in this block runs under ttsem, compiled for `capability`.

    Raises AssertionError at the end when a launch was too large for the race check: it would claim more than was done.
    """
    teach_tanh()
    sanitize = importlib.import_module("ttsem.sanitize")
    with sanitize.session(cc=capability) as state:
        yield
    if not hasattr(state, "races_unchecked"):
        raise RuntimeError("this ttsem does not count launches that were not checked for races; 0.1.0 does")
    if state.races_unchecked:
        raise AssertionError(f"{state.races_unchecked} launch(es) were not checked for races")
