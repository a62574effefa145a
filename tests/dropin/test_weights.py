"""Parameters after acceleration: shared with nobody else's memory, and what is derived from them is never stale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vit_engine
from tests.engine.redraw import redraw

from .support import ALL, beit, close, hf_vit, images, launches_of, pair, timm_model, torchvision_model

pytestmark = pytest.mark.interpreted_only


@pytest.mark.parametrize("name", list(ALL))
def test_state_dict_is_the_same_tensors(name: str) -> None:
    model = ALL[name]()
    before = {key: t.data_ptr() for key, t in model.state_dict().items()}
    buffers = [key for key, _ in model.named_buffers()]
    vit_engine.accelerate(model)
    with torch.no_grad():
        model(images(1))
    assert {key: t.data_ptr() for key, t in model.state_dict().items()} == before
    assert [key for key, _ in model.named_buffers()] == buffers


def step(model: Any) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        model(images(1)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def load(model: Any) -> None:
    model.load_state_dict(redraw(copy.deepcopy(model), seed=5).state_dict())


def assign(model: Any) -> None:
    model.load_state_dict(redraw(copy.deepcopy(model), seed=6).state_dict(), assign=True)


def edit(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln" in name or "bias" in name:
            parameter.add_(0.25)


def replace(model: Any) -> None:
    for part in model.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.weight = torch.nn.Parameter(part.weight * 2)


def drop_bias(model: Any) -> None:
    for part in model.modules():
        if isinstance(part, torch.nn.Linear) and part.bias is not None:
            part.register_parameter("bias", None)


def swap_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


CHANGES = [step, load, assign, edit, replace, drop_bias, swap_data]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_change_of_weights_is_never_missed(change: Callable[[Any], None]) -> None:
    theirs, ours = pair(timm_model, depth=1)
    before = theirs(images(1))
    close(ours(images(1)), before)
    for model in (theirs, ours):
        change(model)
    expected = theirs(images(1))
    assert not torch.allclose(expected, before, rtol=1e-3)
    close(ours(images(1)), expected)
    assert "mlp" in launches_of(lambda: ours(images(1)))


@pytest.mark.parametrize("build", [torchvision_model, hf_vit], ids=lambda f: f.__name__)
@torch.no_grad()
def test_other_libraries_follow_their_weights(build: Callable[..., Any]) -> None:
    theirs, ours = pair(build)
    close(ours(images(1)), theirs(images(1)))
    for change in (edit, load):
        for model in (theirs, ours):
            change(model)
        close(ours(images(1)), theirs(images(1)))


@torch.no_grad()
def test_precision() -> None:
    theirs, ours = pair(timm_model, depth=1)
    x = images(1)
    close(ours(x), theirs(x))
    truth = copy.deepcopy(theirs).double()(x.double())
    for model in (ours, theirs):
        model.half()
    result, eager = ours(x.half()), theirs(x.half())
    assert result.dtype == torch.float16 and "mlp" in launches_of(lambda: ours(x.half()))
    assert (result - truth).abs().max() <= 2 * (eager - truth).abs().max() + 2**-10 * truth.abs().max()
    for model in (ours, theirs):
        model.double()
    close(ours(x.double()), theirs(x.double()), 1e-9)
    assert launches_of(lambda: ours(x.double())) == []
    for model in (ours, theirs):
        model.float()
    close(ours(x), theirs(x))


@torch.no_grad()
def test_a_change_of_beits_position_index_is_seen() -> None:
    """A buffer that no state_dict holds: whoever fills an empty model writes it last, perhaps behind a first pass."""
    theirs, ours = pair(beit, depth=1)
    close(ours(images(1)), theirs(images(1)))
    for model in (theirs, ours):
        index = model.blocks[0].attn.relative_position_index
        index.copy_(index.flip(0))
    close(ours(images(1)), theirs(images(1)), 1e-5)


@torch.no_grad()
def test_data_edits_need_refresh() -> None:
    theirs, ours = pair(timm_model, depth=1)
    close(ours(images(1)), theirs(images(1)))
    for model in (theirs, ours):
        for parameter in model.parameters():
            parameter.data.mul_(1.25)
    assert vit_engine.refresh(ours) is ours
    close(ours(images(1)), theirs(images(1)))


def test_parameters_of_inference_mode_need_refresh() -> None:
    with torch.inference_mode():
        theirs, ours = pair(timm_model, depth=1)
        x = images(1)
        close(ours(x), theirs(x))
        nbytes = vit_engine.explain(ours).nbytes
        assert nbytes > 0
        for model in (theirs, ours):
            model.blocks[0].norm1.weight.mul_(3)
        expected = theirs(x)
        assert not torch.allclose(ours(x), expected, rtol=1e-3), "no counter tells of this change"
        close(vit_engine.refresh(ours)(x), expected)
        for model in (theirs, ours):
            model.blocks[0].norm1.weight = torch.nn.Parameter(model.blocks[0].norm1.weight * 2)
        close(ours(x), theirs(x))


@pytest.mark.parametrize("build", [timm_model, hf_vit], ids=lambda f: f.__name__)
@torch.no_grad()
def test_fold(build: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    model = build()
    folded = vit_engine.accelerate(copy.deepcopy(model))
    unfolded = vit_engine.accelerate(copy.deepcopy(model), fold=False)
    assert vit_engine.explain(folded).nbytes == 0, "made when first needed"
    close(folded(images(1)), model(images(1)))
    close(unfolded(images(1)), model(images(1)))
    table = vit_engine.explain(folded)
    # Two blocks of width 32: qkv [96, 32] and fc1 [128 or 64, 32], each with column sums and bias in fp32.
    hidden = 128 if build is timm_model else 64
    weights = 2 * (96 * 32 + hidden * 32) * 4
    assert weights <= table.nbytes <= weights + 2 * 4 * (96 + hidden) * 4
    assert table.parameter_bytes == sum(p.nbytes for p in model.parameters())
    assert f"derived tensors: {table.nbytes:,} bytes" in capsys.readouterr().out
    assert vit_engine.explain(unfolded).nbytes == (0 if build is timm_model else vit_engine.explain(unfolded).nbytes)
    assert vit_engine.explain(unfolded).nbytes < weights / 8
    one, two = (launches_of(lambda model=model: model(images(1))) for model in (folded, unfolded))
    assert two.count("layer_norm") == one.count("layer_norm") + 4
    assert vit_engine.explain(vit_engine.refresh(folded)).nbytes == 0
