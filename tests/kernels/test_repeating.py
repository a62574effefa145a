"""A launch made again is the call that Triton's own launcher ends in, without what that does in front of it.

With the installed Triton's launcher itself; only its two functions in C are stood in for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.tools.tensor_descriptor import TensorDescriptor

from vit_kernels import repeating
from vit_kernels.launch import Launched, at_address

BLOCK = {"swizzle": 3, "elem_size": 2, "elem_type": 9, "block_size": [64, 64], "fp4_padded": False}
SIGNATURES = {
    "two descriptors": {"x": "tensordesc<fp16[64, 64],#nvmma>", "w": "tensordesc<fp16[64, 64],#nvmma>", "n": "i32"},
    "pointers": {"x": "*fp16", "w": "*fp16", "n": "i32"},
}


class Utils:
    """Triton's functions in C, which note what they are given."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.described: list[tuple[Any, ...]] = []

    def launch(self, *arguments: Any) -> None:
        self.launched.append(arguments)

    def fill_tma_descriptor(self, *arguments: Any) -> tuple[Any, ...]:
        self.described.append(arguments)
        return ("descriptor", *arguments)

    fill_tma_descriptor_tiled = fill_tma_descriptor


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Utils:
    found = Utils()
    streams = {"get_current_device": lambda: 3, "get_current_stream": lambda device: 70 + device}
    driver = SimpleNamespace(utils=found, **streams)
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(lambda self: driver), raising=False)
    return found


def launcher(utils: Utils, kind: str, **changes: Any) -> Any:
    signature = SIGNATURES[kind]
    described = sum("tensordesc" in value for value in signature.values())
    made: Any = object.__new__(nvidia.CudaLauncher)
    sizes = dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0)
    aligned = dict.fromkeys(("global_scratch_align", "profile_scratch_align", "num_ctas"), 1)
    flags = {"launch_cooperative_grid": False, "launch_pdl": True, "gsan_enabled": False}
    vars(made).update({"arg_annotations": (), "kernel_signature": (), **sizes, **aligned, **flags, **changes})
    made.launch = nvidia.wrap_handle_tensordesc(utils.launch, signature, [BLOCK] * described)
    return made


def launched(run: Any, kind: str, address: int = 4096) -> Launched:
    x = torch.zeros(128, 128, dtype=torch.float16)
    argument = TensorDescriptor(x, [128, 128], [128, 1], [64, 64]) if kind == "two descriptors" else x
    compiled = SimpleNamespace(run=run, function=5, packed_metadata=(4, 1))
    return Launched(compiled, (7, 1, 1), (at_address(argument, address), at_address(argument, 8192), 9))


def by_triton(run: Any, one: Launched) -> None:
    run(*one.grid, 73, 5, (4, 1), None, None, None, *one.arguments)


@pytest.mark.parametrize("kind", list(SIGNATURES))
def test_it_is_the_same_call_and_descriptors_are_made_once(kind: str, utils: Utils) -> None:
    run = launcher(utils, kind)
    one = launched(run, kind)
    by_triton(run, one)
    described = len(utils.described)
    assert described == (2 if kind == "two descriptors" else 0)
    again = repeating.Again(one)
    for _ in range(3):
        repeating.repeat([again])
    assert len(utils.launched) == 4 and utils.launched[1:] == utils.launched[:1] * 3
    assert utils.described == utils.described[:described] * 2
    again.make(99)
    assert [call.count(73) for call in utils.launched] == [1, 1, 1, 1, 0] and utils.launched[-1].count(99) == 1


def test_other_addresses_are_another_launch(utils: Utils) -> None:
    run = launcher(utils, "two descriptors")
    repeating.repeat([repeating.Again(launched(run, "two descriptors", address)) for address in (4096, 16384)])
    assert [made[0] for made in utils.described] == [4096, 8192, 16384, 8192]
    assert utils.launched[0] != utils.launched[1]


@pytest.mark.parametrize("changes", [{"global_scratch_size": 8}, {"profile_scratch_size": 8}, {"gsan_enabled": True}])
def test_a_launcher_that_does_more_each_time_is_called_each_time(changes: dict[str, Any], utils: Utils) -> None:
    calls: list[tuple[Any, ...]] = []

    class Busy(nvidia.CudaLauncher):
        def __call__(self, *arguments: Any) -> None:
            calls.append(arguments)

    run = launcher(utils, "pointers", **changes)
    run.__class__ = Busy
    again = repeating.Again(launched(run, "pointers"))
    repeating.repeat([again, again])
    assert calls == [(7, 1, 1, 73, 5, (4, 1), None, None, None, 4096, 8192, 9)] * 2 and utils.launched == []


def test_launchers_of_other_kinds_are_called_each_time(utils: Utils) -> None:
    calls: list[tuple[Any, ...]] = []
    wrapped = launcher(utils, "pointers")
    wrapped.launch = lambda *arguments: calls.append(("unknown wrapper", *arguments[:4]))
    for run in (lambda *arguments: calls.append(arguments[:4]), wrapped):
        again = repeating.Again(launched(run, "pointers"))
        repeating.repeat([again, again])
    assert calls == [(7, 1, 1, 73)] * 2 + [("unknown wrapper", 7, 1, 1, 73)] * 2


def test_hooks_hear_of_launches_made_again(utils: Utils, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(repeating, "by_triton", told.extend)
    again = repeating.Again(launched(launcher(utils, "pointers"), "pointers"))

    def profiler(metadata: Any) -> None:
        """Listens."""

    knobs.runtime.launch_enter_hook.add(profiler)
    try:
        repeating.repeat([again])
    finally:
        knobs.runtime.launch_enter_hook.remove(profiler)
    assert told == [again.launched] and utils.launched == []
