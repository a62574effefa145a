"""The classifier this package brings: a small ViT trained on real handwritten digits, and the images held out from it.

The model takes grey images of 8 x 8 pixels, the pen light on dark paper, and tells the digits 0 to 9. ``training.json``
says how it was trained and how well it reads the held-out images; ``python -m vit_engine.digits.train`` makes the
checkpoint and that file again, ``python -m vit_engine.digits.export`` the images. Only those two need scikit-learn.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

__all__ = ["CHECKPOINT", "HELDOUT", "LABELS", "heldout", "training"]

_HERE = Path(__file__).resolve().parent
CHECKPOINT = _HERE / "digits_vit.safetensors"
HELDOUT = _HERE / "heldout"
TRAINING = _HERE / "training.json"
LABELS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def heldout() -> dict[Path, str]:
    """Every held-out image and the digit that it shows, in the order of ``heldout/labels.csv``."""
    with (HELDOUT / "labels.csv").open(newline="", encoding="utf-8") as file:
        return {HELDOUT / row["file"]: row["label"] for row in csv.DictReader(file)}


def training() -> dict[str, Any]:
    """What the training script wrote about itself: recipe, split, accuracies, versions."""
    return json.loads(TRAINING.read_text(encoding="utf-8"))
