"""Types of command-line arguments: what cannot be meant is refused with the option's name before anything is done."""

from __future__ import annotations

import argparse

from vit_bench.recording import gpu


def positive(text: str) -> int:
    """A whole number from 1 on. Raises argparse.ArgumentTypeError for anything else."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on; got {text!r}")
    return int(text)


def gpu_name(text: str) -> str:
    """A name that `recording.gpu` knows. Raises argparse.ArgumentTypeError for any other, and names those."""
    try:
        gpu(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
