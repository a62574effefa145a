"""A whole ViT with the same weights, by ours and by every library that has the architecture.

Each adapter builds its library's model from a `ModelProblem` and answers with a function that gives logits [B, C], or
the class token [B, D] of a model without classes. timm, torchvision and transformers are run as they come: their own
modules, no compilation, eval mode.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_bench.results import OURS
from vit_bench.timed.contenders import COMPILE_MODES, CannotRunError, Contender, Run, compiled
from vit_bench.timed.runtimes import onnx_runtime, tensorrt
from vit_engine import ViT, ViTConfig, accelerate
from vit_engine.converters import timm_to_torchvision, timm_to_transformers
from vit_engine.dropin.api import attached_to
from vit_engine.dropin.explain import PYTORCH, explanation_of


@dataclass(frozen=True)
class ModelProblem:
    """state: weights under timm's names, fp32 on the CPU; images [B, C, H, W] in dtype on the device."""

    config: ViTConfig
    state: dict[str, Tensor]
    images: Tensor

    def ready(self, model: nn.Module, state: dict[str, Tensor] | None = None) -> Any:
        """The model with these weights, in the images' dtype and on their device."""
        model.load_state_dict(self.state if state is None else state, strict=True)
        return model.eval().to(self.images.dtype).to(self.images.device)


def _vit(problem: ModelProblem, backend: str) -> ViT:
    return problem.ready(ViT(problem.config, backend="torch")).set_backend(backend)


def _ours(problem: ModelProblem) -> Run:
    model = _vit(problem, "auto")
    return lambda: model(problem.images)


def _ours_in_graphs(problem: ModelProblem) -> Run:
    model = _vit(problem, "auto").set_graphs(1)

    with torch.inference_mode():
        for _ in range(2):  # captured by the second pass of a shape
            model(problem.images)
    if model.graphs is not None and model.graphs.why is not None:
        raise CannotRunError(f"not captured in a CUDA graph: {model.graphs.why}")
    return lambda: model(problem.images)


def _torch_backend(problem: ModelProblem) -> Run:
    model = _vit(problem, "torch")
    return lambda: model(problem.images)


def _timm_model(problem: ModelProblem) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    config = problem.config
    return problem.ready(
        VisionTransformer(
            img_size=config.image_hw,
            patch_size=config.patch_hw,  # type: ignore[arg-type]
            in_chans=config.in_channels,
            num_classes=config.num_classes,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_hidden / config.embed_dim,
            init_values=config.layer_scale,
        )
    )


def _timm(problem: ModelProblem) -> Run:
    model = _timm_model(problem)
    return lambda: model(problem.images)


def _accelerated_timm(problem: ModelProblem) -> Run:
    """timm's own model behind `accelerate()`: what one line makes of the model that a user has."""
    model = accelerate(_timm_model(problem))
    model(problem.images)
    rows = explanation_of(model, list(attached_to(model))).rows
    # Its head is a Linear that no one takes over; what was taken over and fell back makes it another model.
    left = [row for row in rows if row.kernels == PYTORCH and not row.why.endswith("not taken over")]
    if left:
        raise CannotRunError(f"{left[0].module} does not run on the kernels: {left[0].why}")
    return lambda: model(problem.images)


def _torchvision(problem: ModelProblem) -> Run:
    from torchvision.models import VisionTransformer

    config = problem.config
    if config.layer_scale is not None:
        raise CannotRunError("torchvision's VisionTransformer has no LayerScale")
    model = VisionTransformer(
        image_size=config.image_hw[0],
        patch_size=config.patch_hw[0],
        num_layers=config.depth,
        num_heads=config.num_heads,
        hidden_dim=config.embed_dim,
        mlp_dim=config.mlp_hidden,
        num_classes=max(config.num_classes, 1),
    )
    if not config.num_classes:
        model.heads = nn.Identity()  # type: ignore[assignment]
    model = problem.ready(model, timm_to_torchvision(problem.state))
    return lambda: model(problem.images)


def _transformers(attention: str, problem: ModelProblem) -> Run:
    import transformers

    config = problem.config
    shared = {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_hw[0],
        "patch_size": config.patch_hw[0],
        "layer_norm_eps": config.norm_eps,
        "attn_implementation": attention,
    }
    model: Any
    if config.layer_scale is not None:
        if config.num_classes:
            raise CannotRunError("transformers' Dinov2 classifies by class token and mean of the patches together")
        their_config = transformers.Dinov2Config(**shared, mlp_ratio=config.mlp_hidden // config.embed_dim)
        model = transformers.Dinov2Model(their_config)
        weights = timm_to_transformers(problem.state, family="dinov2")
    else:
        theirs = transformers.ViTConfig(
            **shared,
            intermediate_size=config.mlp_hidden,
            num_labels=max(config.num_classes, 1),  # type: ignore[call-arg]
        )
        with_head = bool(config.num_classes)
        model = (
            transformers.ViTForImageClassification(theirs)
            if with_head
            else transformers.ViTModel(theirs, add_pooling_layer=False)
        )
        weights = timm_to_transformers(problem.state)
    model = problem.ready(model, weights)

    def run() -> Tensor:
        output = model(problem.images)
        return output.logits if config.num_classes else output.last_hidden_state[:, 0]

    return run


_GPU = ("cuda",)
MODELS = (
    Contender(OURS, _ours, ("vit-engine", "torch", "triton"), {"backend": "triton"}, _GPU),
    Contender(OURS, _ours, ("vit-engine", "torch"), {"backend": "torch"}, ("cpu",)),
    Contender(
        f"{OURS}, CUDA graph", _ours_in_graphs, ("vit-engine", "torch", "triton"), {"graphs": "set_graphs(1)"}, _GPU
    ),
    Contender(
        f"{OURS}, timm's model",
        _accelerated_timm,
        ("vit-engine", "timm", "torch", "triton"),
        {"by": "accelerate()"},
        _GPU,
    ),
    Contender("PyTorch eager", _torch_backend, settings={"model": "vit_engine.ViT, backend torch"}, devices=_GPU),
    *(
        Contender(
            f"torch.compile, {mode}",
            compiled(_torch_backend, mode),
            settings={"mode": mode, "model": "vit_engine.ViT, backend torch"},
            devices=_GPU,
        )
        for mode in COMPILE_MODES
    ),
    Contender("timm", _timm, ("timm", "torch"), {"attention": "fused"}),
    Contender("torchvision", _torchvision, ("torchvision", "torch")),
    *(
        Contender(
            f"transformers, {name}",
            functools.partial(_transformers, name),
            ("transformers", "torch"),
            {"attn_implementation": name},
        )
        for name in ("sdpa", "eager")
    ),
    *(
        Contender("ONNX Runtime", onnx_runtime, (package, "onnx", "onnxscript"), {"provider": provider}, (kind,), False)
        for package, provider, kind in (("onnxruntime-gpu", "CUDA", "cuda"), ("onnxruntime", "CPU", "cpu"))
    ),
    Contender("TensorRT", tensorrt, ("torch-tensorrt",), {"compiled by": "torch_tensorrt.dynamo"}, _GPU, False),
)
