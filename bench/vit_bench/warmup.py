"""All kernels of a model for one GPU, compiled into a folder that `vit_engine.load_kernels` reads; no GPU needed.

    compile_model("timm:vit_base_patch16_224", "h100", batches=[1, 8, 64], dtype="bf16", into="kernels-h100")

The model itself runs, its launches recorded instead of made, so its kernels are those that it will ask for, whatever
chooses them. Its parameters are memory that nobody wrote.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vit_engine
from vit_bench.launch_plan import blank_model, in_unwritten_memory
from vit_bench.plan import DTYPES
from vit_bench.recording import RecordingDriver, recording, target
from vit_engine import ViTConfig
from vit_engine.artefacts import Manifest, check_empty, save_kernels
from vit_kernels.device import attach
from vit_kernels.kernel_cache import collected, compiling_into, gpu_facts
from vit_kernels.tuned import Tuned, TunedFileError, read_tuned, versions_here

Run = Callable[[Tensor], object]


class BatchError(ValueError):
    """There is no memory here for so many images."""


@dataclass(frozen=True)
class Warmed:
    """A model to be compiled. size: (channels, height, width) of its images; runs: the entry points; raw: whether it
    takes uint8 images, too."""

    size: tuple[int, int, int]
    runs: tuple[Run, ...]
    raw: bool = False


def blank(build: Callable[[], nn.Module], dtype: torch.dtype) -> Any:
    """A library's model in eval mode on the CPU, accelerated; see `in_unwritten_memory`."""
    with torch.device("meta"):
        model = build().eval().to(dtype)
    return vit_engine.accelerate(in_unwritten_memory(model))


def _ours(name: str, dtype: torch.dtype) -> Warmed:
    config = ViTConfig.preset(name)
    model = blank_model(config, dtype)
    size = (config.in_channels, *config.image_hw)
    return Warmed(size, (model, model.forward_features), raw=True)


def _timm(name: str, dtype: torch.dtype) -> Warmed:
    import timm

    model = blank(partial(timm.create_model, name), dtype)
    return Warmed(tuple(model.default_cfg["input_size"]), (model, model.forward_features))


def _torchvision(name: str, dtype: torch.dtype) -> Warmed:
    from torchvision.models import get_model

    model = blank(partial(get_model, name, weights=None), dtype)
    return Warmed((3, model.image_size, model.image_size), (model,))


def _transformers(name: str, dtype: torch.dtype) -> Warmed:
    from transformers import AutoConfig, AutoModel

    config: Any = AutoConfig.from_pretrained(name)
    model = blank(partial(AutoModel.from_config, config), dtype)
    model = getattr(model, "vision_model", model)  # of CLIP and SigLIP: texts have no part in this
    config = getattr(config, "vision_config", config)
    side = config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    return Warmed((config.num_channels, height, width), (model,))


LIBRARIES: dict[str, Callable[[str, torch.dtype], Warmed]] = {
    "vit_engine": _ours,
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def find(model: str) -> Callable[[torch.dtype], Warmed]:
    """A model by name: a preset's, or "timm:NAME", "torchvision:NAME", "transformers:NAME or folder of config.json".

    Raises ValueError for a library that is none of these and for a preset that does not exist.
    """
    library, colon, name = model.partition(":")
    if not colon:
        library, name = "vit_engine", model
        ViTConfig.preset(name)
    if library not in LIBRARIES:
        raise ValueError(f"model must be a preset or LIBRARY:NAME with {', '.join(LIBRARIES)}; got {model!r}")
    return partial(LIBRARIES[library], name)


def tuned_for(path: str | Path, gpu_name: str) -> Tuned:
    """A tuned file that will count on that GPU with what is installed here. Raises TunedFileError where it will not."""
    table = read_tuned(path)
    device, here = target(gpu_name), versions_here()
    if (table.gpu.capability, table.gpu.sm_count) != (device.capability, device.sm_count):
        wanted = f"sm_{device.capability}, {device.sm_count} SMs"
        raise TunedFileError(f"{path} was measured on {table.gpu}; --gpu {gpu_name} is {device.name} ({wanted})")
    for name in ("triton", "kernels"):
        if table.versions.get(name) != here[name]:
            raise TunedFileError(f"{path} was measured with {name} {table.versions.get(name)}, here is {here[name]}")
    return table


@contextmanager
def _followed(tuned: Tuned | None, recorder: RecordingDriver) -> Iterator[None]:
    where = recorder, recorder.get_current_device()
    attach({where: tuned})
    try:
        yield
    finally:
        attach({where: None})


def kernels_of(
    warmed: Warmed, gpu_name: str, batches: Iterable[int], dtype: torch.dtype, tuned: Tuned | None = None
) -> dict[str, bytes]:
    """The kernels that these batches launch, compiled for that GPU: "KEY/NAME" to content.

    tuned: whose winners are launched, PyTorch's operators among them, which then run here.
    """
    with tempfile.TemporaryDirectory() as folder:
        with compiling_into(Path(folder)), recording(target(gpu_name)) as recorder, _followed(tuned, recorder):
            for batch in batches:
                for images in _images(warmed, batch, dtype):
                    for run in warmed.runs:
                        for mode in (torch.no_grad, torch.inference_mode):
                            with mode():
                                run(images)
        return collected(Path(folder))


def blank_images(batch: int, size: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Memory that nobody wrote [batch, *size]; BatchError where there is none."""
    try:
        return torch.empty(batch, *size, dtype=dtype)
    except RuntimeError as error:
        raise BatchError(f"no memory here for {batch} images of {'x'.join(map(str, size))}") from error


def _images(warmed: Warmed, batch: int, dtype: torch.dtype) -> list[Tensor]:
    dtypes = [dtype, torch.uint8] if warmed.raw else [dtype]
    return [blank_images(batch, warmed.size, kind) for kind in dtypes]


def compile_model(
    model: str,
    gpu_name: str,
    batches: Sequence[int],
    dtype: str,
    into: str | Path,
    tuned: str | Path | None = None,
) -> Manifest:
    """Compiles all kernels of a model (see `find`) for a GPU (`recording.target`) and these batch sizes into a folder.

    dtype: "fp32", "fp16" or "bf16"; tuned: the tuned file that the server will use. Raises ValueError for names that
    are not known, models that the kernels do not run, a folder that is not empty, and a tuned file that does not count
    there, BatchError, which is one, for more images than memory holds.
    """
    check_empty(Path(into))
    table = None if tuned is None else tuned_for(tuned, gpu_name)
    try:
        warmed = find(model)(DTYPES[dtype])
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        # What libraries raise for names that they do not have, and accelerate() for models that it does not take.
        raise ValueError(f"model {model!r} cannot be compiled: {error}") from error
    files = kernels_of(warmed, gpu_name, batches, DTYPES[dtype], table)
    shapes = [(batch, *warmed.size) for batch in batches]
    return save_kernels(into, files, model=model, dtype=dtype, shapes=shapes, gpu=gpu_facts(target(gpu_name)))
