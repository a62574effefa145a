"""What ``vit-engine run`` does between its options and its output: open the model, decode, classify, compare."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointError, describes_itself, load_checkpoint, load_model
from ..config import ViTConfig
from ..images import DecodedImage, ImageError, load_image
from ..vit import ViT
from .child import interpret

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Kernels and PyTorch sum in different orders: in fp32, logits may differ by this share of the largest one.
FP32_AGREEMENT = 1e-3
_INTERPRETED_AT_ONCE = 256


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a file that describes itself, or a file and the preset that it fits."""

    checkpoint: Path
    preset: str | None = None
    num_classes: int | None = None

    def open(self, *, backend: str, device: torch.device, dtype: torch.dtype) -> ViT:
        """The model in eval mode. Raises CheckpointError, FileNotFoundError, ValueError."""
        if not self.checkpoint.is_file():
            what = "is no file" if self.checkpoint.exists() else "no such checkpoint"
            raise FileNotFoundError(f"{self.checkpoint}: {what}")
        if self.preset is None:
            if not describes_itself(self.checkpoint):
                raise CheckpointError(
                    f"{self.checkpoint} does not describe its model: name its architecture with --model"
                )
            return load_model(self.checkpoint, backend=backend, device=device, dtype=dtype)
        classes = {} if self.num_classes is None else {"num_classes": self.num_classes}
        model = ViT(ViTConfig.preset(self.preset, **classes), backend=backend)
        load_checkpoint(model, self.checkpoint)
        return model.to(device=device, dtype=dtype).eval()


@dataclass(frozen=True)
class Preparation:
    """How image files are brought to the model's input (see vit_engine.images.load_image)."""

    image_size: tuple[int, int]
    channels: int
    resize: str
    crop_fraction: float

    def load(self, path: Path) -> DecodedImage:
        """Decode one file."""
        return load_image(
            path,
            self.image_size,
            channels=self.channels,
            resize=self.resize,
            crop_fraction=self.crop_fraction,
        )


@dataclass
class Prediction:
    """One classified image: ``top`` holds (class, probability), best first."""

    path: Path
    top: list[tuple[int, float]]
    note: str | None = None


@dataclass
class Outcome:
    """What a run gave. ``seconds`` counts forward passes alone; ``sample`` and its logits serve the comparison."""

    backend: str
    predictions: list[Prediction] = field(default_factory=list)
    errors: list[ImageError] = field(default_factory=list)
    seconds: float = 0.0
    sample: torch.Tensor | None = None
    sample_logits: torch.Tensor | None = None

    @property
    def images_per_second(self) -> float | None:
        """Classified images per second of forward passes."""
        return len(self.predictions) / self.seconds if self.seconds > 0 else None


Reporter = Callable[[ImageError | None], None]
"""Called once per finished file, with the error if there was one."""


def batches(
    paths: Sequence[Path], preparation: Preparation, batch_size: int, failed: Callable[[ImageError], None]
) -> Generator[list[tuple[Path, DecodedImage]], None, None]:
    """Decoded images in order, ``batch_size`` at a time; threads decode the next batch while one is classified."""

    def decode(path: Path) -> DecodedImage | ImageError:
        try:
            return preparation.load(path)
        except ImageError as error:
            return error

    ready: list[tuple[Path, DecodedImage]] = []
    waiting: deque[tuple[Path, Future[DecodedImage | ImageError]]] = deque()
    remaining = iter(paths)
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        while True:
            while len(waiting) < 2 * batch_size and (path := next(remaining, None)) is not None:
                waiting.append((path, pool.submit(decode, path)))
            if not waiting:
                break
            path, future = waiting.popleft()
            result = future.result()
            if isinstance(result, ImageError):
                failed(result)
                continue
            ready.append((path, result))
            if len(ready) == batch_size:
                yield ready
                ready = []
    finally:
        # Where the run is interrupted, nobody waits for what has not begun.
        pool.shutdown(cancel_futures=True)
    if ready:
        yield ready


class Timed:
    """Logits of uint8 batches from a model in this process; ``seconds`` adds up the forward passes."""

    def __init__(self, model: ViT) -> None:
        self.model = model
        self.device = model.pos_embed.device
        self.seconds = 0.0
        self._seen: set[tuple[int, ...]] = set()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """fp32 logits on the CPU."""
        images = pixels.to(self.device)
        with torch.inference_mode():
            if tuple(images.shape) not in self._seen and (self.device.type == "cuda" or not self._seen):
                # The first pass compiles kernels, or starts threads and picks algorithms: not what is to be timed.
                self._seen.add(tuple(images.shape))
                self.model(images if self.device.type == "cuda" else images[:1])
            self._wait()
            started = time.perf_counter()
            logits = self.model(images)
            self._wait()
            self.seconds += time.perf_counter() - started
        return logits.float().cpu()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Child:
    """The same from the kernels in Triton's interpreter, in a child process."""

    def __init__(self, model: ViT, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.seconds = 0.0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """fp32 logits. Raises ChildError."""
        result = interpret(self.model, pixels, dtype=self.dtype)
        self.seconds += result.seconds
        return result.logits


def classify(
    paths: Sequence[Path],
    preparation: Preparation,
    forward: Timed | Child,
    outcome: Outcome,
    *,
    batch_size: int,
    top_k: int,
    sample_size: int,
    report: Reporter,
) -> None:
    """Classify every file that can be decoded; the others become errors of the outcome.

    The outcome is added to batch by batch: whatever ends this early, it holds what was done.
    """

    def failed(error: ImageError) -> None:
        outcome.errors.append(error)
        report(error)

    sample: list[torch.Tensor] = []
    sample_logits: list[torch.Tensor] = []
    at_once = _INTERPRETED_AT_ONCE if isinstance(forward, Child) else batch_size
    with closing(batches(paths, preparation, at_once, failed)) as decoded:
        for batch in decoded:
            pixels = torch.stack([image.pixels for _, image in batch])
            logits = forward(pixels)
            outcome.seconds = forward.seconds
            wanted = sample_size - sum(map(len, sample))
            if wanted > 0:
                sample.append(pixels[:wanted])
                sample_logits.append(logits[:wanted])
            probabilities, classes = logits.double().softmax(-1).topk(min(top_k, logits.shape[-1]))
            for row, (path, image) in enumerate(batch):
                top = list(zip(classes[row].tolist(), probabilities[row].tolist(), strict=True))
                if not all(math.isfinite(probability) for _, probability in top):
                    failed(ImageError(path, "the model's output is not finite"))
                    continue
                outcome.predictions.append(Prediction(path, top, image.note))
                report(None)
    if sample:
        outcome.sample, outcome.sample_logits = torch.cat(sample), torch.cat(sample_logits)


def agreement(source: Source, outcome: Outcome, device: torch.device, dtype: torch.dtype) -> dict[str, Any] | None:
    """How far the kernels are from plain PyTorch in fp32, on the sample of the outcome; None without a sample.

    If the outcome itself came from the kernels, its logits are compared. If it came from the torch backend, the sample
    goes through the kernels now: on the same device if that is a GPU, otherwise in the interpreter (in fp32 for bf16,
    which the interpreter computes wrongly). Raises ChildError or RuntimeError when the kernels cannot run.
    """
    if outcome.sample is None or outcome.sample_logits is None:
        return None
    plain = source.open(backend="torch", device=device, dtype=torch.float32)
    # cuDNN's convolutions take fp32 as tf32 unless told otherwise, which would cost the patch embedding 13 bits.
    with torch.backends.cudnn.flags(enabled=False):
        reference = Timed(plain)(outcome.sample)
    kernels, logits = outcome.backend, outcome.sample_logits
    if kernels == "torch" and device.type == "cuda":
        kernels, logits = "triton", Timed(source.open(backend="triton", device=device, dtype=dtype))(outcome.sample)
    elif kernels == "torch":
        dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        kernels, logits = "interpret", Child(plain, dtype)(outcome.sample)
    error, scale = float((logits - reference).abs().max()), float(reference.abs().max())
    # NaN is the largest of any logits to argmax().
    same = (logits.argmax(-1) == reference.argmax(-1)) & (logits - reference).isfinite().all(-1)
    return {
        "kernels": kernels,
        "dtype": _DTYPE_NAMES[dtype],
        "reference": f"torch fp32 on {device.type}",
        "images": len(reference),
        "max_abs_error": error if math.isfinite(error) else None,
        "max_abs_logit": scale if math.isfinite(scale) else None,
        "top1": float(same.double().mean()),
    }


def disagreement(compared: dict[str, Any]) -> str | None:
    """One line if kernels that ran in fp32 are further from PyTorch than rounding explains, else None."""
    error, scale = compared["max_abs_error"], compared["max_abs_logit"]
    if error is None or scale is None:
        return "kernels and PyTorch cannot be compared: logits that are not finite"
    scale = max(1.0, scale)
    if compared["dtype"] != "fp32" or error <= FP32_AGREEMENT * scale:
        return None
    return f"the kernels disagree with PyTorch: largest logit error {error:.3g} at logits up to {scale:.3g}"
