"""The bundled classifier: its images, its split, its accuracy, its training, and its way through the kernels."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from tests.rung import DEVICE, RUNG
from vit_engine import digits, load_model
from vit_engine.digits import data, export
from vit_engine.digits import train as training
from vit_engine.images import load_image


def heldout_pixels():
    """uint8 [N, 1, 8, 8] and labels [N], from the image files."""
    known = digits.heldout()
    pixels = torch.stack([load_image(path, 8, channels=1).pixels for path in known])
    return pixels, np.array([int(label) for label in known.values()])


def test_the_heldout_set_is_complete_and_of_real_image_files():
    known = digits.heldout()
    assert len(known) >= 360
    assert sorted(path.name for path in known) == sorted(path.name for path in digits.HELDOUT.glob("*.png"))
    counts = Counter(known.values())
    assert set(counts) == set(digits.LABELS)
    assert min(counts.values()) >= 34
    pixels, _ = heldout_pixels()
    assert pixels.shape == (len(known), 1, 8, 8)
    assert pixels.flatten(1).unique(dim=0).shape[0] == len(known)
    assert (pixels.amin((1, 2, 3)) == 0).all(), "paper is 0"


def test_file_order_does_not_tell_the_digit():
    labels = [int(label) for label in digits.heldout().values()]
    shift = [(b - a) % 10 for a, b in itertools.pairwise(labels)]
    # load_digits itself counts 0, 1, 2, ... for long stretches, and a set sorted by digit would repeat each.
    assert max(Counter(shift).values()) < len(labels) / 4


def test_the_split_is_the_committed_rule():
    pytest.importorskip("sklearn")
    images, labels = data.load()
    assert (images.shape, images.dtype, images.max()) == ((1797, 8, 8), np.uint8, 255)
    split = data.split(labels)
    assert sorted(np.concatenate(split)) == list(range(1797)), "every image in exactly one part"
    for digit in range(10):
        of_digit = np.sum(labels == digit)
        held = np.sum(labels[split.heldout] == digit)
        assert held == -(-of_digit // 5)
        assert np.sum(labels[split.validation] == digit) == -(-(of_digit - held) // 5)
    again = data.split(labels)
    assert all(np.array_equal(a, b) for a, b in zip(split, again, strict=True))
    with (digits.HELDOUT / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["row"]) for row in rows] == split.heldout.tolist()
    assert [int(row["label"]) for row in rows] == labels[split.heldout].tolist()
    pixels, _ = heldout_pixels()
    assert np.array_equal(pixels[:, 0].numpy(), images[split.heldout])


def test_no_heldout_image_was_trained_on():
    pytest.importorskip("sklearn")
    images, labels = data.load()
    split = data.split(labels)
    seen = {images[row].tobytes() for row in np.concatenate([split.train, split.validation])}
    assert not seen & {images[row].tobytes() for row in split.heldout}


def test_the_checkpoint_is_the_one_that_the_training_script_described():
    told = digits.training()
    content = digits.CHECKPOINT.read_bytes()
    assert len(content) < 1_000_000
    assert (len(content), hashlib.sha256(content).hexdigest()) == (told["checkpoint_bytes"], told["checkpoint_sha256"])
    model = load_model(digits.CHECKPOINT)
    assert model.config == type(model.config).from_dict(told["config"])
    assert sum(p.numel() for p in model.parameters()) == told["parameters"]
    assert told["recipe"] == dataclasses.asdict(training.Recipe())
    assert told["split_seed"] == data.SPLIT_SEED
    assert told["train_images"] + told["validation"]["images"] + told["heldout"]["images"] == 1797


def test_heldout_accuracy():
    pixels, labels = heldout_pixels()
    model = load_model(digits.CHECKPOINT, backend="torch")
    with torch.inference_mode():
        wrong = int((model(pixels).argmax(1).numpy() != labels).sum())
    assert 1 - wrong / len(labels) >= 0.975
    told = digits.training()["heldout"]
    assert told["images"] == len(labels)
    # One image may lie so near a border between two digits that another processor's rounding moves it.
    assert abs(told["wrong"] - wrong) <= 1
    assert told["accuracy"] == pytest.approx(1 - told["wrong"] / told["images"], abs=1e-6)


@pytest.mark.sanitize
def test_the_kernels_give_the_same_logits():
    pixels, labels = heldout_pixels()
    # The sanitizer takes ten seconds an image.
    count = 1 if RUNG == "sanitized" else 6
    pixels, labels = pixels[:count], labels[:count]
    with torch.inference_mode():
        expected = load_model(digits.CHECKPOINT, backend="torch", dtype=torch.float64)(pixels).float()
        backend = "interpret" if RUNG == "interpreted" else "triton"
        model = load_model(digits.CHECKPOINT, backend=backend, device=DEVICE)
        logits = model(pixels.to(DEVICE)).cpu()
    assert model.backend == backend
    assert (logits - expected).norm() <= 1e-4 * expected.norm()
    assert logits.argmax(1).tolist() == labels.tolist()


def test_export_writes_what_is_bundled(tmp_path):
    pytest.importorskip("sklearn")
    export.main(["--out", str(tmp_path)])
    assert (tmp_path / "labels.csv").read_text() == (digits.HELDOUT / "labels.csv").read_text()
    names = sorted(path.name for path in digits.HELDOUT.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names[:20]:
        written = load_image(tmp_path / name, 8, channels=1).pixels
        assert torch.equal(written, load_image(digits.HELDOUT / name, 8, channels=1).pixels)


QUICK = dataclasses.replace(training.Recipe(), epochs=2, warmup_epochs=1, batch_size=32)


@pytest.fixture
def few_digits(monkeypatch):
    """load_digits with 150 of its images: enough to run every line of the training script in seconds."""
    pytest.importorskip("sklearn")
    images, labels = data.load()
    monkeypatch.setattr(data, "load", lambda: (images[:150], labels[:150]))


def test_training_is_reproducible_to_the_bit(few_digits, tmp_path):
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    lines = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(7)  # whatever the process drew before must not matter
        training.train(tmp_path / folder, seed, QUICK, lines.append)
    a, b, c = ((tmp_path / folder / digits.CHECKPOINT.name).read_bytes() for folder in "abc")
    assert a == b
    assert a != c
    assert (tmp_path / "a" / "training.json").read_text() == (tmp_path / "b" / "training.json").read_text()
    assert lines[0].startswith("run 1: ")
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (threads, deterministic)


def test_training_learns(few_digits):
    images, labels = (part[:20] for part in data.load())
    recipe = dataclasses.replace(
        QUICK, epochs=60, batch_size=20, average_decay=0.9, learning_rate=3e-3, max_rotation=5, max_shift=0.25
    )
    with training.reproducible():
        model = training.fit(training.build(images, 0), images, labels, recipe, 0)
        assert not model.training
        assert training.count_wrong(model, images, labels) <= 5


def test_augmentation_moves_a_little_and_stays_an_image():
    recipe = training.Recipe()
    images = torch.zeros(64, 1, 8, 8)
    images[:, :, 3:5, 3:5] = 1.0
    moved = training.augment(images, recipe, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert moved.flatten(1).unique(dim=0).shape[0] == 64, "every image is moved by its own amount"
    ys = torch.arange(8).view(8, 1) - 3.5
    centre = (moved[:, 0] * ys).sum((1, 2)) / moved[:, 0].sum((1, 2))
    assert 0.2 < centre.abs().max() < recipe.max_shift + 0.5
    still = dataclasses.replace(recipe, max_shift=0, max_rotation=0, max_scale=0, max_shear=0, noise=0)
    same = training.augment(images, still, torch.Generator().manual_seed(0))
    assert (same - images).abs().max() < 1e-5


def test_augmentation_rotates_without_mirroring():
    """A quarter turn, which no recipe uses, shows the sense of the rotation and that nothing is mirrored or sheared."""
    recipe = dataclasses.replace(training.Recipe(), max_shift=0, max_scale=0, max_shear=0, noise=0, max_rotation=180)
    image = torch.zeros(400, 1, 8, 8)
    image[:, :, 1, 1:7] = 1.0  # a bar on top with a short stroke down on its left
    image[:, :, 1:4, 1] = 1.0
    turned = training.augment(image, recipe, torch.Generator().manual_seed(1))[:, 0]
    right_angles = [torch.rot90(image[0, 0], k) for k in range(4)]
    mirrored = [torch.rot90(image[0, 0].flip(1), k) for k in range(4)]
    nearest = [min((t - r).abs().sum().item() for t in turned) for r in right_angles]
    nearest_mirrored = [min((t - m).abs().sum().item() for t in turned) for m in mirrored]
    assert max(nearest) < 1.0
    assert min(nearest_mirrored) > 2.0
