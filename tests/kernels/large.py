"""Tensors of more than 2^31 elements that cost no memory, and launches over them that cost no time.

The pages of a mapping that nobody touches occupy nothing, so a tensor may span gigabytes where a test writes a few rows
of it. What a launcher allocates itself is mapped the same way in `last_programs`, and reads as zero until it is
written.

Interpreted, `last_programs` also makes an offset that left its 32 bits a clean failure: every operation on int32 is
checked for overflow (Triton's own `sanitize_overflow` in debug mode, which names the operation). An access outside the
tensors that the launch was given is refused before it is made, as in all tests of this folder (strict.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ..rung import DEVICE, RUNG

INT32 = 2**31
# Python names it from 3.13 on. The kernel then promises no memory for the mapping, so that it may be larger than there
# is memory, under Linux's default overcommit rules and without any.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def sparse(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of zeros (on a GPU: of anything) that occupies memory only where it is touched.

    On a GPU it occupies all of it. Skips the test where there is not as much.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        if RUNG == "executed":
            return torch.empty(shape, dtype=dtype, device=DEVICE)
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except (OSError, torch.OutOfMemoryError) as error:
        pytest.skip(f"{size / 2**30:.0f} GiB cannot be had here, not even untouched: {error}")
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def spread(x: torch.Tensor, axis: int, stride: int | None = None) -> torch.Tensor:
    """The same values as a view in which `axis` is so far stretched that only its last index times stride passes 2^31.

    The stride itself fits 32 bits: a larger one would be passed as a 64-bit number and widen the product by itself.
    """
    steps = x.shape[axis] - 1
    stride = -(-INT32 // steps) if stride is None else stride
    assert (steps - 1) * stride < INT32 <= steps * stride
    assert stride < INT32
    others = [1 if a == axis else n for a, n in enumerate(x.shape)]
    strides = [math.prod(others[a + 1 :]) for a in range(x.ndim)]
    strides[axis] = stride
    view = sparse((steps * stride + math.prod(others),), x.dtype).as_strided(x.shape, strides)
    return view.copy_(x)


@contextlib.contextmanager
def last_programs() -> Iterator[None]:
    """Of every launch in this block only the program with the highest number runs: the last rows and columns.

    It is checked, and what the launcher allocates is mapped, as the module says. On a GPU all run, unchecked.
    """
    if RUNG == "executed":
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    call, set_index, empty = executor.__call__, builder.set_grid_idx, torch.empty
    skipped = ran = 0

    def run_last(self: Any, *arguments: Any, **constants: Any) -> None:
        nonlocal skipped
        count, *others = self.grid
        assert all(n == 1 for n in others), "programs are numbered along the first axis of the grid only"
        skipped = count - 1
        self.grid = (1, 1, 1)
        call(self, *arguments, **constants)

    def set_last(self: Any, x: int, y: int, z: int) -> None:
        nonlocal ran
        ran += 1
        set_index(self, x, y, z)
        self.grid_idx = (x + skipped, y, z)

    def sparse_empty(shape: Any, *others: Any, **options: Any) -> torch.Tensor:
        # The launchers' own way to ask; anything else that torch allocates in passing is none of our business.
        asked_by_launcher = isinstance(shape, tuple) and math.prod(shape) > 0 and "dtype" in options and not others
        return sparse(shape, options["dtype"]) if asked_by_launcher else empty(shape, *others, **options)

    with pytest.MonkeyPatch.context() as patch:
        options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        patch.setattr(builder, "set_grid_idx", set_last)
        patch.setattr(executor, "__call__", run_last)
        patch.setattr(torch, "empty", sparse_empty)
        yield
    assert ran > 0, "no program ran"
