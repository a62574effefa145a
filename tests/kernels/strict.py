"""Triton's interpreter without its leniency.

It reads and writes any address, gives zeros for masked elements that no `other` was named for, and multiplies in full
precision whatever `input_precision` says. On a GPU the first is an error that comes late or never, the second is
undefined and the third is Triton's default of tf32. In a `strict_interpreter` block they are, in this order, an
IndexError, NaN (for integers a number that no index may have), and operands rounded to tf32.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from vit_kernels.launch import tensor_behind


def spans_of(arguments: Any) -> np.ndarray:
    """[tensors, 2]: where the storage of each tensor begins and ends, as addresses."""
    tensors = [tensor for tensor in map(tensor_behind, arguments) if tensor is not None]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return np.array([(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages], np.uint64).reshape(-1, 2)


def refuse_outside(what: str, spans: np.ndarray, at: Any, mask: Any) -> None:
    """Raises IndexError unless all unmasked elements at the addresses `at` lie in one of the spans."""
    first = np.asarray(at.data)[np.asarray(mask.data, bool)].astype(np.uint64)
    if first.size == 0:
        return
    size = np.uint64(at.get_element_ty().primitive_bitwidth // 8)
    # Mostly all of it belongs to one tensor, which its ends tell.
    if ((spans[:, 0] <= first.min()) & (first.max() + size <= spans[:, 1])).any():
        return
    inside = (spans[:, :1] <= first) & (first + size <= spans[:, 1:])
    if not inside.any(0).all():
        raise IndexError(f"{what} outside of every tensor that the launch was given")


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """fp32 with the 13 last bits of the mantissa rounded away, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    bits = (bits + 0xFFF + ((bits >> np.uint64(13)) & np.uint64(1))) & np.uint64(0xFFFFE000)
    return np.where(np.isfinite(values), bits.astype(np.uint32).view(np.float32), values)


@contextlib.contextmanager
def strict_interpreter() -> Iterator[None]:
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
    call = executor.__call__
    spans = np.zeros((0, 2), np.uint64)

    def strict_load(self: Any, at: Any, mask: Any, other: Any, *options: Any, **named: Any) -> Any:
        refuse_outside("a load", spans, at, mask)
        result = load(self, at, mask, other, *options, **named)
        if other is None:
            values = np.asarray(result.data)
            undefined = np.nan if values.dtype.kind == "f" else np.iinfo(values.dtype).max
            result.data = np.where(np.asarray(mask.data, bool), values, np.array(undefined, values.dtype))
        return result

    def strict_store(self: Any, at: Any, value: Any, mask: Any, *options: Any) -> Any:
        refuse_outside("a store", spans, at, mask)
        return store(self, at, value, mask, *options)

    def strict_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *options: Any) -> Any:
        if input_precision != interpreter._ir.INPUT_PRECISION.IEEE:
            a, b = (
                interpreter.TensorHandle(round_to_tf32(x.data), x.dtype.scalar) if x.data.dtype == np.float32 else x
                for x in (a, b)
            )
        return dot(self, a, b, d, input_precision, *options)

    def strict_call(self: Any, *arguments: Any, **constants: Any) -> None:
        nonlocal spans
        spans = spans_of([*arguments, *constants.values()])
        call(self, *arguments, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", strict_load)
        patch.setattr(builder, "create_masked_store", strict_store)
        patch.setattr(builder, "create_dot", strict_dot)
        patch.setattr(executor, "__call__", strict_call)
        yield
