"""Runs one check in this process and notes every step in a file, so that whoever started it survives its end.

    TRITON_INTERPRET=1 python -m vit_bench.full.child cases/linear/fp16

With --events FILE the notes go there, one JSON object a line, else to standard output:

    {"event": "plan", "parts": [names]}, then for each part {"event": "start", "part": i} and {"event": "end",
    "part": i, "status", "reason", "figures", "seconds"}, and at last {"event": "done"}.

A part that raises does not stop the others; the exit status is 1 then. One that leaves the GPU unusable does: the
process ends with 3, and the caller starts another with --start at the next part.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vit_bench.arguments import command
from vit_bench.full.checks import NAMES, PARTS_FAILED
from vit_bench.full.parts import CannotRunError, Part, parts_of

GPU_LOST = 3  # exit status


def gpu_lost() -> bool:
    """Whether an earlier error has made this process's CUDA context useless."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        return True
    return False


def run_part(part: Part) -> dict[str, Any]:
    """status, reason, figures and seconds of one part; its traceback goes to standard error."""
    started = time.perf_counter()
    status, reason, figures = "passed", "", {}
    try:
        figures = part.run()
    except CannotRunError as error:
        status, reason = "not run", str(error)
    except Exception as error:  # a part that fails must not hide the others
        traceback.print_exc()
        status, reason = "failed", str(error)
        if not isinstance(error, AssertionError) or not reason:
            reason = f"{type(error).__name__}: {error}"
    return {"status": status, "reason": reason, "figures": figures, "seconds": round(time.perf_counter() - started, 3)}


def run(parts: Sequence[Part], start: int, note: Callable[[dict[str, Any]], None]) -> int:
    """Runs the parts from number `start` on; the exit status of the process."""
    note({"event": "plan", "parts": [part.name for part in parts]})
    status = 0
    for number, part in enumerate(parts[start:], start):
        note({"event": "start", "part": number})
        result = run_part(part)
        if result["status"] == "failed":
            status = PARTS_FAILED
        lost = result["status"] == "failed" and gpu_lost()
        if lost:
            result |= {"status": "crashed", "reason": f"the GPU cannot be used any more: {result['reason']}"}
        note({"event": "end", "part": number, **result})
        if lost:
            return GPU_LOST
    note({"event": "done"})
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command("full.child", __doc__)
    parser.add_argument("check", help="name of a check, as `vit-engine verify --full --list` prints it")
    parser.add_argument("--events", type=Path, help="file that the notes are added to")
    parser.add_argument("--start", type=int, default=0, help="number of the first part to run")
    options = parser.parse_args(arguments)

    def note(event: dict[str, Any]) -> None:
        line = json.dumps(event) + "\n"
        if options.events is None:
            sys.stdout.write(line)
            return
        # Opened anew each time: what was noted is in the file whatever happens to this process next.
        with options.events.open("a", encoding="utf-8") as file:
            file.write(line)

    if options.check not in NAMES:
        parser.error(f"no check is called {options.check!r}")
    return run(parts_of(options.check), options.start, note)


if __name__ == "__main__":
    sys.exit(main())
