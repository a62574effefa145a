"""The shapes of an attention profile: sequence lengths, head counts, and how many images go with them."""

from __future__ import annotations

from dataclasses import dataclass

from vit_engine.config import ViTConfig

# Tokens of ViTs: 224 / 32, 224 / 16, 256 / 16, 384 / 16 and 512 / 16 with a class token, DINOv2 at 518 / 14, and the
# images of 1024 and 2048 pixels that segmentation runs on.
VIT_TOKENS = (50, 197, 257, 577, 1025, 1370, 4096, 16384)
HEADS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64)  # those of ViT-Ti, S, B, L and H are among them
TOKENS_AT_ONCE = 16384  # of all images together, unless a batch is given
MOST_ROWS = 2**31 - 1  # of queries in all heads: kernels and grids number them in 32 bits
_STEPS = (64, 96)  # and what doubling makes of them


@dataclass(frozen=True)
class Point:
    """One problem: self-attention of `batch` images, `tokens` queries and keys in each of `heads` heads."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str

    @property
    def shape(self) -> dict[str, int]:
        return {"batch": self.batch, "tokens": self.tokens, "heads": self.heads, "head_dim": self.head_dim}

    def __str__(self) -> str:
        return f"attention/h{self.heads}d{self.head_dim}/n{self.tokens}/b{self.batch}"


def span(text: str, name: str) -> tuple[int, int]:
    """FIRST:LAST or a number as two numbers: "50:16384" as (50, 16384), "197" as (197, 197).

    Raises ValueError that names the argument `name` for anything else, and unless 1 <= first <= last.
    """
    first, colon, last = text.partition(":")
    try:
        low, high = int(first), int(last if colon else first)
    except ValueError:
        low = high = 0
    if not 1 <= low <= high:
        raise ValueError(f"{name} must be a number or FIRST:LAST, such as 50:16384, from 1 on; got {text!r}")
    return low, high


def token_counts(low: int, high: int) -> list[int]:
    """Sequence lengths from `low` to `high`: both ends, ViT's own, and 64, 96, 128, 192, 256, 384 and so on."""
    doubled = (step << n for n in range(high.bit_length()) for step in _STEPS)
    return sorted({low, high, *(tokens for tokens in (*VIT_TOKENS, *doubled) if low <= tokens <= high)})


def head_counts(low: int, high: int, own: int) -> list[int]:
    """Head counts from `low` to `high` as models have them, both ends and the model's own."""
    return sorted({low, high, own, *(heads for heads in HEADS if low <= heads <= high)})


def images_for(tokens: int) -> int:
    """The largest power of two of images that have at most `TOKENS_AT_ONCE` tokens together, at least 1."""
    return 1 << max((TOKENS_AT_ONCE // tokens).bit_length() - 1, 0)


def points(
    config: ViTConfig, tokens: tuple[int, int], heads: tuple[int, int], batch: int | None, dtype: str
) -> list[Point]:
    """A model's attention over sequence lengths with its own heads, then over head counts at its own length.

    batch: images of every point; None: as many as `images_for` says, so that all points have about as many tokens.
    Raises ValueError that names the arguments for a point of more rows than kernels count.
    """

    def point(count: int, number: int) -> Point:
        return Point(batch or images_for(count), count, number, config.head_dim, dtype)

    lengths = [point(count, config.num_heads) for count in token_counts(*tokens)]
    numbers = [point(config.num_tokens, number) for number in head_counts(*heads, config.num_heads)]
    found = list(dict.fromkeys((*lengths, *numbers)))
    for one in found:
        if (rows := one.batch * one.heads * one.tokens) > MOST_ROWS:
            shape = f"{one.batch} x {one.heads} x {one.tokens}"
            raise ValueError(
                f"--batch x --heads x --tokens must be at most {MOST_ROWS} at every point; got {shape} = {rows}"
            )
    return found
