"""What the commands `python -m vit_bench...` share: how their parsers are made, and types of arguments.

What cannot be meant is refused with the option's name before anything is done.
"""

from __future__ import annotations

import argparse


def command(module: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m vit_bench.MODULE`, described by the first line of the module's docstring."""
    return argparse.ArgumentParser(prog=f"python -m vit_bench.{module}", description=(doc or "").split("\n")[0])


def positive(text: str) -> int:
    """A whole number from 1 on. Raises argparse.ArgumentTypeError for anything else."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on; got {text!r}")
    return int(text)


def gpu_name(text: str) -> str:
    """A name that `recording.gpu` knows. Raises argparse.ArgumentTypeError for any other, and names those."""
    from vit_bench.recording import gpu  # not for commands that need neither PyTorch nor Triton

    try:
        gpu(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
