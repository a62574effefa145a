"""The handwritten digits behind the bundled model, and how they are split.

scikit-learn's ``load_digits`` is the test part of UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, 1998): 1,797 real digits of 13 writers, 8 x 8 pixels, 17 grey levels. The split is by image, so all writers
are in every part: the held-out figure says how well new digits of these writers are read, not digits of new writers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

SPLIT_SEED = 2010
"""Seed of the split. Fixed: the seed of a training run does not move images between the parts."""


class Split(NamedTuple):
    """Row numbers in ``load_digits``; ``heldout`` is in random order, the others ascend."""

    train: np.ndarray
    validation: np.ndarray
    heldout: np.ndarray


def load() -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 [1797, 8, 8] with 0 the paper and 255 the pen, and their labels, int64 [1797]."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    grey = np.asarray(digits.images, dtype=np.int64)
    return ((grey * 255 + 8) // 16).astype(np.uint8), np.asarray(digits.target, dtype=np.int64)


def split(labels: np.ndarray) -> Split:
    """A fixed stratified split: of each digit a fifth, rounded up, is held out, and a fifth of the rest validates.

    RandomState and not default_rng: NumPy promises that its stream stays the same in every release.
    """
    random = np.random.RandomState(SPLIT_SEED)
    train, validation, heldout = [], [], []
    for digit in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == digit))
        held, rows = np.split(rows, [-(-len(rows) // 5)])
        valid, rows = np.split(rows, [-(-len(rows) // 5)])
        heldout.append(held)
        validation.append(valid)
        train.append(rows)
    return Split(
        train=np.sort(np.concatenate(train)),
        validation=np.sort(np.concatenate(validation)),
        heldout=random.permutation(np.concatenate(heldout)),
    )
