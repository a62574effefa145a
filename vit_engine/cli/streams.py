"""A standard output that cannot be written ends a command as it ends other tools: where its reader has left, quietly
and with a shell's status for SIGPIPE; on a full disk, or where there is none, with one line.

The libraries in between (typer, rich) end a command with statuses of their own, so what went wrong is noted where bytes
leave the process.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

NOT_WRITTEN = 1
READER_LEFT = 128 + signal.SIGPIPE
# What a device or a file system answers; any other error is no matter of where to write.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Noting(io.FileIO):
    """Notes the first write that failed. quiet: none raises."""

    failed: OSError | None = None
    quiet = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = self.failed or error
            if self.quiet:
                return memoryview(data).nbytes
            raise


def run_with_streams(command: Callable[[], object]) -> None:
    """Runs a command; exits with `READER_LEFT` or `NOT_WRITTEN` where its standard output could not be written.

    A character that the terminal's encoding lacks is printed as an escape. What cannot be written to standard error is
    left out.
    """
    before = sys.stdout, sys.stderr
    if sys.stderr is None:
        # print() would take standard output in its place.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        _give_up("standard output is closed: send it to a file, or to /dev/null")
    out, err = _noting(sys.stdout), _noting(sys.stderr)
    sys.stdout, sys.stderr = out or sys.stdout, err or sys.stderr
    if err is not None:
        _raw(err).quiet = True
    ended: BaseException | None = None
    try:
        command()
    except BaseException as error:
        ended = error
    failed = None
    if out is not None:
        with contextlib.suppress(OSError):
            out.flush()
        failed = _raw(out).failed
        _raw(out).quiet = True  # what is left of it
    if failed is None and isinstance(ended, OSError) and ended.errno in _DISK:
        failed = ended
    if failed is not None:
        if failed.errno == errno.EPIPE:
            sys.exit(READER_LEFT)
        _give_up(f"{failed.filename or 'the output'} could not be written: {failed.strerror}")
    sys.stdout, sys.stderr = before
    if ended is not None:
        raise ended


def _noting(stream: Any) -> io.TextIOWrapper | None:
    """The same stream, with its failures noted; None for what is no file of this process."""
    if not isinstance(stream, io.TextIOWrapper):
        return None
    # A character that the terminal's encoding lacks does not end the command.
    stream.reconfigure(errors="backslashreplace")
    if not isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
        return None
    raw = _Noting(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _raw(stream: io.TextIOWrapper) -> Any:
    return getattr(stream.buffer, "raw", stream.buffer)


def _give_up(why: str) -> NoReturn:
    print(f"vit-engine: {why}", file=sys.stderr)
    sys.exit(NOT_WRITTEN)
