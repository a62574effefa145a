"""What to say where the kernels are asked for and Triton is not installed, which it need not be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def triton_needed(what: str) -> Iterator[None]:
    """Around imports of the kernels: a ModuleNotFoundError for triton names what needs it, and what does without."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            f"{what} needs Triton, which is not installed (it is published for Linux): pip install triton. Without it "
            "there are vit_engine.ViT on backend 'torch', checkpoints and convert()",
            name="triton",
        ) from error
