"""Autocast, inference mode, training, gradients, threads, and code that writes into tokens between blocks."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vit_engine

from . import support
from .support import ALL, close, hf_dinov2, hf_vit, images, launches_of, pair, reasons, slow_but, tensors, timm_model

pytestmark = pytest.mark.interpreted_only

WRITERS = {"timm vit": timm_model, "torchvision": support.torchvision_model, "vit": hf_vit}


def layers_of(model: Any) -> list[nn.Module]:
    """The encoder blocks of a model of any library."""
    for _, part in model.named_modules():
        if isinstance(part, nn.Sequential | nn.ModuleList) and len(part) == 2:
            return list(part)
    raise AssertionError("no blocks")


def backward(model: Any, x: Tensor) -> None:
    sum(t.square().sum() for t in tensors(model(x))).backward()  # type: ignore[union-attr]


def same_gradients(ours: Any, theirs: Any, relative: float = 1e-3) -> None:
    largest = max(p.grad.abs().max().item() for p in theirs.parameters() if p.grad is not None)
    seen = 0
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        # The softmax ignores biases of keys: what is left of their gradients is rounding.
        if b.grad is not None and b.grad.abs().max() > 1e-5 * largest:
            close(a.grad, b.grad, relative)
            seen += 1
    assert seen > 8


def test_autocast_runs_the_original() -> None:
    theirs, ours = pair(timm_model)
    x = images(1)
    with torch.no_grad(), torch.autocast(support.DEVICE, dtype=torch.bfloat16):
        assert launches_of(lambda: ours(x)) == []
        close(ours(x), theirs(x), 1e-2)
        assert "autocast" in reasons(ours)["blocks.0"]
    with torch.no_grad():
        assert "mlp" in launches_of(lambda: ours(x))


@pytest.mark.parametrize("name", slow_but(ALL, "timm vit", "vit"))
@torch.no_grad()
def test_bfloat16_in_the_interpreter_runs_the_original(name: str) -> None:
    """It would be computed wrongly."""
    theirs, ours = pair(ALL[name])
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    x = images(1).bfloat16()
    assert launches_of(lambda: ours(x)) == []
    close(ours(x), theirs(x), 0)
    said = reasons(ours)
    assert len(said) > 2 and all("bfloat16 wrongly" in why for why in said.values() if "not taken over" not in why)
    compiled = torch.compile(ours, backend="eager")
    assert launches_of(lambda: compiled(x)) == []


def test_backward_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that is computed again is in the dtype of the first; PyTorch's backward operators round to bfloat16."""
    theirs, ours = pair(timm_model, depth=1)
    block, autocast = type(ours.blocks[0]), []
    plain = block.forward

    def watched_forward(self: Any, x: Tensor) -> Tensor:
        autocast.append(torch.is_autocast_enabled(support.DEVICE))
        return plain(self, x)

    for model in (theirs, ours):
        loss = model(images(1)).square().sum()
        # Only now: the forward pass of a class with another forward() is not that of the kernels.
        with monkeypatch.context() as patch, torch.autocast(support.DEVICE, dtype=torch.bfloat16):
            patch.setattr(block, "forward", watched_forward)
            loss.backward()
    same_gradients(ours, theirs, 1e-2)
    assert autocast == [False], "ours again in the backward pass"


@pytest.mark.parametrize("name", slow_but(ALL, "timm vit", "timm beit", "vit"))
def test_gradients_in_eval_mode(name: str) -> None:
    """Of every parameter and of the images, although the pass ran on the kernels."""
    theirs, ours = pair(ALL[name])
    results = []
    for model in (ours, theirs):
        x = images(1).requires_grad_()
        if model is ours:
            # Blocks are differentiable; a stem of timm or torchvision runs PyTorch's operators then.
            assert launches_of(lambda model=model, x=x: backward(model, x)).count("attention") == 2
        else:
            backward(model, x)
        results.append(x.grad)
    close(*results)
    same_gradients(ours, theirs)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("build", [timm_model, hf_dinov2], ids=lambda f: f.__name__)
def test_training(build: Callable[..., Any], rate: float) -> None:
    if build is timm_model:
        theirs, ours = pair(build, proj_drop_rate=rate, pos_drop_rate=rate, drop_path_rate=rate)
    else:
        theirs, ours = pair(build, hidden_dropout_prob=rate, drop_path_rate=rate)
    for model in (theirs, ours):
        torch.manual_seed(3)
        backward(model.train(), images(2))
    same_gradients(ours, theirs)
    assert "train" in reasons(ours)[next(name for name in reasons(ours) if name.endswith(".0"))]
    with torch.no_grad():
        results = []
        for model in (theirs, ours):
            torch.manual_seed(4)
            results.append(tensors(model(images(2))))
        close(results[1], results[0])
        close(ours.eval()(images(1)), theirs.eval()(images(1)))
        assert "mlp" in launches_of(lambda: ours(images(1)))


def test_dropout_switched_on_before_backward_is_refused() -> None:
    _, ours = pair(timm_model, depth=1, proj_drop_rate=0.5)
    loss = ours(images(1)).sum()
    ours.train()
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()


def test_a_frozen_backbone_with_a_trained_head() -> None:
    theirs, ours = pair(timm_model)
    for model in (theirs, ours):
        model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head."))
    assert launches_of(lambda: backward(ours, images(2))).count("attention") == 2, "nothing in front asks for gradients"
    backward(theirs, images(2))
    close(ours.head.weight.grad, theirs.head.weight.grad)
    optimizer = torch.optim.SGD(ours.head.parameters(), lr=0.1)
    optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(ours(images(2)), theirs(images(2)))


def test_gradients_of_gradients() -> None:
    theirs, ours = pair(timm_model, depth=1)
    for model in (theirs, ours):
        model.blocks[0].attn.fused_attn = False  # whose backward pass has no derivative
        x = images(1).requires_grad_()
        z = model.blocks(model.patch_embed(x))
        (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        first.square().sum().backward()
    same_gradients(ours, theirs)  # of the blocks, and through them of the patch projection


def test_transforms_of_torch_func() -> None:
    theirs, ours = pair(timm_model, depth=1)
    x = images(2)

    def jacobian(model: Any) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(lambda image: model(image[None])[0, 0]))(x)

    close(jacobian(ours), jacobian(theirs))
    with torch.no_grad():
        parameters = {name: p * 1.5 for name, p in ours.named_parameters()}
        swapped = torch.func.functional_call(ours, parameters, (x,))
        close(swapped, torch.func.functional_call(theirs, parameters, (x,)))
        close(ours(x), theirs(x))


def test_threads_share_a_model() -> None:
    """Row statistics that one thread hands over are never taken for another's tokens."""
    theirs, ours = pair(hf_vit)
    inputs = [images(1, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [theirs(x).last_hidden_state for x in inputs]
    results: dict[int, Tensor] = {}
    lock = threading.Lock()  # the interpreter runs one launch at a time
    both = threading.Barrier(2)

    def work(number: int) -> None:
        with torch.no_grad():
            for at in (number, number + 2):
                with lock:
                    z = ours.embeddings(inputs[at])
                for block in layers_of(ours):
                    both.wait(60)  # by now both have handed something over, and one has overwritten the other's
                    with lock:
                        z = block(z)
                with lock:
                    results[at] = ours.layernorm(z)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for number, result in results.items():
        close(result, expected[number])


def add_one(module: Any, arguments: Any, output: Tensor) -> None:
    output.add_(1)


def add_one_behind_the_counter(module: Any, arguments: Any, output: Tensor) -> None:
    output.data[..., 0] += 1


def scale_before(module: Any, arguments: tuple[Tensor, ...]) -> None:
    arguments[0].mul_(torch.linspace(0.5, 2, arguments[0].shape[-1], device=arguments[0].device))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", slow_but(WRITERS, "timm vit", "vit"))
def test_writing_into_tokens_between_blocks(name: str, mode: Any) -> None:
    theirs, ours = pair(WRITERS[name])
    for model in (theirs, ours):
        first, second = layers_of(model)
        first.register_forward_hook(add_one)
        second.register_forward_pre_hook(scale_before)
    with mode():
        close(ours(images(1)), theirs(images(1)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda f: f.__name__)
def test_writing_into_tokens_by_hand(mode: Any) -> None:
    theirs, ours = pair(hf_vit)
    with mode():
        results = []
        for model in (theirs, ours):
            z = model.embeddings(images(1))
            z[:, 0] = z[:, 0] * 3
            for block in layers_of(model):
                z = block(z)
                z.mul_(torch.linspace(0.5, 2, z.shape[-1], device=z.device))
            results.append(z)
    close(results[1], results[0])
    with mode():
        z = ours.embeddings(images(1))
        one = launches_of(lambda: layers_of(ours)[0](z))
        assert "row_stats" not in one, "tokens that nobody wrote to keep their statistics"


@pytest.mark.parametrize("build", [timm_model, hf_vit], ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_hook_that_writes_through_data(build: Any) -> None:
    theirs, ours = pair(build)
    for model in (theirs, ours):
        layers_of(model)[0].register_forward_hook(add_one_behind_the_counter)
    close(ours(images(1)), theirs(images(1)))


def test_an_empty_batch() -> None:
    theirs, ours = pair(timm_model, depth=1)
    with torch.no_grad():
        close_shapes = ours(images(1)[:0]), theirs(images(1)[:0])
    assert close_shapes[0].shape == close_shapes[1].shape == (0, 7)


def test_images_of_any_strides() -> None:
    theirs, ours = pair(timm_model, depth=1)
    with torch.no_grad():
        for x in (images(2).to(memory_format=torch.channels_last), images(2).flip(3).transpose(2, 3)):
            close(ours(x), theirs(x))


def test_accelerate_leaves_the_original_alone() -> None:
    model = timm_model(depth=1)
    other = copy.deepcopy(model)
    assert vit_engine.accelerate(model) is model
    assert not list(vit_engine.dropin.api.attached_to(other))
