"""Whole models of every library with our weights, against the naive formulas; and what keeps one from running."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vit_bench import tolerance
from vit_bench.draw import Draw
from vit_bench.results import OURS
from vit_bench.timed import models, runtimes
from vit_bench.timed.contenders import CannotRunError, Contender, compiled, taking_part
from vit_bench.timed.models import MODELS, ModelProblem
from vit_bench.timed.reference_model import reference_logits
from vit_bench.whole_model import redraw
from vit_engine import ViT, ViTConfig

PLAIN = ViTConfig(image_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=2, num_classes=50)
CONFIGS = {
    "classes": PLAIN,
    "no classes": replace(PLAIN, num_classes=0),
    "LayerScale": replace(PLAIN, num_classes=0, layer_scale=0.5),
    "LayerScale and classes": replace(PLAIN, layer_scale=0.5),
}
CPU = torch.device("cpu")


def problem_of(config: ViTConfig, dtype: torch.dtype = torch.float32) -> ModelProblem:
    model = ViT(config, backend="torch").eval()
    redraw(model)
    state = {name: tensor.detach().to(dtype).float() for name, tensor in model.state_dict().items()}
    return ModelProblem(config, state, Draw(dtype, "cpu", 1).normal(6, 3, *config.image_hw))


def contender(name: str) -> Contender:
    return next(one for one in MODELS if one.name == name and "cpu" in one.devices)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", [OURS, "timm", "torchvision", "transformers, sdpa", "transformers, eager"])
@torch.inference_mode()
def test_every_library_computes_the_same(name: str, config: ViTConfig) -> None:
    problem = problem_of(config)
    lacks = {
        "torchvision": (config.layer_scale is not None, "no LayerScale"),
        "transformers": (config.layer_scale is not None and config.num_classes > 0, "class token and mean"),
    }
    unfit, why = lacks.get(name.split(",")[0], (False, ""))
    if unfit:
        with pytest.raises(CannotRunError, match=why):
            contender(name).make(problem)
        return
    logits = contender(name).make(problem)()
    truth, eager = (
        reference_logits(config, problem.state, problem.images, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert logits.shape == (6, config.num_classes or 64)
    tolerance.check(logits, eager, truth, name=name)


@pytest.mark.parametrize("name", [OURS, "timm", "torchvision", "transformers, sdpa"])
@torch.inference_mode()
def test_every_library_has_the_same_epsilon(name: str) -> None:
    """Rows so small that it is as large as their variance."""
    problem = problem_of(PLAIN)
    stem = ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "cls_token")
    small = replace(problem, state=problem.state | {part: 1e-3 * problem.state[part] for part in stem})
    logits = contender(name).make(small)()
    truth, eager = (
        reference_logits(PLAIN, small.state, small.images, dtype) for dtype in (torch.float64, torch.float32)
    )
    tolerance.check(logits, eager, truth, name=name)


@torch.inference_mode()
def test_the_reference_needs_every_parameter() -> None:
    problem = problem_of(CONFIGS["LayerScale and classes"])
    whole = reference_logits(problem.config, problem.state, problem.images, torch.float64)
    for name, tensor in problem.state.items():
        without = problem.state | {name: torch.zeros_like(tensor)}
        changed = reference_logits(problem.config, without, problem.images, torch.float64)
        difference = float((changed - whole).norm() / whole.norm())
        if not name.endswith("qkv.bias"):
            assert difference > 1e-3, name
    with pytest.raises(ValueError, match="must classify by its class token"):
        reference_logits(replace(PLAIN, num_register_tokens=1), {}, problem.images, torch.float64)


def test_weights_of_half_precision_are_the_same_for_all() -> None:
    problem = problem_of(PLAIN, torch.bfloat16)
    with torch.inference_mode():
        logits = contender("timm").make(problem)()
    assert logits.dtype == torch.bfloat16


def test_who_takes_part_where() -> None:
    on_cpu, on_gpu = ([one.name for one in taking_part(MODELS, torch.device(kind))] for kind in ("cpu", "cuda"))
    assert on_cpu == [OURS, "timm", "torchvision", "transformers, sdpa", "transformers, eager", "ONNX Runtime"]
    assert on_gpu == [
        OURS,
        f"{OURS}, CUDA graph",
        f"{OURS}, timm's model",
        "PyTorch eager",
        "torch.compile, default",
        "torch.compile, max-autotune",
        *on_cpu[1:],
        "TensorRT",
    ]


def test_what_is_not_installed_is_named() -> None:
    absent = Contender("nobody", lambda problem: problem, ("torch", "no-such-package"), {"mode": "fast"})
    assert absent.missing() == "not installed: pip install no-such-package"
    assert absent.labelled() == {"torch": version("torch"), "no-such-package": "", "mode": "fast"}
    assert contender("timm").missing() == ""


def test_a_captured_graph_is_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(PLAIN)
    with pytest.raises(CannotRunError, match="not captured in a CUDA graph: backend 'torch'"):
        models._ours_in_graphs(problem)
    monkeypatch.setattr(models, "_vit", lambda *_: Graphed())
    run = models._ours_in_graphs(problem)
    assert run().item() == 3 and Graphed.limit == 1, "two passes were made before"


@pytest.mark.interpreted_only
@torch.inference_mode()
def test_an_accelerated_model_is_timed_only_if_all_of_it_runs_on_the_kernels() -> None:
    problem = problem_of(replace(PLAIN, depth=1))
    small = replace(problem, images=problem.images[:2])
    logits = models._accelerated_timm(small)()
    truth, eager = (
        reference_logits(small.config, small.state, small.images, dtype) for dtype in (torch.float64, torch.float32)
    )
    tolerance.check(logits, eager, truth, name="timm's model, accelerated")
    with pytest.raises(CannotRunError, match=r"does not run on the kernels: .*float64"):
        models._accelerated_timm(replace(small, images=small.images.double()))


class Graphed:
    limit = 0
    graphs = SimpleNamespace(why=None)
    passes = 0

    def set_graphs(self, limit: int) -> Any:
        Graphed.limit = limit
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return torch.tensor(self.passes)


def test_compiled_contenders_are_compiled_for_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda run, **options: asked.append(options) or run)
    run = compiled(lambda problem: lambda: problem, "max-autotune")("it")
    assert run() == "it" and asked == [{"mode": "max-autotune", "dynamic": False}]


class Session:
    """Stands for ONNX Runtime's session: runs what was exported to the file's place."""

    exported: Any = None

    def __init__(self, path: str, options: Any, providers: list[str]) -> None:
        assert path.endswith("model.onnx") and providers == ["CPUExecutionProvider"]
        self.bound: dict[str, tuple] = {}

    def io_binding(self) -> Any:
        return SimpleNamespace(
            bind_input=lambda name, *place: self.bound.update({name: place}),
            bind_output=lambda name, *place: self.bound.update({name: place}),
        )

    def run_with_iobinding(self, binding: Any) -> None:
        device, index, element, shape, address = self.bound["logits"]
        assert (device, index, element.__name__, shape) == ("cpu", 0, "float32", (6, 50))
        model, (images,) = Session.exported
        assert self.bound["images"] == ("cpu", 0, element, (6, 3, 32, 32), images.data_ptr())
        result = model(images)
        torch.frombuffer(_memory(address, result.numel()), dtype=torch.float32).view(shape).copy_(result)


def _memory(address: int, count: int) -> Any:
    import ctypes

    return (ctypes.c_float * count).from_address(address)


@torch.no_grad()
def test_onnx_runtime_is_given_our_model_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("onnxruntime")
    module.SessionOptions, module.InferenceSession = SimpleNamespace, Session
    module.get_available_providers = lambda: ["CPUExecutionProvider"]
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    monkeypatch.setattr(
        torch.onnx, "export", lambda model, inputs, path, **_: setattr(Session, "exported", (model, inputs))
    )
    problem = problem_of(PLAIN)
    logits = runtimes.onnx_runtime(problem)()
    expected = contender(OURS).make(problem)()
    assert torch.equal(logits, expected) and bool(logits.any())
    with monkeypatch.context() as patch:
        patch.setattr(Session, "run_with_iobinding", lambda *_: None)
        assert not runtimes.onnx_runtime(problem)().any(), "what is judged comes from the runtime or not at all"
    with pytest.raises(CannotRunError, match="no bfloat16"):
        runtimes.onnx_runtime(problem_of(PLAIN, torch.bfloat16))
    module.get_available_providers = list
    with pytest.raises(CannotRunError, match="no CPUExecutionProvider"):
        runtimes.onnx_runtime(problem)


@torch.no_grad()
def test_tensorrt_is_given_the_exported_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def compile_(exported: Any, **options: Any) -> Any:
        asked.update(options)
        return exported.module()

    module: Any = ModuleType("torch_tensorrt")
    module.dynamo = SimpleNamespace(compile=compile_)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    problem = problem_of(PLAIN)
    assert torch.allclose(runtimes.tensorrt(problem)(), contender(OURS).make(problem)(), atol=1e-4)
    assert asked["use_explicit_typing"] is True and asked["inputs"][0] is problem.images
