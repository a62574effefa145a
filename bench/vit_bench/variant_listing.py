"""The kernel variants that models need on a GPU, listed without compiling them: a fraction of a second for all presets.

Triton's own specialisation decides what a variant is; only the compiler behind it is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from vit_bench.pairwise import covering_sample
from vit_bench.plan import Call, all_calls
from vit_bench.recording import gpu, recording


@dataclass(frozen=True)
class Listed:
    """One kernel to compile. used_by: the first model, batch and call that needs it; constants: its compile-time
    arguments and launch options."""

    gpu: str
    dtype: str
    kernel: str
    function: str
    used_by: str
    constants: tuple[tuple[str, Hashable], ...]

    def factors(self) -> dict[str, Hashable]:
        """What a pairwise sample varies: GPU, dtype, kernel, tile and each other constant of the kernel."""
        tile = tuple(item for item in self.constants if item[0].startswith(("BLOCK_", "num_")))
        others = {f"{self.function} {name}": value for name, value in self.constants if item_is_option(name)}
        return {"gpu": self.gpu, "dtype": self.dtype, "kernel": self.function, "tile": (self.function, tile), **others}


def item_is_option(name: str) -> bool:
    return not name.startswith(("BLOCK_", "num_", "WIDTH", "MAIN", "TAIL", "GROUP"))


class _NotCompiled:
    """What stands for a compiled kernel: it can be launched, and nothing happens."""

    function = packed_metadata = None

    def run(self, *_: Any) -> None: ...

    def launch_metadata(self, *_: Any) -> None: ...


def used_by(model: str, batch: int, call: Call) -> str:
    return f"{model} batch {batch}: {call.label}"


def list_variants(
    gpu_name: str, dtype: str, models: Sequence[str], kernels: Collection[str], batches: Sequence[int]
) -> list[Listed]:
    """Every distinct kernel that these models, and the families without a preset, launch on one GPU in one dtype, in
    the order in which they need it."""
    found: dict[tuple[str, Any], Listed] = {}
    call_at_hand = ("", "")

    def note(kernel: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, *_: Any) -> Any:
        names = kernel.arg_names
        constants = {names[path[0]]: value for path, value in constexprs.items() if names[path[0]].isupper()}
        constants |= {"num_warps": options.num_warps, "num_stages": options.num_stages}
        launcher, user = call_at_hand
        entry = Listed(gpu_name, dtype, launcher, kernel.fn.__name__, user, tuple(sorted(constants.items())))
        found.setdefault((kernel.fn.__name__, key), entry)
        return _NotCompiled()

    with (
        recording(gpu(gpu_name), torch_device="meta"),
        mock.patch.object(JITFunction, "_do_compile", note),
    ):
        for model, batch, call in all_calls(models, batches, getattr(torch, dtype)):
            if call.kernel in kernels:
                call_at_hand = call.kernel, used_by(model, batch, call)
                call.run()
    return list(found.values())


def pairwise_sample(listed: Iterable[Listed]) -> list[Listed]:
    """Some of the variants, with every pair of factor values that any of them has."""
    listed = list(listed)
    return [listed[index] for index in covering_sample([entry.factors() for entry in listed])]
