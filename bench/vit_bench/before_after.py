"""What a change did to the compiled code: two sets of `vit-engine inspect --json`, launch by launch, as Markdown.

    vit-engine inspect --model vit_base_patch16_224 --gpu h100 --batch 64 --json > before.json    # at the commit before
    python -m vit_bench.before_after --before before.json --after after.json --out bench/before_after/CHANGE.md

Compiled only: nothing in such a table was executed or timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vit_bench.arguments import command

HEADS = (
    "launch",
    "tile, warps, stages",
    "registers",
    "CTAs/SM",
    "waves",
    "tensor cores at most",
    "slots per output",
    "modelled, us",
)
NOTE = (
    "Before -> after, one value where nothing changed; compiled only, nothing was timed. *Tensor cores at most*: the "
    "share of the main loop's cycles in which they can be busy, by its busiest unit (100 % where that is they; what "
    "TMA writes to shared memory is not in the code and not counted); *slots per output*: issue slots of the epilogue "
    "per element of the result; *modelled*: by the model of the tile choice, where that commit had one."
)


def what(inspection: dict[str, Any]) -> tuple[str, str, int, str]:
    """What two inspections must share to be compared: model, GPU, batch, dtype."""
    return inspection["model"], inspection["gpu"]["name"], inspection["batch"], inspection["dtype"]


def figures(launch: dict[str, Any]) -> list[str]:
    """One launch's columns behind its name."""
    loops = [loop for loop in launch["main_loops"] if loop["cycles"]["tensor"]]
    shares = [loop["cycles"]["tensor"] / max(loop["cycles"].values()) for loop in loops]
    epilogue, modelled = launch["epilogue"], launch.get("modelled_s")
    slots = epilogue["slots_per_output"] if epilogue else None
    tile = "x".join(str(size) for size in launch["tile"].values())
    return [
        f"{tile} w{launch['num_warps']} s{launch['num_stages']}{' TMA' if launch['code']['tma'] else ''}",
        str(launch["registers"]) + (f" and {launch['stack']} B spilled" if launch["stack"] else ""),
        str(launch["ctas_per_sm"]),
        f"{launch['waves']:.2f}",
        f"{min(shares):.0%}" if shares else "",
        "" if slots is None else f"{slots:.1f}",
        "" if modelled is None else f"{modelled * 1e6:.1f}",
    ]


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """One comparison. Raises ValueError for inspections of different things."""
    if what(before) != what(after):
        raise ValueError(
            f"the inspections must be of one model, GPU, batch and dtype; got {what(before)}, {what(after)}"
        )
    model, gpu, batch, dtype = what(after)
    rows = {launch["label"]: [figures(launch), []] for launch in before["launches"]}
    for launch in after["launches"]:
        rows.setdefault(launch["label"], [[], []])[1] = figures(launch)
    lines = [f"### {model} on {gpu}, batch {batch}, {dtype}", "", _line(HEADS), _line("---" for _ in HEADS)]
    for label, (old, new) in rows.items():
        pairs = zip(old or ["none"] * len(new), new or ["none"] * len(old), strict=True)
        lines.append(_line([label, *(b if a == b else f"{a or 'none'} -> {b or 'none'}" for a, b in pairs)]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def report(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], title: str) -> str:
    """All comparisons; every inspection must have its counterpart."""
    if [what(one) for one in before] != [what(one) for one in after]:
        raise ValueError(
            f"--before and --after must name inspections of the same things in the same order; got "
            f"{[what(one) for one in before]} and {[what(one) for one in after]}"
        )
    tables = (table(old, new) for old, new in zip(before, after, strict=True))
    return "\n\n".join([f"## {title}", NOTE, *tables]) + "\n"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the last for brackets in brackets without end
        raise ValueError(f"{path}: no JSON: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    parser = command("before_after", __doc__)
    parser.add_argument("--before", nargs="+", type=Path, required=True, help="files of vit-engine inspect --json")
    parser.add_argument(
        "--after", nargs="+", type=Path, required=True, help="the same, after the change, in that order"
    )
    parser.add_argument("--title", default="Before and after")
    parser.add_argument("--out", type=Path, help="file to write; by default the terminal")
    options = parser.parse_args(arguments)
    try:
        before, after = ([_read(path) for path in paths] for paths in (options.before, options.after))
        text = report(before, after, options.title)
    except (OSError, ValueError) as error:
        print(f"cannot compare: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError) as error:
        print(f"cannot compare: not the output of vit-engine inspect --json: {error!r}", file=sys.stderr)
        return 2
    if options.out is None:
        print(text, end="")
        return 0
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    except OSError as error:
        print(f"--out {options.out} cannot be written: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
