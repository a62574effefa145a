"""How ViT chooses, refuses and reports its backend; what the kernels compute is tested elsewhere."""

import functools
import sys
import types
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import vit_engine
from tests.engine.redraw import SMALL, images, relative, small_vit
from vit_engine import ViT, ViTConfig
from vit_kernels import launch


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """Kernels that accept the CPU, and fused forward passes that record their calls and return the torch backend's."""
    calls = []

    def forward_features(model, x):
        calls.append(model.backend)
        return model._torch_features(x)

    def forward(model, x):
        return model.forward_head(forward_features(model, x))

    stub = types.ModuleType("vit_engine.fused")
    vars(stub).update(forward_features=forward_features, forward=forward)
    monkeypatch.setitem(sys.modules, "vit_engine.fused", stub)
    monkeypatch.setattr(vit_engine, "fused", stub, raising=False)
    monkeypatch.setattr(launch, "accepts", lambda device: True)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    return types.SimpleNamespace(calls=calls, monkeypatch=monkeypatch)


def test_backend_names() -> None:
    model = small_vit()
    assert model.backend == "torch"
    assert model.set_backend("auto") is model
    assert model.backend == "torch"
    assert model.set_backend("triton").backend == "triton"
    assert "backend='triton'" in repr(model)
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'torch', 'triton', 'interpret', got 'cuda'"):
        model.set_backend("cuda")
    with pytest.raises(ValueError, match="got 'eager'"):
        ViT(ViTConfig(**SMALL), backend="eager")
    with pytest.raises(TypeError, match=r"config must be a ViTConfig, got str; see ViTConfig.preset\(name\)"):
        ViT("vit_tiny_patch16_224")  # type: ignore[arg-type]


def test_auto_follows_the_parameters() -> None:
    model = ViT(ViTConfig(**SMALL))
    assert model.backend == "torch"
    assert model.to("meta").backend == "torch"
    stand_in = types.SimpleNamespace(_backend="auto", pos_embed=types.SimpleNamespace(device=torch.device("cuda:1")))
    assert ViT.backend.fget(stand_in) == "triton"  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["triton", "interpret"])
def test_kernels_get_the_call(kernels, backend: str) -> None:
    model = small_vit().set_backend(backend)
    kernels.monkeypatch.setattr(launch, "interpreting", lambda: backend == "interpret")
    x = images(2, 3, 32, 32)
    expected = small_vit()(x)
    assert kernels.calls == []
    assert torch.equal(model(x), expected)
    assert kernels.calls == [backend]
    assert torch.equal(model.forward_head(model.forward_features(x)), expected)
    assert kernels.calls == [backend, backend]
    for call in (model, model.forward_features):
        with pytest.raises(ValueError, match="do not divide into patches"):
            call(images(2, 3, 32, 33))
    assert kernels.calls == [backend, backend]


@pytest.mark.parametrize(
    ("backend", "accepts", "interpreting", "texts"),
    [
        (
            "triton",
            False,
            False,
            ["'triton' cannot run with the model on 'cpu'", "NVIDIA GPU", "model.set_backend('torch')"],
        ),
        ("triton", True, True, ["TRITON_INTERPRET=1", "unset the variable", "backend 'interpret'"]),
        ("interpret", True, False, ["TRITON_INTERPRET=1 before the process imports triton", "use backend 'torch'"]),
        ("interpret", False, True, ["'interpret' cannot run with the model on 'cpu'"]),
    ],
)
def test_backend_that_cannot_run_says_why(kernels, backend, accepts, interpreting, texts) -> None:
    kernels.monkeypatch.setattr(launch, "accepts", lambda device: accepts)
    kernels.monkeypatch.setattr(launch, "interpreting", lambda: interpreting)
    model = small_vit().set_backend(backend)
    for call in (model, model.forward_features):
        with pytest.raises(RuntimeError) as error:
            call(images(1, 3, 32, 32))
        for text in texts:
            assert text in str(error.value)
    assert kernels.calls == []


@pytest.mark.parametrize("backend", ["triton", "interpret"])
def test_heads_too_wide_for_the_kernels_are_named(kernels, backend: str) -> None:
    model = small_vit(embed_dim=132, num_heads=1, depth=1)
    assert model(images(1, 3, 32, 32)).shape == (1, 7)
    kernels.monkeypatch.setattr(launch, "interpreting", lambda: backend == "interpret")
    for call in (model.set_backend(backend), model.forward_features):
        with pytest.raises(RuntimeError) as error:
            call(images(1, 3, 32, 32))
        text = f"backend {backend!r} cannot run with attention heads 132 wide: the kernels take up to 128; use"
        assert text in str(error.value)
    assert kernels.calls == []


@pytest.mark.parametrize("backend", ["triton", "interpret"])
def test_without_triton_the_kernels_say_what_is_missing(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """As on systems that Triton is not published for: there vit_kernels cannot be imported."""

    class Missing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] in ("triton", "vit_kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    model = small_vit(depth=1)
    assert model(images(1, 3, 32, 32)).shape == (1, 7)
    for call in (model.set_backend(backend), model.forward_features):
        with pytest.raises(RuntimeError) as error:
            call(images(1, 3, 32, 32))
        assert f"backend {backend!r} needs Triton, which is not installed" in str(error.value)
        assert "use model.set_backend('torch')" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_interpreter_is_asked_for_no_bfloat16(kernels, dtype: torch.dtype) -> None:
    kernels.monkeypatch.setattr(launch, "interpreting", lambda: True)
    model = small_vit(depth=1).to(dtype).set_backend("interpret")
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for call in (model, model.forward_features):
        for x in (pixels.to(dtype), pixels):
            if dtype != torch.bfloat16:
                call(x)
                continue
            with pytest.raises(RuntimeError) as error:
                call(x)
            for text in ("bfloat16 wrongly", "model.float() or model.half()", "model.set_backend('torch')"):
                assert text in str(error.value)
    assert len(kernels.calls) == (0 if dtype == torch.bfloat16 else 4)
    kernels.monkeypatch.setattr(launch, "interpreting", lambda: False)
    model.set_backend("triton")(pixels)


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "head_dropout", "stochastic_depth"])
def test_kernels_refuse_random_rates(kernels, rate: str) -> None:
    overrides: dict[str, Any] = {rate: 0.1}
    model = small_vit(**overrides).set_backend("triton").train()
    x = images(1, 3, 32, 32)
    with torch.no_grad(), pytest.raises(RuntimeError) as error:
        model(x)
    for text in ("dropout or stochastic depth", "training mode", "model.eval()", "model.set_backend('torch')"):
        assert text in str(error.value)
    assert kernels.calls == []
    model.eval()(x)
    assert kernels.calls == ["triton"]


def test_kernels_refuse_gradients(kernels) -> None:
    model = small_vit().set_backend("triton").train()
    x = images(1, 3, 32, 32)
    for call in (model, model.forward_features):
        with pytest.raises(RuntimeError) as error:
            call(x)
        for text in ("computes no gradients", "model.eval()", "torch.no_grad()", "model.set_backend('torch')"):
            assert text in str(error.value)
        with pytest.raises(RuntimeError, match="computes no gradients"):
            call(x.clone().requires_grad_(True))
    with pytest.raises(RuntimeError, match="computes no gradients"):
        model.eval()(x.clone().requires_grad_(True))
    assert kernels.calls == []
    with torch.no_grad():
        model.train()(x)
    model.eval()(x)
    assert kernels.calls == ["triton", "triton"]


def duals(model: ViT, x: torch.Tensor, name: str) -> Any:
    """A pass in forward mode in which the images, or a parameter, carry a tangent."""

    def passed() -> torch.Tensor:
        state = {n: p.detach() for n, p in model.named_parameters()}
        given = {"images": x, **state}
        given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        return torch.func.functional_call(model, {n: given[n] for n in state}, (given["images"],))

    return passed


@pytest.mark.parametrize("name", ["images", "head.bias", "blocks.0.mlp.fc1.weight"])
@torch.no_grad()
def test_kernels_refuse_tangents(kernels, name: str) -> None:
    model, x = small_vit().set_backend("triton"), images(1, 3, 32, 32)
    passed = duals(model, x, name)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=r"in forward mode .* neither: use model.set_backend\('torch'\)"):
            passed()
        assert kernels.calls == []
        model(x)  # nothing to drop
        assert kernels.calls == ["triton"]
    jvp = functools.partial(torch.func.jvp, model, (x,), (x,))
    with sdpa_kernel(SDPBackend.MATH):
        with pytest.raises(RuntimeError, match="in forward mode"):
            jvp()
        model.set_backend("torch")
        jvp()
        with forward_ad.dual_level():
            assert forward_ad.unpack_dual(passed()).tangent is not None


@torch.no_grad()
def test_the_head_has_no_say_in_the_tangents_of_features(kernels) -> None:
    model, x = small_vit().set_backend("triton"), images(1, 3, 32, 32)
    features = model.forward_features
    with forward_ad.dual_level(), pytest.MonkeyPatch.context() as patch:
        for name, refused in (("head.bias", False), ("norm.bias", True)):
            parent, _, last = name.rpartition(".")
            table: Any = model.get_submodule(parent)._parameters
            patch.setitem(table, last, forward_ad.make_dual(table[last].detach(), table[last].detach()))
            if refused:
                with pytest.raises(RuntimeError, match="in forward mode"):
                    features(x)
            else:
                features(x)
    assert kernels.calls == ["triton"]


def test_a_head_alone_trains_on_kernel_features(kernels) -> None:
    model = small_vit().set_backend("triton").requires_grad_(False).train()
    model.head.requires_grad_(True)
    x = images(1, 3, 32, 32)
    with pytest.raises(RuntimeError, match="computes no gradients"):
        model(x)
    model.forward_head(model.forward_features(x)).sum().backward()
    assert model.head.weight.grad is not None
    assert kernels.calls == ["triton"]


def test_tracing_does_not_ask_the_driver(kernels) -> None:
    def driver(device):
        raise AssertionError("the driver was asked while a graph was traced")

    model = small_vit(depth=1).set_backend("triton").requires_grad_(False)
    kernels.monkeypatch.setattr(launch, "accepts", driver)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = images(2, 3, 16, 40)
    assert relative(compiled(x), small_vit(depth=1)(x)) < 1e-12
