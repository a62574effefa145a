"""Peak activation memory of a forward pass, ours beside eager PyTorch's, from recorded allocations; no GPU needed.

    python -m vit_bench.memory --model vit_base_patch16_224 --batch 256

Both are timm's model: eager on meta tensors, its attention as one fused operator that allocates its result alone;
accelerated on memory that nobody writes, launches recorded instead of made. Counted are the tensors of one pass from
their allocation until they are freed, its result among them. Images, parameters and folded weights are not: they are
there before. Left out are PyTorch's rounding of sizes and what its allocator caches, workspaces of cuBLAS, and copies
that a fused attention makes inside; eager's figure is a lower bound for that reason.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vit_bench.arguments import command, gpu_name, positive
from vit_bench.dropin_launches import OneAttention, forget_replays
from vit_bench.plan import DTYPES
from vit_bench.recording import gpu, recording
from vit_bench.warmup import BatchError, blank, blank_images
from vit_kernels.device import interpreting


@dataclass(frozen=True)
class Peak:
    """nbytes: most bytes alive at a time; alive: what was then, largest first, as (bytes, what it is)."""

    nbytes: int
    alive: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Memory:
    """Of one model and batch. as_written: ours when a shape is new, and what a CUDA graph holds; noted: ours in the
    second pass of a shape; repeated: from the third on, when intermediate results share one allocation."""

    model: str
    batch: int
    dtype: str
    depth: int
    eager: Peak
    as_written: Peak
    noted: Peak
    repeated: Peak


class Allocations:
    """Tensors that come into being while it is told of them, and which of them are alive at a time."""

    def __init__(self) -> None:
        self.peak = Peak(0, ())
        self._alive: dict[int, tuple[int, str]] = {}
        self._numbers: dict[int, int] = {}  # of a storage's address as an object, while it lives
        self._next = itertools.count()

    def note(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._numbers or not storage.nbytes():
            return
        number = self._numbers[place] = next(self._next)
        self._alive[number] = storage.nbytes(), f"{name} {list(tensor.shape)} {str(tensor.dtype)[6:]}"
        weakref.finalize(storage, self._freed, place, number)
        total = sum(nbytes for nbytes, _ in self._alive.values())
        if total > self.peak.nbytes:
            self.peak = Peak(total, tuple(sorted(self._alive.values(), reverse=True)))

    def _freed(self, place: int, number: int) -> None:
        self._alive.pop(number, None)
        if self._numbers.get(place) == number:
            del self._numbers[place]


class _Operators(TorchDispatchMode):
    """Tells of every tensor that an operator returns and was not given."""

    def __init__(self, allocations: Allocations) -> None:
        super().__init__()
        self._allocations = allocations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._allocations.note(leaf, func._opname)
        return result


@contextlib.contextmanager
def _launchers(allocations: Allocations) -> Iterator[None]:
    """Tells of what launchers and repeated passes allocate, inside operators, where no mode looks."""
    empty = torch.empty

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        result = empty(*args, **kwargs)
        allocations.note(result, "empty")
        return result

    with mock.patch.object(torch, "empty", noting):
        yield


def peak_of(run: Callable[[], object], operators: bool = True, launchers: bool = True) -> Peak:
    """Of run(), whose result counts.

    operators: notes what PyTorch's operators return; then no pass is repeated, as its operators are watched. launchers:
    notes torch.empty in Python, too; on the meta device some of PyTorch's own operators are Python code that calls it.
    """
    allocations, nothing = Allocations(), contextlib.nullcontext()
    with _launchers(allocations) if launchers else nothing, _Operators(allocations) if operators else nothing:
        result = run()
    del result
    return allocations.peak


@torch.no_grad()
def measure(name: str, batch: int, dtype: str = "bf16", gpu_name: str = "sm_90", depth: int | None = None) -> Memory:
    """timm's model of that name. depth: encoder blocks, the model's own by default; the peak lies inside one block.

    Raises BatchError for more images than this machine has memory for: they exist, and nobody writes them.
    """
    import timm

    build = partial(timm.create_model, name, **({} if depth is None else {"depth": depth}))
    with torch.device("meta"):
        eager: Any = build().eval().to(DTYPES[dtype])
    size = tuple(eager.default_cfg["input_size"])
    images = torch.empty(batch, *size, dtype=DTYPES[dtype], device="meta")
    with OneAttention():
        of_eager = peak_of(lambda: eager(images), launchers=False)
    ours = blank(build, DTYPES[dtype])
    images = blank_images(batch, size, DTYPES[dtype])
    with recording(gpu(gpu_name), compiles=False) as recorder:
        recorder.launches = Forgotten()
        ours(images)  # folds
        forget_replays(ours)
        as_written = peak_of(lambda: ours(images))
        ours(images)
        noted, repeated = (peak_of(lambda: ours(images), operators=False) for _ in range(2))
    return Memory(name, batch, dtype, len(eager.blocks), of_eager, as_written, noted, repeated)


class Forgotten(list):
    """Launches hold their arguments: kept, they would keep every tensor."""

    def append(self, launch: object) -> None: ...


def _print(found: Memory) -> None:
    print(f"peak activation memory of {found.model}, batch {found.batch}, {found.dtype}; recorded, no GPU used")
    for label, peak in (
        ("eager", found.eager),
        ("accelerated, shape seen before", found.repeated),
        ("accelerated, its second pass", found.noted),
        ("accelerated, new shape or CUDA graph", found.as_written),
    ):
        print(f"  {label:<40}{peak.nbytes / 1e6:9.1f} MB  {peak.nbytes / found.eager.nbytes:5.2f} of eager's")
        for nbytes, what in peak.alive:
            if nbytes >= peak.nbytes / 100:
                print(f"      {nbytes / 1e6:8.1f} MB  {what}")


def _refusal(model: str) -> str | None:
    """Why there is no such model, if there is none."""
    try:
        from timm import is_model
    except ImportError:
        return "it is timm's that is compared, accelerated and eager, and timm is not installed: pip install timm"
    return None if is_model(model) else f"timm has no model {model!r}"


def main(arguments: list[str] | None = None) -> int:
    parser = command("memory", __doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm's name")
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--gpu", type=gpu_name, default="sm_90")
    parser.add_argument("--depth", type=positive, help="encoder blocks; the model's own by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    if why := _refusal(options.model):
        parser.error(f"argument --model: {why}")
    if interpreting():
        print("TRITON_INTERPRET is set: unset it, the launch path is another one with it", file=sys.stderr)
        return 2
    try:
        found = measure(options.model, options.batch, options.dtype, options.gpu, options.depth)
    except TypeError as error:  # accelerate() does not take it, or timm does not build it so deep
        parser.error(f"argument --model: {options.model!r}: {error}")
    except BatchError as error:
        parser.error(f"argument --batch: {error}")
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        _print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
