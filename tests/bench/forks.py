"""A process that has imported PyTorch and Triton and forks for each snippet of code that it is sent.

To import the two takes longer than most snippets do. Run as `python -m tests.bench.forks`: a request is a line of JSON
on standard input, {"code", "environment", "cwd", "into"}; the answer is the exit status of the process that ran the
code as its main module, with its standard output and error in the files `out` and `err` of the folder `into`.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import torch  # noqa: F401
import triton  # noqa: F401


def _run(request: dict[str, Any]) -> int:
    """Runs the code in this process. Gives what it would have exited with."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        exec(compile(request["code"], "<snippet>", "exec"), vars(main))
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    return status


def _forked(request: dict[str, Any]) -> int:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(Path(request["into"]) / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
            status = _run(request)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(_forked(json.loads(line)), flush=True)
