"""The tables of ``vit-engine profile``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .tables import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from vit_bench.profiling.model import Share
    from vit_bench.results import Row
    from vit_engine.config import ViTConfig


def print_attention(console: Console, rows: Sequence[Row], times: str, config: ViTConfig, peak: float | None) -> None:
    """Sequence lengths, then head counts; what was not run, with the reasons. peak: FLOP/s, None if not known."""
    from rich.text import Text

    run = [row for row in rows if row.source != "not run"]
    if run:
        console.print(Text(f"Self-attention, head width {config.head_dim}, {run[0].dtype}; {times}"))
    lengths = [row for row in run if row.shape["heads"] == config.num_heads]
    heads = sorted((r for r in run if r.shape["tokens"] == config.num_tokens), key=lambda r: r.shape["heads"])
    for title, some in ((f"{config.num_heads} heads", lengths), (f"{config.num_tokens} tokens", heads)):
        _attention_table(console, f"Throughput with {title}", some, peak)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.source == "not run":
            reasons.setdefault(row.reason, []).append(f"{row.contender}{_at(row)}")
    for reason, names in reasons.items():
        console.print(Text(f"Not run: {'; '.join(names)}: {reason}"))


def _at(row: Row) -> str:
    return f" at {row.shape['tokens']} tokens, {row.shape['heads']} heads" if row.shape else ""


def _attention_table(console: Console, title: str, rows: Sequence[Row], peak: float | None) -> None:
    if not rows:
        return
    from vit_bench.profiling.times import evidence_of, seconds_of

    several = len({row.contender for row in rows}) > 1
    measured = any(row.seconds for row in rows)

    def cells() -> Iterator[list[str]]:
        for row in rows:
            seconds, code = seconds_of(row), next(iter(row.code.get("kernels", ())), {})
            assert row.flops is not None and seconds is not None
            known, rate = evidence_of(row) != "bound", row.flops / seconds
            yield [
                *([row.contender] if several else []),
                *(str(row.shape[name]) for name in ("batch", "tokens", "heads")),
                f"{seconds * 1e6:.1f}" if known else "",
                *([f"{row.seconds.p20 * 1e6:.1f}-{row.seconds.p80 * 1e6:.1f}" if row.seconds else ""] * measured),
                f"{row.bound_s * 1e6:.1f}" if row.bound_s else "",
                f"{rate / 1e12:.1f}" if known else "",
                f"{rate / peak:.0%}" if peak and known else "",
                "x".join(map(str, code.get("tile", {}).values())),
                str(code.get("programs", "")),
                f"{code['waves']:.2f}" if "waves" in code else "",
                f"{code['tile_waste']:.2f}" if "tile_waste" in code else "",
            ]

    heads = ["contender"] * several + ["batch", "tokens", "heads", "us" if measured else "us, modelled"]
    heads += ["p20-p80"] * measured + ["bound", "TFLOP/s", "of peak", "tile", "CTAs", "waves", "waste"]
    note = (
        "Bound: us by the datasheet's arithmetic and memory. TFLOP/s and share of peak count what the result needs; "
        "waste: scores computed by whole tiles over those needed."
    )
    made = list(cells())
    kept = [place for place in range(len(heads)) if any(row[place] for row in made)]
    print_table(
        console,
        title,
        note,
        [heads[place] for place in kept],
        [[row[place] for place in kept] for row in made],
        texts=(0,) if several else (),
    )


# `vit_kernels.gemm_cycles` begins with cycles that an H100 showed; the other models and all bounds begin with none.
LAUNCH_COST = "The time of a product holds what its launch costs, as seen on an H100; the others leave it out."


def print_model(console: Console, shares: Sequence[Share], title: str, forward: float | None) -> None:
    """Where the time goes. forward: seconds of a pass without the profiler, None where nothing was measured."""
    rows = []
    for one in shares:
        bound = [] if one.bound_s is None else [f"{one.bound_s * 1e6:.1f}", f"{one.bound_s / one.seconds:.0%}"]
        kernel = one.kernel.removesuffix("_kernel")
        rows.append([one.label, kernel, f"x{one.launches}", f"{one.seconds * 1e6:.1f}", f"{one.share:.1%}", *bound])
    total, launches = sum(one.seconds for one in shares), sum(one.launches for one in shares)
    bounds = [one.bound_s for one in shares if one.bound_s is not None]
    whole = [f"{sum(bounds) * 1e6:.1f}", f"{sum(bounds) / total:.0%}"] if len(bounds) == len(shares) else []
    rows.append(["forward", "", f"x{launches}", f"{total * 1e6:.1f}", "100%", *whole])
    note = "All launches of a pass together. Bound: by the datasheet, each launch at the larger of its two times."
    if forward is None:
        note += " A launch without a model counts with its bound. " + LAUNCH_COST
    heads = ("launch", "kernel", "times", "us", "share", "bound, us", "bound / time")
    print_table(console, title, note, heads, rows, texts=(0, 1))
    if forward is not None:
        console.print(f"A pass without the profiler: {forward * 1e6:.1f} us, median.")
