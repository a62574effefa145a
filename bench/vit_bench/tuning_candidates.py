"""What may serve a problem: every tile of the kernel's table, and PyTorch's own operators; what each compiles to, and
whether its result is right."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from vit_bench.cases import Prepared
from vit_bench.compiled_variants import quiet
from vit_bench.tile_choices import forced
from vit_bench.tuning_problems import Problem
from vit_kernels import attention_tiles, gemm_tiles, mlp_tiles, qk_rope_tiles, tiles, with_torch
from vit_kernels.device import Device
from vit_kernels.tuned import Winner

_TABLES: dict[str, tuple[Any, type]] = {
    "linear": (gemm_tiles, gemm_tiles.GemmTile),
    "patch_embed": (gemm_tiles, gemm_tiles.GemmTile),
    "attention": (attention_tiles, attention_tiles.AttentionTile),
    "mlp": (mlp_tiles, mlp_tiles.MlpTile),
}
_ROW_ELEMENTS = 8192  # of a program of a row-wise kernel, at most


def as_winner(choice: Any) -> Winner:
    """A choice as it stands in tuned files: the fields of a tile, "torch", or "two_products"."""
    if choice is None:
        return mlp_tiles.TWO_PRODUCTS
    return choice.value if choice is tiles.TORCH else dataclasses.asdict(choice)


def title(choice: Any) -> str:
    """A choice in a word: its blocks, warps (w) and stages (s), and what else is not as usual."""
    winner = as_winner(choice)
    if isinstance(winner, str):
        return {"torch": "PyTorch", mlp_tiles.TWO_PRODUCTS: "two products"}[winner]
    usual = {field.name: field.default for field in dataclasses.fields(choice)}
    words = ["x".join(str(v) for k, v in winner.items() if k.startswith("block_"))]
    for name, value in winner.items():
        if not name.startswith("block_") and value != usual[name]:
            short = {"num_warps": f"w{value}", "num_stages": f"s{value}"}.get(name, f"{name}={value}")
            words.append(name if value is True else short)
    return " ".join(words)


def _listed(value: Any, tile: type) -> Iterator[Any]:
    """The tiles in nested tuples and dictionaries, as tables of candidates hold them."""
    if isinstance(value, tile):
        yield value
    elif isinstance(value, (tuple, dict)):
        for member in value:
            yield from _listed(member, tile)
            if isinstance(value, dict):
                yield from _listed(value[member], tile)


def _table(kernel: str) -> list[Any]:
    """Every tile that stands in a table of the tile choice: those of other dtypes and GPUs, too, for they may fit."""
    module, tile = _TABLES[kernel]
    found = [member for value in vars(module).values() for member in _listed(value, tile)]
    if kernel == "patch_embed":
        # It has no use for what `linear` does with descriptors and chunks.
        usual = gemm_tiles.GemmTile(16, 16, 16, 1, 1)
        plain = [dataclasses.replace(member, chunk=usual.chunk) for member in found if member.tma == usual.tma]
        return plain + [member for member in found if member.blocks]
    if kernel == "linear":
        return [member for member in found if not member.blocks]
    return found


# What `wide` varies of a tile, one field at a time.
_NEAR: dict[str, Callable[[int], tuple[int, ...]]] = {
    "num_stages": lambda stages: (stages - 1, stages + 1),
    "num_warps": lambda warps: (warps // 2, warps * 2),
    "block_k": lambda step: (step // 2, step * 2),
    "chunk": lambda _: (64, 128, 256),
    "tma": lambda _: (0, 1, 2),
}


def _near(tile: Any) -> Iterator[Any]:
    if getattr(tile, "whole", 0):
        # Its warps and what is in shared memory are part of the kernel, and all that varies is in the table.
        return
    for name, values in _NEAR.items():
        # Where warps have roles, how many there are and what they share out is part of the kernel.
        fixed = any(getattr(tile, name, False) for name in ("roles", "columns", "blocks"))
        if name in vars(tile) and not (fixed and name != "num_stages"):
            for value in values(getattr(tile, name)):
                if value > 0 or name == "tma":
                    yield dataclasses.replace(tile, **{name: value})


def _rows_tiles(default: tiles.RowsTile) -> list[tiles.RowsTile]:
    rows = [rows for rows in (1, 2, 4, 8, 16, 32) if rows * default.block_n <= _ROW_ELEMENTS] or [1]
    return [tiles.RowsTile(m, default.block_n, warps) for m in rows for warps in (1, 2, 4, 8)]


def _qk_rope_tiles(heads: int) -> list[qk_rope_tiles.QkRopeTile]:
    each = [n for n in (1, 2, 4, 8) if n <= heads]
    return [qk_rope_tiles.QkRopeTile(t, n, warps) for t in (8, 16, 32, 64) for n in each for warps in (4, 8)]


def _torch_can(problem: Problem) -> bool:
    fields = problem.fields
    if problem.kernel == "attention":
        options = {"lengths": fields["key_lengths"], "mask": fields["mask"], "lse": fields["return_lse"]}
        return with_torch.attends(fields["queries"], fields["keys"], causal=fields["causal"], **options)
    return problem.kernel in ("linear", "layer_norm")


def _shared_out(problem: Problem) -> Iterator[Any]:
    """The tiles whose programs share out K, as many parts of it as the GPU has room for."""
    m, n, k = (problem.fields[name] for name in ("m", "n", "k"))
    for tile in gemm_tiles.SHARED_TILES:
        shared = gemm_tiles.shared_out(tile, m, n, k, problem.device.sm_count)
        if shared is not None:
            yield shared


def _with_columns(problem: Problem) -> Iterator[Any]:
    """The tiles whose rows are columns of products, of a size that suits the GPU. Whether a residual leaves them
    registers shows when they are compiled."""
    if problem.device.capability == 90:
        yield from gemm_tiles.column_tiles(
            problem.fields["m"], problem.fields["n"], problem.device.sm_count, residual=False
        )


def _fenced_too_soon(problem: Problem, tile: Any) -> bool:
    """Whether values may be read before they are there, which a run need not show: `attention_costs.BLACKWELL`."""
    from_tensor_memory = problem.device.capability in tiles.TENSOR_MEMORY and tile.block_m >= 64
    return from_tensor_memory and tile.num_stages == 2 and tiles.split_width(problem.fields["width"])[1] > 0


def candidates(problem: Problem, *, with_pytorch: bool = True, wide: bool = False) -> list[Any]:
    """What may serve a problem, the modelled choice first: tiles, `tiles.TORCH`, or None for an MLP of two products.

    with_pytorch: with PyTorch's operators; wide: with the tables' neighbours, too, several times as many. Whether a
    tile fits and is right is not known yet.
    """
    found: list[Any] = [problem.default]
    if problem.kernel in ("row_stats", "layer_norm"):
        found += _rows_tiles(problem.default)
    elif problem.kernel == "qk_rope":
        found += _qk_rope_tiles(problem.fields["heads"])
    else:
        table = _table(problem.kernel)
        found += [*table, *(near for tile in table for near in _near(tile))] if wide else table
        if problem.kernel == "linear":
            found += [*_shared_out(problem), *_with_columns(problem)]
    if problem.kernel == "attention":
        found = [tile for tile in found if not _fenced_too_soon(problem, tile)]
    if problem.kernel == "mlp":
        found.append(None)
    if with_pytorch and _torch_can(problem):
        found.append(tiles.TORCH)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel. registers: per thread; spilled: bytes per thread; shared: bytes per CTA."""

    kernel: str
    registers: int
    spilled: int
    shared: int


def reason(error: BaseException) -> str:
    """An exception in one short line; of an AssertionError what it says."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, AssertionError) else f"{type(error).__name__}: {first}"


@contextlib.contextmanager
def _compiling_only() -> Iterator[list[Compiled]]:
    """Triton launches are specialised, compiled, loaded and noted in this block, but not made."""
    run: Any = JITFunction.run
    found: list[Compiled] = []

    def warm_up(self: Any, *arguments: Any, grid: Any, warmup: bool = False, **constants: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **constants)
        kernel._init_handles()  # loads it: the driver's limits are checked, and it counts registers and spills
        found.append(Compiled(kernel.metadata.name, kernel.n_regs, 4 * kernel.n_spills, kernel.metadata.shared))
        return kernel

    with mock.patch.object(JITFunction, "run", warm_up):
        yield found


def compiled(kernel: str, choice: Any, call: Callable[[], object]) -> tuple[list[Compiled], str]:
    """The kernels that a launcher call needs with this choice, and what is wrong with them ("" for nothing)."""
    try:
        with quiet(), _compiling_only() as found, forced(kernel, choice):
            call()
    except Exception as error:  # one candidate that does not compile must not hide the others
        return [], reason(error)
    spilled = [f"{one.kernel} spills {one.spilled} bytes of registers per thread" for one in found if one.spilled]
    return found, "; ".join(spilled)


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """New memory is NaN: what an earlier candidate left there would make up for what a kernel does not write."""
    empty = torch.empty

    def filled(*arguments: Any, **options: Any) -> torch.Tensor:
        made = empty(*arguments, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    with mock.patch.object(torch, "empty", filled):
        yield


def verified(prepared: Prepared, choice: Any) -> dict[str, Any]:
    """Runs a case once with this choice; the figures of its error, or AssertionError where it is not right."""
    with _poisoned(), forced(prepared.case.kernel, choice):
        errors = prepared.judge()
    return {name: {k: float(f"{v:.3g}") for k, v in dataclasses.asdict(one).items()} for name, one in errors.items()}


def modelled_cycles(problem: Problem, choice: Any, device: Device) -> float | None:
    """What the tile choice's model says of a candidate; None where it has no number for it."""
    fields, itemsize = problem.fields, problem.dtype.itemsize
    if choice is tiles.TORCH:
        return None
    if problem.kernel == "attention":
        shape = fields["heads"], fields["queries"], fields["keys"], fields["width"]
        cycles = attention_tiles.attention_cycles(choice, *shape, device) if itemsize == 2 else math.inf
        return cycles if math.isfinite(cycles) else None
    if problem.kernel in ("linear", "patch_embed"):
        shape = fields["m"], fields["n"], fields["k"]
        options = {"operands": 2 if fields.get("gated") else 1, "tf32": fields["tf32"]}
        return gemm_tiles.gemm_cycles(choice, *shape, itemsize, device, **options)
    return None


def by_model(problem: Problem, choices: list[Any], device: Device) -> list[Any]:
    """The choices in the order of their modelled cycles, those without a number last; the default before all."""

    def cycles(choice: Any) -> float:
        value = modelled_cycles(problem, choice, device)
        return math.inf if value is None else value

    return [problem.default, *sorted((choice for choice in choices if choice != problem.default), key=cycles)]
