"""What benchmarks write and reports read: one JSON file that grows, run by run.

    {"format": "vit-engine benchmark results", "version": 1, "runs": [...], "rows": [...]}

A run is one call of a command on one machine; a row is one contender on one case. A row says where its figures come
from: `source` is "gpu" or "cpu" for a time that was measured there, "compiled" for bounds and modelled times of
compiled code, "not run" with the reason otherwise. Only the first two have `seconds`.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vit_bench.results_check import check_row, check_run

FORMAT, VERSION = "vit-engine benchmark results", 1
OURS = "vit-engine"  # the contender that others are compared with
SUITES = ("kernels", "model", "attention")
SOURCES = ("gpu", "cpu", "compiled", "not run")


@dataclass(frozen=True)
class Spread:
    """Seconds of one call: median, 20th and 80th percentile of `timings` timings."""

    median: float
    p20: float
    p80: float
    timings: int


@dataclass(frozen=True)
class Sustained:
    """Seconds of one call among many without a pause, caches warm, and the clock of the SMs meanwhile, Hz."""

    seconds: float
    clock: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached in the run's own process: bytes/s of a large copy (read and written bytes), FLOP/s of a
    large matrix product by dtype ("bf16")."""

    copy: float
    matmul: dict[str, float]


@dataclass(frozen=True)
class Run:
    """started: UTC, ISO 8601; command: as typed; environment: versions, GPU, driver, CPU, commit, and "times", whether
    a benchmark's rows are "measured" or "compiled" (older files lack it); datasheet: bytes/s ("bandwidth") and
    FLOP/s ("half", "single") of the GPU's datasheet where it is known."""

    started: str
    command: str
    environment: dict[str, Any]
    ceilings: Ceilings | None = None
    datasheet: dict[str, float] | None = None


@dataclass(frozen=True)
class Row:
    """One contender on one case.

    run: place in the file's list of runs; suite: of `SUITES`; case: unique name in the table of shapes; label: what was
    run ("forward", "qkv", "attention"); contender: `OURS` or a baseline; settings: its version and how it was set up;
    device: "H100 SXM", "cpu (EPYC 9654)"; shape: batch, tokens, heads, head_dim, m, n, k, whichever apply;
    source: of `SOURCES`; reason: why it was not run, or what restricts the figures;
    flops, nbytes: of one call, each operand once; images: of one call, 0 for what has none; launches: kernels of one
    call; peak_bytes: most memory that a call holds beyond its inputs and weights; errors: the figures by which
    it was found right; modelled_s, bound_s: seconds by the tile choice's model and by datasheet;
    sustained: on a GPU, of a kernel, beside `seconds`, which are of calls with a pause between them;
    code: registers, spills, shared memory and so on of its kernels, with source "compiled" or beside a time;
    state: clocks, power and temperature of the GPU, read while it ran (nvidia-smi's names).
    """

    run: int
    suite: str
    case: str
    label: str
    contender: str
    device: str
    dtype: str
    source: str
    model: str = ""
    shape: dict[str, int] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    seconds: Spread | None = None
    sustained: Sustained | None = None
    images: int = 0
    flops: int | None = None
    nbytes: int | None = None
    launches: int | None = None
    peak_bytes: int | None = None
    modelled_s: float | None = None
    bound_s: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    code: dict[str, Any] = field(default_factory=dict)
    state: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known, value in (("suite", SUITES, self.suite), ("source", SOURCES, self.source)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        if (self.seconds is not None) != (self.source in ("gpu", "cpu")):
            raise ValueError(f"{self.case}: a row has seconds exactly if it was measured; source is {self.source!r}")

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What makes two rows of different runs figures of the same thing."""
        return self.suite, self.case, self.contender, self.device, self.dtype

    def per_second(self, amount: int | None) -> float | None:
        """Of `images`, `flops` or `nbytes`, by the median; None where there is no time or no amount."""
        return amount / self.seconds.median if self.seconds and amount else None


@dataclass
class Results:
    """A file's content."""

    runs: list[Run] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def shares(self, row: Row) -> dict[str, float]:
        """Shares of peak of a measured row: "datasheet flops", "measured flops", "datasheet bytes", "measured bytes",
        as far as the run knows its ceilings."""
        run, found = self.runs[row.run], {}
        rate, data = row.per_second(row.flops), row.per_second(row.nbytes)
        peak = (run.datasheet or {}).get("single" if row.dtype == "fp32" else "half")
        matmul = run.ceilings.matmul.get(row.dtype) if run.ceilings else None
        ceilings = (
            ("datasheet flops", rate, peak),
            ("measured flops", rate, matmul),
            ("datasheet bytes", data, (run.datasheet or {}).get("bandwidth")),
            ("measured bytes", data, run.ceilings.copy if run.ceilings else None),
        )
        for name, reached, ceiling in ceilings:
            if reached is not None and ceiling:
                found[name] = reached / ceiling
        return found


def load(path: Path) -> Results:
    """The results in a file.

    Raises ValueError, naming the file, for one that is none, or of another version, or whose values cannot be.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last for brackets in brackets without end
        raise ValueError(f"{path}: cannot be read as benchmark results: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path}: is no file of benchmark results ('format' must be {FORMAT!r})")
    if data.get("version") != VERSION:
        raise ValueError(f"{path}: version must be {VERSION}; got {data.get('version')!r}")
    try:
        for name, check in (("runs", check_run), ("rows", check_row)):
            for number, one in enumerate(data[name]):
                check(one, f"{name}[{number}]")
        runs = [Run(**{**run, "ceilings": _made(Ceilings, run["ceilings"])}) for run in data["runs"]]
        rows = [
            # Older files have no sustained times.
            Row(**row | {"seconds": _made(Spread, row["seconds"]), "sustained": _made(Sustained, row.get("sustained"))})
            for row in data["rows"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged benchmark results: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{path}: damaged benchmark results: {error}") from error
    if bad := next((row for row in rows if not 0 <= row.run < len(runs)), None):
        raise ValueError(f"{path}: damaged benchmark results: {bad.case} belongs to run {bad.run} of {len(runs)}")
    return Results(runs, rows)


def _made(of: type[Any], values: dict[str, Any] | None) -> Any:
    return None if values is None else of(**values)


def save(results: Results, path: Path) -> None:
    """Writes the file whole or not at all: an interrupted run leaves the one before."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "runs": [asdict(run) for run in results.runs],
        "rows": [asdict(row) for row in results.rows],
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


_SPREAD = tuple(f"{one.name}_s" if one.name != "timings" else one.name for one in fields(Spread))
_APART = ("shape", "settings", "seconds", "sustained", "errors", "code", "state")
_PLAIN = tuple(one.name for one in fields(Row) if one.name not in _APART)
_SHARES = ("datasheet flops", "measured flops", "datasheet bytes", "measured bytes")
_SHAPE = ("batch", "tokens", "heads", "head_dim", "m", "n", "k")
COLUMNS = (
    *_PLAIN,
    *_SHAPE,
    *_SPREAD,
    "sustained_s",
    "sustained_ghz",
    "images_per_s",
    "tflops",
    "gb_per_s",
    *(f"share of {name}" for name in _SHARES),
    "settings",
)


def write_csv(results: Results, rows: Iterable[Row], path: Path) -> None:
    """The same as a table with one line a row; what a row does not have is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for row in rows:
            line: dict[str, Any] = {name: getattr(row, name) for name in _PLAIN}
            line |= {name: row.shape[name] for name in _SHAPE if name in row.shape}
            if row.seconds is not None:
                line |= dict(zip(_SPREAD, asdict(row.seconds).values(), strict=True))
            if row.sustained is not None:
                line |= {"sustained_s": row.sustained.seconds, "sustained_ghz": row.sustained.clock / 1e9}
            rates = (row.per_second(row.images), row.per_second(row.flops), row.per_second(row.nbytes))
            for name, rate, unit in zip(("images_per_s", "tflops", "gb_per_s"), rates, (1, 1e12, 1e9), strict=True):
                line[name] = None if rate is None else rate / unit
            line |= {f"share of {name}": share for name, share in results.shares(row).items()}
            line["settings"] = "; ".join(f"{name} {value}" for name, value in row.settings.items())
            writer.writerow({name: "" if value is None else value for name, value in line.items()})
