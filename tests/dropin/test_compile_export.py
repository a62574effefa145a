"""torch.compile without graph breaks, and torch.export, with the kernels as operators of the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import vit_engine
from vit_kernels import launch

from .support import close, eva, hf_dinov2, hf_vit, images, pair, slow_but, tensors, timm_model, torchvision_model

pytestmark = pytest.mark.interpreted_only

QUICK: dict[str, Callable[..., Any]] = {"timm vit": timm_model, "torchvision": torchvision_model, "vit": hf_vit}
MORE: dict[str, Callable[..., Any]] = {"timm eva": eva, "dinov2": hf_dinov2}
BLOCK = ["linear", "attention", "linear", "mlp"]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


class Backend:
    """Runs graphs as they are, and counts the kernels' operators in them."""

    def __init__(self) -> None:
        self.graphs = 0
        self.operators: Counter[str] = Counter()

    def __call__(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        self.graphs += 1
        self.operators += count(graph)
        return graph.forward


def count(graph: torch.fx.GraphModule) -> Counter[str]:
    """How often each of the kernels' operators is called in a graph."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return Counter(name.split(".")[1] for name in names if name.startswith("vit_engine."))


@pytest.mark.parametrize("name", slow_but(QUICK, "timm vit", "vit"))
@torch.no_grad()
def test_one_graph_without_breaks(name: str) -> None:
    theirs, ours = pair(QUICK[name])
    backend = Backend()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    close(tensors(compiled(images(1))), tensors(theirs(images(1))))
    assert backend.graphs == 1
    assert backend.operators["attention"] == backend.operators["mlp"] == 2
    assert backend.operators["patch_embed"] == 1 and backend.operators["linear"] == 4
    close(tensors(ours(images(1))), tensors(theirs(images(1))))


@pytest.mark.parametrize("name", slow_but(MORE))
@torch.no_grad()
def test_one_graph_without_breaks_of_more_models(name: str) -> None:
    theirs, ours = pair(MORE[name])
    backend = Backend()
    close(tensors(torch.compile(ours, fullgraph=True, backend=backend)(images(1))), tensors(theirs(images(1))))
    assert backend.graphs == 1 and backend.operators["attention"] == 2


@pytest.mark.slow
@torch.no_grad()
def test_through_aot_autograd_and_other_batch_sizes() -> None:
    theirs, ours = pair(timm_model, depth=1)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        close(compiled(images(batch)), theirs(images(batch)))


@pytest.mark.parametrize("name", slow_but(QUICK, "timm vit"))
def test_compiled_with_gradients_it_is_the_original(name: str) -> None:
    """Operators of kernels have no backward pass, so the graph holds PyTorch's."""
    theirs, ours = pair(QUICK[name])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for model in (compiled, theirs):
        results = [t for t in tensors(model(images(1))) if t.requires_grad]
        sum(t.square().sum() for t in results).backward()  # type: ignore[union-attr]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        if b.grad is not None:
            close(a.grad, b.grad, 1e-3)


@pytest.mark.slow
@torch.inference_mode()
def test_inference_mode() -> None:
    theirs, ours = pair(timm_model, depth=1)
    close(torch.compile(ours, fullgraph=True, backend="aot_eager")(images(1)), theirs(images(1)))


@torch.no_grad()
def test_hooks_from_before_compilation_are_in_the_graph() -> None:
    theirs, ours = pair(timm_model)
    for model in (theirs, ours):
        model.blocks[0].register_forward_hook(lambda module, arguments, output: output * 0.5)
        model.blocks[1].mlp.register_forward_hook(lambda module, arguments, output: output * 0.25)
    backend = Backend()
    close(torch.compile(ours, fullgraph=True, backend=backend)(images(1)), theirs(images(1)))
    assert backend.operators["attention"] == 1, "the second block runs the original"


@torch.no_grad()
def test_a_stem_with_a_hook_is_the_original() -> None:
    """Finding that out breaks the graph, and what goes on behind the break must not find itself again."""
    theirs, ours = pair(timm_model)
    for model in (theirs, ours):
        model.patch_embed.register_forward_hook(lambda module, arguments, output: output * 0.5)
    backend = Backend()
    close(torch.compile(ours, backend=backend)(images(1)), theirs(images(1)))
    assert backend.operators["attention"] == 2


@pytest.mark.parametrize("name", slow_but(QUICK, "timm vit"))
@torch.no_grad()
def test_where_no_kernel_can_run_it_is_the_original(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(QUICK[name])
    monkeypatch.setattr(launch, "accepts", lambda device: False)
    backend = Backend()
    close(tensors(torch.compile(ours, fullgraph=True, backend=backend)(images(1))), tensors(theirs(images(1))))
    assert backend.graphs == 1 and not backend.operators


@torch.no_grad()
def test_weights_may_change_after_compilation() -> None:
    theirs, ours = pair(timm_model, depth=1)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    close(compiled(images(1)), theirs(images(1)))
    for model in (theirs, ours):
        model.blocks[0].norm1.weight.mul_(2)
        model.blocks[0].mlp.fc1.bias.add_(1)
    close(compiled(images(1)), theirs(images(1)))


@torch.no_grad()
def test_one_block_compiled() -> None:
    theirs, ours = pair(hf_vit)
    layer = ours.layers[0] if hasattr(ours, "layers") else ours.encoder.layer[0]
    other = theirs.layers[0] if hasattr(theirs, "layers") else theirs.encoder.layer[0]
    z = theirs.embeddings(images(1))
    close(torch.compile(layer, fullgraph=True, backend="eager")(z), other(z))
    program = torch.export.export(layer, (z,))
    assert count(program.graph_module)["attention"] == 1
    close(program.module()(z), other(z))


STRICT = [pytest.param(name, True, marks=pytest.mark.slow) for name in QUICK]


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in QUICK), *STRICT])
def test_export(name: str, strict: bool) -> None:
    theirs, ours = pair(QUICK[name])
    program = torch.export.export(ours, (images(1),), strict=strict)
    assert count(program.graph_module)["attention"] == 2
    with torch.no_grad():
        close(tensors(program.module()(images(1, seed=1))), tensors(theirs(images(1, seed=1))))
        close(tensors(ours(images(1))), tensors(theirs(images(1))))
    assert "blocks" in str(vit_engine.explain(ours)) or name != "timm vit"


def test_export_with_a_dynamic_batch() -> None:
    theirs, ours = pair(timm_model, depth=1)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(ours, (images(2),), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        for size in (1, 3):
            close(program.module()(images(size)), theirs(images(size)))


@pytest.mark.parametrize("name", QUICK)
@torch.no_grad()
def test_a_trace_holds_the_original(name: str) -> None:
    """And with it the parameters themselves, not what was folded when it was made."""
    theirs, ours = pair(QUICK[name])
    tensors(ours(images(1)))
    traced: Any = torch.jit.trace(ours, images(2), strict=False)
    for model in (theirs, ours):
        for parameter in model.parameters():
            parameter.mul_(1.5)
    close(tensors(traced(images(3, seed=1))), tensors(theirs(images(3, seed=1))))
    assert "vit_engine::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("build", [timm_model, torchvision_model])
@torch.no_grad()
def test_extractors_of_features_by_torch_fx(build: Callable[..., Any]) -> None:
    """torch.fx runs the code of the outermost module's class, and forward() of those inside."""
    theirs, ours = pair(build)
    expected = theirs(images(1))
    for model in (ours, nn.Sequential(ours)):
        name, _ = list(model.named_children())[-1]
        close(create_feature_extractor(model, {name: "logits"})(images(1))["logits"], expected)
    close(ours(images(1)), expected)


def test_torchscript_says_what_to_do() -> None:
    _, ours = pair(timm_model, depth=1)
    with pytest.raises(AttributeError, match=r"torch.jit.script .*restore\(model\)"):
        torch.jit.script(ours)
    torch.jit.script(vit_engine.restore(ours))
