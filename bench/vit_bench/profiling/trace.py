"""Traces for chrome://tracing and ui.perfetto.dev: what runs when, in named ranges.

    write_trace(ranges, path, process="modelled, not measured: H100 SXM", about={"model": "vit_base_patch16_224"})

The format is Chrome's "Trace Event Format": an object with `traceEvents`; complete events (ph X) with start and
duration in microseconds, metadata events (ph M) that name process and threads, one thread per lane.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Range:
    """start, duration: seconds; lane: the row it is drawn in; kind: what it is ("kernel", "block")."""

    lane: str
    name: str
    start: float
    duration: float
    kind: str = "kernel"
    arguments: dict[str, Any] = field(default_factory=dict)


def trace(ranges: Sequence[Range], process: str, about: dict[str, Any]) -> dict[str, Any]:
    """The JSON object. process: its name in the viewer, which must say whether times are measured; about: metadata."""
    lanes = {lane: number for number, lane in enumerate(dict.fromkeys(r.lane for r in ranges), 1)}
    events: list[dict[str, Any]] = [_named("process_name", process, 0)]
    for lane, number in lanes.items():
        events.append(_named("thread_name", lane, number))
        events.append({"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": number, "args": {"sort_index": number}})
    events += [
        {
            "name": one.name,
            "cat": one.kind,
            "ph": "X",
            "ts": round(one.start * 1e6, 3),
            "dur": round(one.duration * 1e6, 3),
            "pid": 1,
            "tid": lanes[one.lane],
            "args": one.arguments,
        }
        for one in sorted(ranges, key=lambda r: (lanes[r.lane], r.start, -r.duration))
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"times": process, **about}}


def _named(what: str, name: str, thread: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}


def write_trace(ranges: Sequence[Range], path: Path, process: str, about: dict[str, Any]) -> None:
    path.write_text(json.dumps(trace(ranges, process, about), indent=1) + "\n")
