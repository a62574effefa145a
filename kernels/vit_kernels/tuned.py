"""Tuned files: what was measured to be fastest on one GPU, and found right there, problem by problem.

`vit-engine tune` writes them and `use_tuned` puts them to use. One file is one JSON object:

    format      1
    gpu         name, capability (90 is sm_90) and sm_count of the GPU that everything was measured on
    versions    triton, torch, and kernels: a hash of the source of vit_kernels
    date        of the last measurement
    lost        candidates that left the GPU unusable: problem, candidate, why; a resumed run does not try them again
    entries     a list; each has
        problem     kernel (the launcher), dtype, shape and options: exactly these are looked up
        winner      the fields of a tile, "torch" (PyTorch's own operators), or "two_products" (mlp: two launches)
        measured    what the choice rests on, for the reader: times in microseconds, errors, what was discarded and why

What was verified is one compiled kernel on one GPU. So an entry counts for the same kernel source, Triton version, GPU
model and problem, and for nothing else; every other problem gets what the tile choice models, with the candidates that
are shipped for the nearest capability.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, TypeVar

import torch
import triton

from .attention_costs import AttentionTile
from .device import INTERPRETED, Where, attach, interpreting
from .gemm_tile import GemmTile
from .mlp_tiles import TWO_PRODUCTS, MlpTile
from .qk_rope_tiles import QkRopeTile
from .tiles import TORCH, RowsTile
from .with_torch import attends

FORMAT = 1

Winner = dict[str, Any] | str
Kind = TypeVar("Kind")

# By launcher: the class of its tiles, and the names that may stand in a tile's place.
WINNERS: dict[str, tuple[type, tuple[str, ...]]] = {
    "patch_embed": (GemmTile, ()),
    "attention": (AttentionTile, (TORCH.value,)),
    "linear": (GemmTile, (TORCH.value,)),
    "row_stats": (RowsTile, ()),
    "layer_norm": (RowsTile, (TORCH.value,)),
    "mlp": (MlpTile, (TWO_PRODUCTS,)),
    "qk_rope": (QkRopeTile, ()),
}
_MAY_BE_0 = ("group_m", "tma", "whole", "kept")
# Kernels in Gluon, which take blocks of other sizes than powers of two.
_IN_GLUON = ("roles", "columns", "staying", "blocks", "whole")


class TunedFileError(ValueError):
    """A tuned file that cannot be used here; the message says what it holds and what is here."""


@dataclass(frozen=True)
class Gpu:
    """What a file was measured on. name: as the driver gives it; capability: 90 is sm_90."""

    name: str
    capability: int
    sm_count: int

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.capability}, {self.sm_count} SMs)"


@dataclass(frozen=True)
class Entry:
    """One problem and its winner; measured: what the choice rests on. See the module's docstring."""

    problem: dict[str, Any]
    winner: Winner
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        return key_of(self.problem)


@dataclass(frozen=True)
class Lost:
    """A candidate that left the GPU unusable."""

    problem: dict[str, Any]
    candidate: str
    why: str


def key_of(problem: Mapping[str, Any]) -> Hashable:
    return frozenset(problem.items())


@dataclass(frozen=True, eq=False)
class Tuned:
    """A tuned file in memory, immutable. Equal to itself alone, so that it can be part of a cached choice's key."""

    gpu: Gpu
    versions: Mapping[str, str]
    date: str
    entries: tuple[Entry, ...] = ()
    lost: tuple[Lost, ...] = ()

    def __post_init__(self) -> None:
        table = {entry.key: entry for entry in self.entries}
        if len(table) < len(self.entries):
            raise TunedFileError("a problem has two entries: " + _twice(self.entries))
        object.__setattr__(self, "_table", table)

    def entry(self, problem: Mapping[str, Any]) -> Entry | None:
        """The entry of exactly this problem, or None."""
        table: dict[Hashable, Entry] = vars(self)["_table"]
        return table.get(key_of(problem))

    def winner(self, problem: Mapping[str, Any]) -> Winner | None:
        """A tile's fields or a name, or None where this very problem was not measured."""
        entry = self.entry(problem)
        return None if entry is None else entry.winner

    def extended(self, entry: Entry) -> Tuned:
        """A table with one entry more."""
        return replace(self, entries=(*self.entries, entry))

    def without(self, problem: dict[str, Any], candidate: str, why: str) -> Tuned:
        """A table that knows of one more candidate that left the GPU unusable."""
        return replace(self, lost=(*self.lost, Lost(problem, candidate, why)))

    def lost_of(self, problem: Mapping[str, Any]) -> dict[str, str]:
        """The candidates of a problem that left the GPU unusable, and what happened."""
        return {one.candidate: one.why for one in self.lost if key_of(one.problem) == key_of(problem)}


def _twice(entries: Iterable[Entry]) -> str:
    seen: set[Hashable] = set()
    return next(str(entry.problem) for entry in entries if entry.key in seen or seen.add(entry.key))


@functools.lru_cache(maxsize=1)
def source_of_kernels() -> str:
    """SHA-256 over the source of this package but for the references: what was verified is this code and no other."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def versions_here() -> dict[str, str]:
    """Of what a file is measured with: triton, torch, and the source of the kernels."""
    return {"triton": triton.__version__, "torch": torch.__version__, "kernels": source_of_kernels()}


def gpus_here() -> dict[Where, Gpu]:
    """The GPUs that launches can go to; the interpreter is one when it runs the kernels."""
    if interpreting():
        return {None: Gpu(INTERPRETED.name, INTERPRETED.capability, INTERPRETED.sm_count)}
    if not torch.cuda.is_available():
        return {}
    found: dict[Where, Gpu] = {}
    for index in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(index)
        gpu = Gpu(seen.name, 10 * seen.major + seen.minor, seen.multi_processor_count)
        found[triton.runtime.driver.active, index] = gpu
    return found


def read_tuned(path: str | os.PathLike[str]) -> Tuned:
    """A tuned file. Raises TypeError for what is no path, TunedFileError for what is no such file (it names the entry,
    and what is wrong with it), OSError for one that cannot be read.

    Winners are checked where they were measured with the kernels that are here; others are not put to use.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be that of a tuned file; got {path!r}")
    try:
        return _table(json.loads(Path(path).read_text(encoding="utf-8")))
    except IsADirectoryError as error:
        raise TunedFileError(f"{path} is a folder: name a file that `vit-engine tune` wrote") from error
    except TunedFileError as error:
        raise TunedFileError(f"{path}: {error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, ValueError, RecursionError) as error:
        raise TunedFileError(f"{path} is no tuned file: {type(error).__name__}: {error}") from error


def _table(content: Any) -> Tuned:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise TunedFileError(f"format must be {FORMAT}; got {found!r}")
    wanted = {"gpu": dict, "versions": dict, "date": str, "entries": list}
    for name, kind in (wanted | {"lost": list} if "lost" in content else wanted).items():
        if not isinstance(content.get(name), kind):
            what = {dict: "an object", list: "a list", str: "text"}[kind]
            raise TunedFileError(f"{name} must be {what}; got {shortened(content.get(name, 'nothing'))}")
    versions = content["versions"]
    # Other kernels have other tiles. Whoever puts the file to use compares versions, so its winners are not followed.
    known = versions.get("kernels") == source_of_kernels()
    entries = tuple(_entry(given, f"entries[{i}]", known) for i, given in enumerate(content["entries"]))
    lost = tuple(_made(Lost, given, f"lost[{i}]") for i, given in enumerate(content.get("lost", ())))
    for i, one in enumerate(lost):
        _check_problem(one.problem, f"lost[{i}]")
    return Tuned(_made(Gpu, content["gpu"], "gpu"), versions, content["date"], entries, lost)


def _made(kind: type[Kind], given: Any, where: str) -> Kind:
    """A dataclass from an object of the file; TunedFileError where its fields are not those of the class."""
    own: Any = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(given, dict):
        raise TunedFileError(f"{where} must be an object with {', '.join(own)}; got {shortened(given)}")
    if unknown := [name for name in given if name not in own]:
        raise TunedFileError(f"{where} has a field {unknown[0]!r}; the fields are {', '.join(own)}")
    for name, one in own.items():
        if name not in given and one.default is MISSING and one.default_factory is MISSING:
            raise TunedFileError(f"{where} has no {name}; the fields are {', '.join(own)}")
        # Annotations are text: a field that is no single one of these has its own check.
        wanted = {"int": int, "bool": bool, "str": str, "dict[str, Any]": dict}.get(one.type)
        if name in given and wanted is not None and type(given[name]) is not wanted:
            what = {int: "a whole number", bool: "true or false", str: "text", dict: "an object"}[wanted]
            raise TunedFileError(f"{where}: {name} must be {what}; got {shortened(given[name])}")
    return kind(**given)


def _check_problem(problem: dict[str, Any], where: str) -> None:
    if not isinstance(problem.get("kernel"), str):
        raise TunedFileError(f"{where}: problem must name a kernel; got {shortened(problem)}")
    for name, value in problem.items():
        if not isinstance(value, (str, int)):
            raise TunedFileError(f"{where}: {name} of the problem must be a whole number, text, true or false; got "
                                 f"{shortened(value)}")  # fmt: skip


def _entry(given: Any, where: str, known: bool) -> Entry:
    entry = _made(Entry, given, where)
    _check_problem(entry.problem, where)
    if not isinstance(entry.winner, (dict, str)):
        raise TunedFileError(f"{where}: winner must be the fields of a tile or a name; got {shortened(entry.winner)}")
    if known:
        _check_winner(entry, f"{where} ({entry.problem['kernel']})")
    return entry


def _check_winner(entry: Entry, where: str) -> None:
    """Raises TunedFileError for a winner that no launch could follow."""
    problem, winner = entry.problem, entry.winner
    if problem["kernel"] not in WINNERS:
        raise TunedFileError(f"{where}: kernel must be one of {', '.join(WINNERS)}")
    kind, names = WINNERS[problem["kernel"]]
    if isinstance(winner, str):
        if winner not in names:
            allowed = " or ".join(["the fields of a tile", *map(repr, names)])
            raise TunedFileError(f"{where}: winner must be {allowed}; got {winner!r}")
        if problem["kernel"] == "attention" and not _attends(problem):
            raise TunedFileError(
                f"{where}: winner must be the fields of a tile: {winner!r} has no mask, key lengths or log-sum, and is "
                "causal for as many queries as keys only"
            )
        return
    tile = asdict(_made(kind, winner, f"{where}: winner"))
    in_gluon = any(tile.get(name) for name in _IN_GLUON)
    for name, value in tile.items():
        least = 0 if name in _MAY_BE_0 else 1
        if value < least and not isinstance(value, bool):
            raise TunedFileError(f"{where}: {name} of the winner must be {least} or more; got {value}")
        if (name.startswith("block_") or name == "num_warps") and value & (value - 1) and not in_gluon:
            raise TunedFileError(f"{where}: {name} of the winner must be a power of two; got {value}")


def _attends(problem: Mapping[str, Any]) -> bool:
    queries, keys = problem.get("queries", 0), problem.get("keys", 0)
    causal, lengths, lse = (bool(problem.get(name)) for name in ("causal", "key_lengths", "return_lse"))
    return attends(queries, keys, causal=causal, lengths=lengths, mask=problem.get("mask", "none"), lse=lse)


def write_tuned(path: str | os.PathLike[str], table: Tuned) -> None:
    """Writes a tuned file, whole or not at all."""
    content = {"format": FORMAT, "gpu": asdict(table.gpu), "versions": dict(table.versions), "date": table.date}
    content["lost"] = [asdict(one) for one in table.lost]
    content["entries"] = [asdict(entry) for entry in table.entries]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".part")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(target)


def use_tuned(path: str | os.PathLike[str], *, strict: bool = True) -> Tuned:
    """From now on the tile choice follows this tuned file, on every GPU of this process that it was measured on.

    It replaces the file used before on these GPUs. Passes that are repeated already (`vit_engine.replay`) and captured
    CUDA graphs keep their kernels, so call it before the first pass. Returns the table that is in use.

    Raises TunedFileError when no GPU here is the file's (GPU and file are named), or when it was measured with another
    Triton version or other kernel source. strict=False: then none of its entries is used, with a warning. Another
    version of PyTorch is only warned of: results stay right, its own operators may be faster or slower now. Raises
    TunedFileError for what is no such file, OSError where it cannot be read, TypeError for what is no path.
    """
    table = read_tuned(path)
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be True or False; got {strict!r}")
    here = gpus_here()
    places = [where for where, gpu in here.items() if gpu == table.gpu]
    if not places:
        found = " and ".join(sorted({str(gpu) for gpu in here.values()})) or "no GPU that the kernels run on"
        raise TunedFileError(f"{path} was measured on {table.gpu}; here is {found}. Measure one with `vit-engine tune`")
    now = versions_here()
    names = {"triton": "Triton", "kernels": "kernel source"}
    other = [f"{names[k]} {table.versions.get(k)}, here is {now[k]}" for k in names if table.versions.get(k) != now[k]]
    if other:
        message = f"{path} was measured with {' and with '.join(other)}"
        if strict:
            raise TunedFileError(f"{message}: measure again with `vit-engine tune`, or ignore it with strict=False")
        warnings.warn(f"{message}: none of its entries is used", stacklevel=2)
        table = Tuned(table.gpu, table.versions, table.date)
    elif table.versions.get("torch") != now["torch"]:
        was = table.versions.get("torch")
        warnings.warn(f"{path} was measured with PyTorch {was}, here is {now['torch']}", stacklevel=2)
    attach(dict.fromkeys(places, table))
    return table


def forget_tuned() -> None:
    """Undoes `use_tuned` on every GPU: the tile choice models again."""
    attach(dict.fromkeys(gpus_here()))
