"""The README's picture: attention over sequence length on a GPU that was not used, modelled and bounded.

python -m vit_bench.report.readme_plot            # writes bench/figures/attention_modelled.svg
python -m vit_bench.report.readme_plot --check    # exit status 1 if the file is not what would be written
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import vit_bench
from vit_bench.profiling.attention import compiled_rows
from vit_bench.profiling.sweep import points
from vit_bench.report import kernels
from vit_bench.report.data import Book
from vit_bench.report.draw_curves import curves
from vit_bench.report.figures import Curves
from vit_bench.report.style import DIM, DRAWING, GRID, INK, LIGHT, PAPER
from vit_bench.report.svg import WIDE, text
from vit_bench.results import Results, Run
from vit_engine.config import ViTConfig
from vit_kernels.device import H100

MODEL, DTYPE = "vit_base_patch16_224", "bf16"
PATH = Path(vit_bench.__file__).parent.parent / "figures" / "attention_modelled.svg"
_HEAD, _EDGE = 66, 20  # pixels above the drawing, and around it


def attention_figure() -> Curves:
    """Our kernel with ViT-B's heads, 50 to 16384 tokens."""
    config = ViTConfig.preset(MODEL)
    some = points(config, (50, 16384), (config.num_heads, config.num_heads), None, DTYPE)
    # The day and the machine are no part of the picture.
    book = Book(Results([Run("", "", {})], list(compiled_rows(some, H100, 0, MODEL))))
    section = kernels.attention(book)
    assert section is not None
    figure = section.items[0].figure
    assert isinstance(figure, Curves)
    return figure


def standalone(figure: Curves) -> str:
    """A figure as an SVG file of its own: light, with its title and what it rests on."""
    inner = curves(figure, WIDE)
    size = re.search(r'viewBox="0 0 \d+ ([\d.]+)"', inner)
    assert size is not None
    height = float(size[1])
    colours = {"ink": INK, "dim": DIM, "paper": PAPER, "line": GRID} | {f"s{n}": one for n, one in enumerate(LIGHT)}
    style = re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], DRAWING)
    outer = f'viewBox="0 0 {WIDE + 2 * _EDGE} {height + _HEAD + _EDGE:g}"'
    title = f"Attention by {figure.title[0].lower()}{figure.title[1:]}"
    said = f"{figure.evidence[0].upper()}{figure.evidence[1:]}"
    named = f'role="img" aria-label="{escape(f"{title}. {said}.")}"'
    placed = f'<svg x="{_EDGE}" y="{_HEAD}" width="{WIDE}" height="{height:g}"'
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" {outer} font-family="system-ui, sans-serif" {named}>',
            f"<style>{style}</style>",
            f'<rect width="100%" height="100%" fill="{PAPER}"/>',
            text(_EDGE, 30, title, kind="strong"),
            text(_EDGE, 49, said, kind="small"),
            inner.replace('<svg class="wide"', placed, 1),
            "</svg>\n",
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vit_bench.report.readme_plot", description="Draws the README's picture."
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if the file is stale")
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args(arguments)
    drawn = standalone(attention_figure())
    if options.check:
        fresh = options.out.is_file() and options.out.read_text(encoding="utf-8") == drawn
        print(f"{options.out}: {'as it would be written' if fresh else 'stale: write it again without --check'}")
        return 0 if fresh else 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(drawn, encoding="utf-8")
    print(f"{options.out}: {len(drawn) / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
