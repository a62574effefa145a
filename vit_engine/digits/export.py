"""Write the held-out digits as image files: ``python -m vit_engine.digits.export --out DIR``.

Files are numbered in the random order of the split, so that no name tells the digit; ``labels.csv`` does, and gives the
row of ``load_digits`` each image is.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from PIL import Image

from . import HELDOUT, data


def export(folder: Path) -> int:
    """Write ``NNN.png`` (8 x 8, greyscale) and ``labels.csv`` (file, label, row) to ``folder``; returns the number."""
    images, labels = data.load()
    rows = data.split(labels).heldout
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file", "label", "row"))
        for number, row in enumerate(rows):
            name = f"{number:03d}.png"
            Image.fromarray(images[row]).save(folder / name, optimize=True)
            table.writerow((name, labels[row], row))
    return len(rows)


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write the held-out digits as PNG files with their labels.")
    parser.add_argument("--out", type=Path, default=HELDOUT, help="folder to write to (default: the package's own)")
    out = parser.parse_args(arguments).out
    print(f"{export(out)} images in {out}")


if __name__ == "__main__":
    main()
