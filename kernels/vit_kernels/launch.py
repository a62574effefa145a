"""How a launcher launches: on which device, with which memory, and noted on a tape when somebody wants to repeat it.

Triton's own launch path binds and specialises every argument anew; on the host that costs more than the launch itself.
A `Tape` keeps what that path arrived at, so that `repeat` can launch the same kernels again on other addresses.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from triton.experimental.gluon import language as gluon_language
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import UnsupportedDeviceError, device_of, interpreting

__all__ = [
    "Launched",
    "Tape",
    "accepts",
    "active_driver",
    "allocate",
    "by_torch",
    "interpreting",
    "launch",
    "launching_on",
    "repeat",
    "taped",
    "tensor_behind",
]


class Launched(NamedTuple):
    """One launch as it was made.

    compiled: Triton's compiled kernel, None where launches are not Triton's (interpreter, sanitizer); arguments: all of
    the kernel's, constants too, in its own order.
    """

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


@dataclass
class Tape:
    """What the launchers of one thread did while it ran: their launches in order, and the tensors they allocated.

    by_torch: the launchers that ran PyTorch's operators in place of a kernel, which the tape does not hold: what it
    holds must then not be launched again as if it were all.
    """

    launches: list[Launched] = field(default_factory=list)
    allocated: list[torch.Tensor] = field(default_factory=list)
    by_torch: list[str] = field(default_factory=list)


_thread = threading.local()


@contextlib.contextmanager
def taped() -> Iterator[Tape]:
    """Notes every launch and allocation that launchers make in this block, on this thread, on a tape of its own."""
    before, tape = getattr(_thread, "tape", None), Tape()
    _thread.tape = tape
    try:
        yield tape
    finally:
        _thread.tape = before


def accepts(device: torch.device | str) -> bool:
    """Whether the kernels can run on tensors of this device, here and now."""
    try:
        device_of(torch.empty(0, device=device))
    except UnsupportedDeviceError:
        return False
    return True


def launching_on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's own GPU the current one: Triton launches on the current device, whatever its arguments say."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def allocate(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Memory for a result beside `like`, in its dtype unless told otherwise; a launch must write all that is read."""
    result = torch.empty(shape, device=like.device, dtype=like.dtype if dtype is None else dtype)
    tape = getattr(_thread, "tape", None)
    if tape is not None:
        tape.allocated.append(result)
    return result


def by_torch(kernel: str) -> None:
    """Notes that the launcher of this name leaves its work to PyTorch's operators."""
    tape = getattr(_thread, "tape", None)
    if tape is not None:
        tape.by_torch.append(kernel)


def launch(on: torch.Tensor, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launches `programs` programs of a kernel on the GPU and current stream of the tensor `on`.

    arguments: the kernel's run-time arguments in order; constants: its compile-time ones, num_warps and num_stages.
    From sm_90 on the launch may begin before the one in front of it has ended: see `primitives.follow`.
    """
    grid = (programs, 1, 1)
    constants["OVERLAP"] = overlap = device_of(on).capability >= 90
    if overlap:
        constants["launch_pdl"] = True
    with launching_on(on):
        compiled = kernel[grid](*arguments, **constants)
    tape = getattr(_thread, "tape", None)
    if tape is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        tape.launches.append(Launched(compiled, grid, tuple(named[name] for name in kernel.arg_names)))


def describe(x: torch.Tensor, *block: int) -> TensorDescriptor:
    """x as a kernel argument that is loaded in blocks of this shape; needs what `describable` asks."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def describe_in_gluon(x: torch.Tensor, *block: int) -> GluonDescriptor:
    """The same for a kernel in Gluon, which also wants to know how a block lies in shared memory."""
    dtype = getattr(gluon_language, str(x.dtype).removeprefix("torch."))
    layout = gluon_language.NVMMASharedLayout.get_default_for(list(block), dtype)
    return GluonDescriptor(x, list(x.shape), list(x.stride()), list(block), layout)


def describable(x: torch.Tensor) -> bool:
    """Whether the hardware can load blocks of x by a descriptor: elements of the last axis lie side by side, and
    everything else starts at multiples of 16 bytes."""
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    )


_DESCRIPTORS = (TensorDescriptor, GluonDescriptor)


class _Address(int):
    """Stands for the tensor at this address in a descriptor, of which a launch asks nothing else."""

    def data_ptr(self) -> int:
        return int(self)


def tensor_behind(argument: object) -> torch.Tensor | None:
    """The tensor that a kernel's argument is, or that it describes; None for everything else."""
    base = argument.base if isinstance(argument, _DESCRIPTORS) else argument
    return base if isinstance(base, torch.Tensor) else None


def at_address(argument: object, address: int) -> object:
    """What takes the place of a tensor, or of the description of one, when the kernel is to work at this address."""
    if not isinstance(argument, _DESCRIPTORS):
        return address
    moved = copy.copy(argument)
    moved.base = _Address(address)
    return moved


def active_driver() -> object:
    """Triton's driver: whatever was compiled under another one cannot be launched under this one."""
    return triton.runtime.driver.active


def repeat(launches: Iterable[Launched]) -> None:
    """Launches again, on the current device and its current stream, without binding or specialising anything.

    Pointers may be given as integers, descriptors as `at_address` makes them. They must be aligned as those of the
    first launch were, and the other arguments the same, because the compiled code relies on both.
    """
    active: Any = active_driver()
    stream = active.get_current_stream(active.get_current_device())
    runtime = triton.knobs.runtime
    if getattr(runtime.launch_enter_hook, "calls", None) or getattr(runtime.launch_exit_hook, "calls", None):
        # A profiler listens: the launch that tells it everything.
        for compiled, grid, arguments in launches:
            compiled[grid](*arguments, stream=stream)
        return
    for compiled, (x, y, z), arguments in launches:
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
