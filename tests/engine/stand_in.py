"""Replays without a GPU: a stand-in for launching compiled kernels again.

The interpreter has no compiled kernel to launch again. The stand-in takes the addresses that a replay hands out, reads
them as the tensors they stand for, and interprets the kernel on that memory, so a buffer that is placed or reused
wrongly shows in the result.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from vit_engine import launches, replay

KERNELS = {
    "patch_embed": ["patch_embed_kernel"],
    "attention": ["attention_kernel"],
    "linear": ["linear_kernel", "linear_parts_kernel", "linear_sum_kernel", "linear_tma_kernel"],
    "norm": ["layer_norm_kernel", "row_stats_kernel"],
    "mlp": ["mlp_kernel"],
    "qk_rope": ["qk_rope_kernel"],
}


def without_memory(value: Any) -> Any:
    """A tensor, or what a descriptor describes, as its shape alone; everything else as it is."""
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=value.base.to("meta"))
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def filled_in(value: Any, like: Any) -> Any:
    """A launch's argument again, from the address that a replay gave for it."""
    if isinstance(like, TensorDescriptor):
        return dataclasses.replace(like, base=at_address(value.base.data_ptr(), like.base))
    return at_address(value, like) if isinstance(like, torch.Tensor) else value


def at_address(address: int, like: torch.Tensor) -> torch.Tensor:
    """The memory at an address, seen as a tensor of the shape, strides and dtype of `like`."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_byte * (extent * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


# The interpreter keeps the number of the running program in one place for all threads.
_one_interpreter = threading.Lock()


class StandIn:
    """A kernel that launches like Triton's and leaves behind what can be launched again."""

    def __init__(self, kernel: Any, repeated: list[str]) -> None:
        self.kernel, self.repeated = kernel, repeated
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*arguments: Any, **constants: Any) -> Callable[[tuple[Any, ...]], None]:
            with _one_interpreter:
                self.kernel[grid](*arguments, **constants)
            named = dict(zip(self.arg_names, arguments, strict=False)) | constants
            likes = [named[name] for name in self.arg_names]
            # Only shapes are remembered: memory that a replay does not keep alive itself must be gone by then.
            likes = list(map(without_memory, likes))

            def again(values: tuple[Any, ...]) -> None:
                self.repeated.append(self.kernel.fn.__name__)
                given = {
                    name: filled_in(value, like)
                    for name, value, like in zip(self.arg_names, values, likes, strict=True)
                }
                with _one_interpreter:
                    self.kernel[grid](**given, **{k: v for k, v in constants.items() if k not in given})

            return again

        return launch


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that replays launched again."""
    names: list[str] = []
    for module, kernels in KERNELS.items():
        operation = importlib.import_module(f"vit_kernels.{module}")
        for kernel in kernels:
            monkeypatch.setattr(operation, kernel, StandIn(getattr(operation, kernel), names))

    def repeat(launches: Any) -> None:
        for launched in launches:
            launched.compiled(launched.arguments)

    monkeypatch.setattr(replay, "interpreting", lambda: False)
    monkeypatch.setattr(replay, "active_driver", lambda: "stand-in")
    monkeypatch.setattr(launches, "repeat", repeat)
    with torch.no_grad():
        yield names
