"""Runtimes that take an exported model: ONNX Runtime, TensorRT. What they get is our ViT on PyTorch's operators."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from vit_bench.timed.contenders import CannotRunError, Run
from vit_engine import ViT

_NUMPY = {torch.float32: "float32", torch.float16: "float16"}


def _model(problem: Any) -> ViT:
    return problem.ready(ViT(problem.config, backend="torch"))


def onnx_runtime(problem: Any) -> Run:
    """Exported by torch.onnx's dynamo exporter; images and logits stay where they are (IO binding)."""
    import numpy as np
    import onnxruntime  # type: ignore[import-not-found]

    images = problem.images.contiguous()
    if images.dtype not in _NUMPY:
        raise CannotRunError("ONNX Runtime is bound through numpy dtypes here, which have no bfloat16")
    device = images.device
    wanted = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise CannotRunError(f"this build of ONNX Runtime has no {wanted}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if device.type == "cpu":
        options.intra_op_num_threads = torch.get_num_threads()
    model = _model(problem)
    with tempfile.TemporaryDirectory(prefix="vit-engine-onnx-") as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model, (images,), str(path), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
        )
        session = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
    logits = model(images)
    binding, where = session.io_binding(), (device.type, device.index or 0)
    element = getattr(np, _NUMPY[images.dtype])
    binding.bind_input("images", *where, element, tuple(images.shape), images.data_ptr())
    binding.bind_output("logits", *where, element, tuple(logits.shape), logits.data_ptr())
    logits.zero_()  # what is judged must have come from the runtime

    def run() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return logits

    return run


def tensorrt(problem: Any) -> Run:
    """Through torch.export and Torch-TensorRT, in the model's own dtypes."""
    import torch_tensorrt  # type: ignore[import-not-found]

    model, images = _model(problem), problem.images
    exported = torch.export.export(model, (images,))
    engine = torch_tensorrt.dynamo.compile(exported, inputs=[images], use_explicit_typing=True)
    return lambda: engine(images)
