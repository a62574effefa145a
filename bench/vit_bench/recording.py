"""A Triton driver without a GPU: launches are specialised and compiled for a chosen GPU, and recorded, not executed.

    with recording(H100) as recorder:
        vit_kernels.linear(x, weight)              # CPU tensors; the result's memory is never written
    print(recorder.launches)

Everything up to the launch is Triton's own: argument binder, specialisation, cache, compiler, ptxas and the check of
shared memory against the GPU's limit. Works with Triton 3.6 to 3.9; the private interfaces that it stands on are
`driver._active`, `launcher_cls(src, metadata)`, `utils.load_binary`, `utils.get_device_properties` and, for recording
without compiling, `JITFunction._do_compile`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as triton_driver
from triton.runtime.jit import JITFunction

from vit_bench.sass import Resources, resources
from vit_kernels import folding
from vit_kernels.device import KNOWN_DEVICES, Device, interpreting

# Triton keys its caches of compiled kernels and of device limits by device number alone, so every recorder has one of
# its own: two recorders for different GPUs in one process never see each other's kernels.
DEVICES = 8  # how many GPUs of its kind a recorder stands for
_device_numbers = itertools.count(1000, DEVICES)


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: its name, machine code and what it takes."""

    name: str
    cubin: bytes = field(repr=False)
    resources: Resources


@dataclass(frozen=True)
class Launch:
    """One recorded launch. shared: bytes per CTA; device: index of the GPU that was current; stream: the handle it went
    to; names, values: the kernel's arguments, as they were passed."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    num_ctas: int
    shared: int
    device: int
    stream: int
    names: tuple[str, ...] = field(repr=False)
    values: tuple[Any, ...] = field(repr=False)
    binary: Binary

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, tensors as "dtype[shape]", others as they are.

        Put together when it is asked for, so that recording costs the host next to nothing.
        """
        return {name: describe_argument(value) for name, value in zip(self.names, self.values, strict=True)}


def describe_argument(value: Any) -> Any:
    """A tensor or tensor descriptor as text; everything else unchanged."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if hasattr(value, "block_shape"):
        return f"{describe_argument(value.base)} in blocks of {list(value.block_shape)}"
    return value


class _NotCompiled:
    """Takes the place of a `Binary` where nothing was compiled; it has nothing to tell."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this launch was recorded without compiling its kernel, so it has no {name}")


class _Uncompiled:
    """Takes the place of Triton's compiled kernel: what a launch is given is recorded, and no code is there."""

    function = packed_metadata = None

    def __init__(self, recorder: RecordingDriver, kernel: Any, options: Any) -> None:
        self._recorder, self._kernel, self._options = recorder, kernel, options

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        _function, _packed, _metadata, _enter_hook, _exit_hook, *arguments = rest
        options = self._options
        self._recorder.launches.append(
            Launch(
                kernel=self._kernel.__name__,
                grid=(x, y, z),
                num_warps=options.num_warps,
                num_stages=options.num_stages,
                num_ctas=options.num_ctas,
                shared=0,
                device=self._recorder.current,
                stream=stream,
                names=tuple(self._kernel.arg_names),
                values=tuple(arguments),
                binary=_NotCompiled(),  # type: ignore[arg-type]
            )
        )


class _Utils:
    """The part of the driver that loads binaries and knows the GPU's limits."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._loaded: dict[tuple[str, bytes], Binary] = {}

    def get_device_properties(self, _device: int) -> dict[str, int]:
        # Clocks and bus width are read by Triton's own heuristics only; no kernel here depends on them.
        return {
            "max_shared_mem": self._device.shared_memory,
            "multiprocessor_count": self._device.sm_count,
            "max_num_regs": 65_536,
            "warpSize": 32,
            "sm_clock_rate": 1_700_000,
            "mem_clock_rate": 1_600_000,
            "mem_bus_width": 5_120,
        }

    def load_binary(self, name: str, cubin: bytes, _shared: int, _device: int) -> tuple[None, Binary, int, int, int]:
        # No module handle, so that nothing has to be unloaded when Triton drops the kernel. Triton takes that for "not
        # loaded yet" and asks again at every launch, which is why what was loaded is kept here.
        if (name, cubin) not in self._loaded:
            self._loaded[name, cubin] = Binary(name, cubin, resources(cubin))
        binary = self._loaded[name, cubin]
        return None, binary, binary.resources.registers, binary.resources.spilled_bytes // 4, 1024


class RecordingDriver(DriverBase):
    """Stands for GPUs described by `device`; `launches` grows with every launch made while it is active.

    current: index of the current GPU, which is what a launch goes to; streams: handle of each GPU's current stream, 0
    for the default stream. Both are for recording what goes to several GPUs (see `several_gpus`).
    """

    def __init__(self, device: Device, torch_device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.launches: list[Launch] = []
        self.utils = _Utils(device)
        self._torch_device = torch.device(torch_device)
        self._number = next(_device_numbers)
        self.current = 0
        self.streams: dict[int, int] = {}

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.device.capability, 32)

    def get_device_capability(self, _device: int = 0) -> tuple[int, int]:
        return divmod(self.device.capability, 10)

    def get_current_device(self) -> int:
        return self._number + self.current

    def set_current_device(self, device: int) -> None:
        self.current = device - self._number

    def get_current_stream(self, device: int | None = None) -> int:
        return self.streams.get(self.current if device is None else device - self._number, 0)

    def get_active_torch_device(self) -> torch.device:
        return self._torch_device

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed here: launches are recorded, not executed")

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """What Triton calls once per compiled kernel; the result is called once per launch."""
        names = tuple(src.fn.arg_names)

        def launch(x: int, y: int, z: int, stream: int, binary: Binary, *rest: Any) -> None:
            _packed, _launch_metadata, _enter_hook, _exit_hook, *arguments = rest
            self.launches.append(
                Launch(
                    kernel=metadata.name,
                    grid=(x, y, z),
                    num_warps=metadata.num_warps,
                    num_stages=metadata.num_stages,
                    num_ctas=metadata.num_ctas,
                    shared=metadata.shared,
                    device=self.current,
                    stream=stream,
                    names=names,
                    values=tuple(arguments),
                    binary=binary,
                )
            )

        return launch


def require_compiler() -> None:
    """Raises RuntimeError where Triton interprets: a launch is not compiled then, and there is nothing to record."""
    if interpreting():
        raise RuntimeError("Triton was imported with TRITON_INTERPRET=1 and compiles nothing: unset it and start again")


def gpu(name: str) -> Device:
    """The description of a GPU by capability ("sm_90") or by its name in `vit_kernels.device` ("H100 SXM", "h100").

    Case, spaces, hyphens and underscores do not matter, nor does the form factor behind the name.
    """
    wanted = _plain(name)
    for device in KNOWN_DEVICES:
        if wanted in (f"sm{device.capability}", _plain(device.name), _plain(device.name.removesuffix(" SXM"))):
            return device
    known = ", ".join(dict.fromkeys(f"sm_{device.capability}" for device in KNOWN_DEVICES))
    names = ", ".join(device.name for device in KNOWN_DEVICES)
    raise ValueError(f"gpu must be one of {known} or {names}; got {name!r}")


def target(name: str) -> Device:
    """What `gpu` knows, or any GPU by capability and number of SMs ("sm_89:58" is an L4): all that kernels and the
    choice among them depend on, as GPUs of a capability have the same shared memory. Raises ValueError for others."""
    capability, colon, sms = name.partition(":")
    if not colon:
        return gpu(name)
    device = next((d for d in KNOWN_DEVICES if _plain(capability) == f"sm{d.capability}"), None)
    if device is None or not (sms.isascii() and sms.isdecimal() and 0 < int(sms) < 10_000):
        known = ", ".join(dict.fromkeys(f"sm_{device.capability}" for device in KNOWN_DEVICES))
        raise ValueError(f"gpu must be a name, or {known} with a number of SMs behind it, as sm_89:58; got {name!r}")
    return replace(device, name=f"sm_{device.capability} with {int(sms)} SMs", sm_count=int(sms))


def _plain(name: str) -> str:
    return name.lower().translate({ord(mark): None for mark in " -_"})


@contextmanager
def _no_compiler(recorder: RecordingDriver) -> Iterator[None]:
    """Launches are bound and specialised, but no kernel is compiled for them."""

    def stand_in(self: Any, _key: Any, _signature: Any, _device: Any, _constants: Any, options: Any, *_: Any) -> Any:
        return _Uncompiled(recorder, self, options)

    with mock.patch.object(JITFunction, "_do_compile", stand_in):
        yield


@contextmanager
def recording(device: Device, torch_device: str = "cpu", *, compiles: bool = True) -> Iterator[RecordingDriver]:
    """Make a recorder for `device` Triton's active driver, with tensors expected on `torch_device`.

    What is launched computes nothing, so folded weights are rounded to the nearest meanwhile: for all layers of ViT-H
    `balanced` takes most of a minute.
    compiles: False records launches without compiling them, some hundred times as fast: bound and specialised by Triton
    as ever, but `Launch.shared` is 0 and `Launch.binary` has nothing to tell.
    """
    if not hasattr(triton_driver, "_active"):
        raise RuntimeError("this Triton release keeps its active driver elsewhere; vit_bench.recording must follow")
    before, recorder = triton_driver._active, RecordingDriver(device, torch_device)
    triton_driver.set_active(recorder)
    try:
        with (
            mock.patch.object(folding, "balanced", torch.Tensor.to),
            contextlib.nullcontext() if compiles else _no_compiler(recorder),
        ):
            yield recorder
    finally:
        triton_driver._active = before


@contextmanager
def several_gpus(recorder: RecordingDriver) -> Iterator[None]:
    """In this block PyTorch's current CUDA device is the recorder's: `torch.cuda.current_device`, `torch.cuda.device`.

    For fake tensors (`FakeTensorMode`) on "cuda:0", "cuda:1" and so on, of which no machine needs to have any.
    """

    @contextmanager
    def on_device(device: torch.device | int) -> Iterator[None]:
        before = recorder.current
        recorder.current = device if isinstance(device, int) else device.index
        try:
            yield
        finally:
            recorder.current = before

    with (
        mock.patch.object(torch.cuda, "current_device", lambda: recorder.current),  # noqa: PT008 (asked anew each time)
        mock.patch.object(torch.cuda, "device", on_device),
    ):
        yield
