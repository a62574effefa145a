"""Accelerated models in CUDA graphs: the same results, and the library's own behaviour where there can be none.

The GPU's part is played by `fake_cuda`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn

import vit_engine
from tests.engine.fake_cuda import FakeCuda, fake_cuda
from tests.engine.stand_in import repeated
from vit_engine.dropin.api import attached_to
from vit_engine.dropin.graphed import Graphed

from . import support
from .support import hf_vit, images, tensors, timm_model, torchvision_model
from .test_replays import edit, forward_of_a_part, hook_inside_a_block, hook_on_a_block

pytestmark = pytest.mark.interpreted_only
__all__ = ["fake_cuda", "repeated"]

BUILDS: dict[str, Callable[..., Any]] = {
    "timm": lambda: timm_model(depth=1),
    "torchvision": lambda: torchvision_model(num_layers=1),
    "transformers": lambda: hf_vit(num_hidden_layers=1),
}


def both(build: Callable[..., Any], **more: Any) -> tuple[Any, Any]:
    """(accelerated without graphs, accelerated with them), of the same parameters."""
    model = build()
    return vit_engine.accelerate(copy.deepcopy(model)), vit_engine.accelerate(model, graphs=True, **more)


def same(a: Any, b: Any) -> bool:
    found, expected = tensors(a), tensors(b)
    return type(a) is type(b) and len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def graph_lines(model: nn.Module) -> tuple[str, ...]:
    return vit_engine.explain(model).graphs


@pytest.mark.parametrize("name", list(BUILDS))
def test_a_whole_model_is_replayed_bit_for_bit(name: str, fake_cuda: FakeCuda) -> None:
    without, ours = both(BUILDS[name])
    results = [ours(images(1, seed=seed)) for seed in range(3)]
    assert (fake_cuda.captures, fake_cuda.replays) == (1, 2)
    for seed, result in enumerate(results):
        assert same(result, without(images(1, seed=seed)))
    assert graph_lines(ours) == ("the model: CUDA graphs, at most 8: [1, 3, 32, 32] float32",)
    assert graph_lines(without) == ()
    assert vit_engine.explain(ours).rows == vit_engine.explain(without).rows
    replays = fake_cuda.replays
    vit_engine.refresh(ours)
    assert same(ours(images(1)), results[0]) and fake_cuda.replays == replays
    vit_engine.restore(ours)
    assert not list(attached_to(ours)) and "forward" not in vars(ours)


def test_explain_gives_the_reasons_of_the_pass_that_was_captured(fake_cuda: FakeCuda) -> None:
    _, ours = both(BUILDS["timm"])
    for _ in range(2):
        ours(images(1))
    captured = vit_engine.explain(ours)
    with torch.autocast("cpu", torch.bfloat16):
        ours(images(1))
    assert all("autocast" in row.why for row in vit_engine.explain(ours).rows if row.module.startswith("blocks"))
    ours(images(1))
    assert fake_cuda.replays == 2 and vit_engine.explain(ours) == captured


def slow(change: Callable[[Any], None]) -> Any:
    return pytest.param(change, marks=pytest.mark.slow)


@pytest.mark.parametrize("change", [edit, hook_inside_a_block, slow(hook_on_a_block), slow(forward_of_a_part)])
@pytest.mark.parametrize("name", ["timm", pytest.param("transformers", marks=pytest.mark.slow)])
def test_a_change_is_never_left_out(name: str, change: Callable[[Any], None], fake_cuda: FakeCuda) -> None:
    without, ours = both(BUILDS[name])
    for _ in range(2):
        before = ours(images(1))
    assert fake_cuda.replays == 1
    for model in (without, ours):
        target = model if name == "timm" else nn.ModuleDict({"blocks": model.layers})
        change(_Blocks(target) if name == "transformers" else model)
    for _ in range(3):
        after = ours(images(1))
        assert same(after, without(images(1))) and not same(after, before)
    # A hook has to run every time; weights may be captured again.
    assert fake_cuda.replays == (3 if change is edit else 1)


class _Blocks:
    """A transformers model as the changes of test_replays know one."""

    def __init__(self, model: Any) -> None:
        self.blocks = model["blocks"]


def test_keyword_arguments_and_outputs_of_transformers(fake_cuda: FakeCuda) -> None:
    without, ours = both(lambda: hf_vit(num_hidden_layers=1))
    x = images(1)
    for arguments in ({"output_hidden_states": True}, {"return_dict": False}):
        expected = without(pixel_values=x, **arguments)
        for _ in range(3):
            assert same(ours(pixel_values=x, **arguments), expected)
    # The first pass with hidden states puts transformers' own hooks on the layers, which is a change.
    assert (fake_cuda.captures, fake_cuda.replays) == (2, 3)
    for _ in range(2):
        assert not isinstance(ours(x), tuple)
    # What a configuration says is looked at in every pass of the library's code.
    ours.config.return_dict = False
    assert isinstance(ours(x), tuple) and fake_cuda.replays == 4


def test_a_model_around_that_collects_outputs_gets_them(fake_cuda: FakeCuda) -> None:
    from transformers.utils import output_capturing

    _, ours = both(lambda: hf_vit(num_hidden_layers=1))
    for _ in range(2):
        ours(images(1))
    token = output_capturing._active_collector.set({"hidden_states": []})
    try:
        ours(images(1))
    finally:
        output_capturing._active_collector.reset(token)
    assert fake_cuda.replays == 1 and "collects outputs" in graph_lines(ours)[1]


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm_model(depth=1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.backbone(x) * self.calls


def test_a_model_inside_a_users_own_is_captured_and_the_users_code_runs(fake_cuda: FakeCuda) -> None:
    ours = vit_engine.accelerate(Wrapped().eval(), graphs=2)
    results = [ours(images(1)) for _ in range(3)]
    assert fake_cuda.replays == 2 and ours.calls == 3
    assert torch.allclose(results[2], 3 * results[0])
    assert graph_lines(ours)[0].startswith("backbone: CUDA graphs, at most 2")


class Mine(timm_vit.VisionTransformer):
    pass


def test_what_graphs_cannot_be_asked_for(fake_cuda: FakeCuda) -> None:
    model = support.ready(Mine(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=7))
    with pytest.raises(TypeError, match=r"graphs=True captures a whole model .*Mine are in a class of its own"):
        vit_engine.accelerate(model, graphs=True)
    assert not list(attached_to(model))
    with pytest.raises(ValueError, match="graphs must be at least 1"):
        vit_engine.accelerate(model, graphs=0)
    with pytest.raises(TypeError, match="graphs must be True, False or how many"):
        vit_engine.accelerate(model, graphs="yes")  # type: ignore[arg-type]


class Adapter(nn.Linear):
    """Decides by something that no fingerprint sees."""

    switched_on = [False]  # noqa: RUF012 (that it is shared and changes is the point)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return -y if self.switched_on[0] else y


def test_a_block_with_foreign_code_is_not_captured(fake_cuda: FakeCuda) -> None:
    _, ours = both(BUILDS["timm"])
    layer = ours.blocks[0].mlp.fc1
    adapter = Adapter(layer.in_features, layer.out_features)
    adapter.load_state_dict(layer.state_dict())
    ours.blocks[0].mlp.fc1 = adapter.eval()
    results = []
    for Adapter.switched_on[0] in (False, False, True):
        results.append(ours(images(1)))
    Adapter.switched_on[0] = False
    assert fake_cuda.captures == 0 and not torch.allclose(results[1], results[2])
    assert any("blocks.0 runs the original code" in line for line in graph_lines(ours))


def test_no_gpu_is_reported_and_nothing_else_changes() -> None:
    without, ours = both(BUILDS["torchvision"])
    with torch.no_grad():
        assert same(ours(images(1)), without(images(1)))
    assert graph_lines(ours) == (
        "the model: CUDA graphs, at most 8: none",
        "the model: the last pass was not replayed from a graph: an input is on 'cpu': CUDA graphs need an NVIDIA GPU",
    )


def test_copies_are_graphed_anew(fake_cuda: FakeCuda) -> None:
    _, ours = both(BUILDS["torchvision"])
    for _ in range(2):
        expected = ours(images(1))
    other = copy.deepcopy(ours)
    assert same(other(images(1)), expected) and fake_cuda.replays == 1
    (found,) = (a for a in attached_to(other) if isinstance(a, Graphed))
    assert found.module is other and found.graphs.limit == 8 and found.inner is not None
    assert found.inner.module is other


def test_compiled_models_have_no_graphs_of_ours(fake_cuda: FakeCuda) -> None:
    _, ours = both(BUILDS["timm"])
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for _ in range(3):
        found = compiled(images(1))
    (graphed,) = (a for a in attached_to(ours) if isinstance(a, Graphed))
    assert fake_cuda.captures == 0 and graphed.graphs.why == "no pass has been made yet", "looked at while traced"
    torch.testing.assert_close(found, ours(images(1)), rtol=1e-4, atol=1e-4)
