"""Argument checks of the launchers. Each error names the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """A tensor whose values lie in memory as they are: kernels read addresses and strides."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be dense (torch.strided); got {tensor.layout}: call .to_dense() on it")
    if not torch.compiler.is_compiling() and tensor.is_neg():
        raise ValueError(f"{name} must not be a view that is yet to be negated; call .resolve_neg() on it")


def check_floating(name: str, tensor: torch.Tensor, ndim: int) -> None:
    """A tensor of one of the three supported dtypes with this many dimensions."""
    check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(short(d) for d in FLOAT_DTYPES)
        raise TypeError(f"{name} must have dtype {allowed}; got {short(tensor.dtype)}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions; got shape {tuple(tensor.shape)}")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} ({meaning}); got {tuple(tensor.shape)}")


def check_same_dtype(name: str, tensor: torch.Tensor, other: str, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must have the dtype of {other}, {short(dtype)}; got {short(tensor.dtype)}")


def check_same_device(first: str, tensor: torch.Tensor, others: dict[str, torch.Tensor | None]) -> None:
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ValueError(f"{name} must be on the device of {first}, {tensor.device}; got {other.device}")


def check_vector(name: str, vector: torch.Tensor | None, length: int, meaning: str) -> None:
    """An optional vector in any supported dtype; vectors are read through their stride."""
    if vector is not None:
        check_floating(name, vector, 1)
        check_shape(name, vector, (length,), meaning)


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def check_number(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")


def check_eps(eps: float) -> None:
    check_number("eps", eps)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number >= 0; got {eps}")


def check_tf32(tf32: bool, dtype: torch.dtype) -> str:
    """The `input_precision` of every dot: fp32 runs at IEEE precision unless tf32 is asked for."""
    check_flag("tf32", tf32)
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"
