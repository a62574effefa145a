"""Bad models and bad inputs: TypeError or ValueError that says what came and what is expected."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import timm
import timm.models.vision_transformer as timm_vit
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig

import vit_engine

from . import support
from .support import close, hf_clip, hf_vit, images, kernels, launches_of, pair, reasons, timm_model

pytestmark = pytest.mark.interpreted_only


@pytest.fixture(scope="module")
def accelerated() -> dict[str, Any]:
    return {
        "timm": vit_engine.accelerate(timm_model(depth=1)),
        "eva": vit_engine.accelerate(support.eva(depth=1)),
        "beit": vit_engine.accelerate(support.beit(depth=1)),
        "torchvision": vit_engine.accelerate(support.torchvision_model(num_layers=1)),
        "vit": vit_engine.accelerate(hf_vit(num_hidden_layers=1)),
        "clip": vit_engine.accelerate(hf_clip(num_hidden_layers=1)),
    }


BAD_IMAGES: dict[str, tuple[Any, type[Exception], str]] = {
    "size": (lambda: images(1, (32, 40)), ValueError, "40"),
    "channels": (lambda: images(1)[:, :2], ValueError, "channel|3, H, W"),
    "no batch": (lambda: images(1)[0], ValueError, r"\[B, 3, H, W\]"),
    "device": (lambda: images(1).to("meta"), ValueError, "meta"),
    "an array": (lambda: images(1).tolist(), TypeError, "list"),  # transformers' ViT fails before its embeddings
}


@pytest.mark.parametrize("name", ["timm", "eva", "beit", "torchvision", "vit", "clip"])
@pytest.mark.parametrize("what", list(BAD_IMAGES))
@torch.no_grad()
def test_images(name: str, what: str, accelerated: dict[str, Any]) -> None:
    make, error, message = BAD_IMAGES[what]
    if (name, what) == ("vit", "an array"):
        error, message = AttributeError, "dtype"
    with pytest.raises(error, match=message):
        accelerated[name](make())


@pytest.mark.parametrize("name", ["timm", "eva", "beit", "torchvision"])
@torch.no_grad()
def test_dtypes(name: str, accelerated: dict[str, Any]) -> None:
    for dtype, found in ((torch.uint8, "uint8"), (torch.float64, "float64"), (torch.float16, "float16")):
        with pytest.raises(TypeError, match=rf"floating point.*{found}|float32.*{found}"):
            accelerated[name](images(1).to(dtype))


@torch.no_grad()
def test_transformers_casts_images_itself() -> None:
    theirs, ours = pair(hf_vit, num_hidden_layers=1)
    close(ours(images(1).double()), theirs(images(1).double()))


NOT_A_VIT = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "Linear": lambda: nn.Linear(2, 2),
    "BertModel": lambda: transformers.BertModel(
        transformers.BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    ),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", list(NOT_A_VIT))
def test_other_models_are_refused_by_name(name: str, strict: bool) -> None:
    expected = {"resnet18": "ResNet", "Linear": "Linear", "BertModel": "BertModel"}[name]
    with pytest.raises(TypeError, match=f"no kernels for .*{expected}: it has no encoder block.*Supported are timm"):
        vit_engine.accelerate(NOT_A_VIT[name](), strict=strict)


def test_attention_alone_is_offered_to_models_of_transformers() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    pair = (
        transformers.YolosModel(transformers.YolosConfig(**sizes, num_hidden_layers=1)),
        transformers.BloomModel(transformers.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2)),
    )
    for model, offered in zip(pair, (True, False), strict=True):
        with pytest.raises(TypeError, match="no encoder block") as raised:
            vit_engine.accelerate(model)
        assert ("vit_engine.register_attention()" in str(raised.value)) is offered
    with pytest.raises(TypeError) as raised:
        vit_engine.accelerate(nn.Linear(2, 2))
    assert "register_attention" not in str(raised.value)


@pytest.mark.parametrize("strict", [True, False])
def test_swin_is_named(strict: bool) -> None:
    for model in (
        timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1), num_heads=(1, 1)),
        torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [1, 1], [7, 7]),
    ):
        with pytest.raises(TypeError, match=r"SwinTransformerBlock.*shifted windows"):
            vit_engine.accelerate(model, strict=strict)


def hybrid() -> Any:
    return timm.create_model(
        "vit_small_r26_s32_224", img_size=64, embed_dim=32, depth=1, num_heads=2, num_classes=3
    ).eval()


@torch.no_grad()
def test_a_hybrid_is_refused_or_taken_in_parts() -> None:
    theirs = hybrid()
    with pytest.raises(TypeError, match=r"patch_embed.*HybridEmbed.*strict=False"):
        vit_engine.accelerate(copy.deepcopy(theirs))
    ours = vit_engine.accelerate(copy.deepcopy(theirs), strict=False)
    x = images(1, 64).cpu()
    close(ours(x), theirs(x))
    assert "blocks.0" in kernels(ours) and "HybridEmbed" in reasons(ours)["forward_features"]


@torch.no_grad()
def test_torchvisions_convolutional_stem_is_refused_or_runs_the_original() -> None:
    layers = [ConvStemConfig(out_channels=8, kernel_size=3, stride=stride) for stride in (2, 2, 2)]
    theirs = support.torchvision_model(num_layers=1, conv_stem_configs=layers)
    with pytest.raises(TypeError, match=r"for conv_proj: 4 layers \(a convolutional network\).*strict=False"):
        vit_engine.accelerate(copy.deepcopy(theirs))
    ours = vit_engine.accelerate(copy.deepcopy(theirs), strict=False)
    close(ours(images(1)), theirs(images(1)))
    assert "encoder.layers.encoder_layer_0" in kernels(ours) and "conv_proj" in reasons(ours)["the model"]


@pytest.mark.parametrize(
    "block", ["ResPostBlock", "ParallelScalingBlock", "DiffParallelScalingBlock", "ParallelThingsBlock"]
)
def test_other_blocks_of_timm_are_refused_by_name(block: str) -> None:
    with pytest.raises(TypeError, match=f"blocks.0: .*{block}"):
        vit_engine.accelerate(timm_model(block_fn=getattr(timm_vit, block)))


@torch.no_grad()
def test_what_is_plain_is_accelerated_without_strict() -> None:
    theirs = timm_model()
    other = timm_model(block_fn=timm_vit.ResPostBlock, init_values=0.5)
    theirs.blocks[1] = other.blocks[1]
    with pytest.raises(TypeError, match=r"blocks.1: .*ResPostBlock"):
        vit_engine.accelerate(copy.deepcopy(theirs))
    ours = vit_engine.accelerate(copy.deepcopy(theirs), strict=False)
    close(ours(images(1)), theirs(images(1)))
    assert "blocks.0" in kernels(ours)
    assert launches_of(lambda: ours(images(1))).count("attention") == 1
    assert "ResPostBlock" in str(vit_engine.explain(ours))


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (hf_vit, lambda model: None, r"layers.0: .*ViTLayer of transformers 4.57.1, needed is version 5"),
        (
            timm_model,
            lambda model: [delattr(block.attn, "head_dim") for block in model.blocks],
            r"blocks.0: .*Block of timm .*, needed is 1.0.24 or newer: 'Attention' object has no attribute 'head_dim'",
        ),
    ],
    ids=["transformers", "timm"],
)
def test_older_versions_of_a_library_are_named(
    build: Any, change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    change(model)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    for strict in (True, False):
        with pytest.raises(TypeError, match=message):
            vit_engine.accelerate(model, strict=strict)


def test_a_failed_accelerate_changes_nothing() -> None:
    model = timm_model(block_fn=timm_vit.ResPostBlock)
    before = [set(vars(part)) for part in model.modules()]
    with pytest.raises(TypeError):
        vit_engine.accelerate(model)
    assert [set(vars(part)) for part in model.modules()] == before


def test_meta_models() -> None:
    with torch.device("meta"):
        model = timm_vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"meta device.*to_empty"):
        vit_engine.accelerate(model)


class Linear8bit(nn.Module):
    """As libraries of quantised layers make them: whole numbers and a scale."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = base.weight.abs().max().item() / 127
        self.weight = nn.Parameter((base.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantise(model: Any) -> Any:
    for block in model.blocks:
        block.attn.qkv = Linear8bit(block.attn.qkv)
    return model


def dynamically_quantised(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model.cpu(), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", [quantise, dynamically_quantised], ids=lambda f: f.__name__)
def test_quantised_weights(how: Any) -> None:
    with pytest.raises(TypeError, match=r"blocks.0: attn.qkv is .*Linear.*quantised"):
        vit_engine.accelerate(how(timm_model()))
    with pytest.raises(TypeError, match="quantised"):
        vit_engine.accelerate(how(timm_model()), strict=False)


@torch.no_grad()
def test_quantised_after_acceleration() -> None:
    theirs, ours = pair(timm_model, depth=1)
    close(quantise(ours)(images(1)), quantise(theirs)(images(1)))
    assert "quantised" in reasons(ours)["blocks.0"]


def test_options() -> None:
    model = timm_model(depth=1)
    for given in ({"strict": "no"}, {"fold": 1}):
        (name, value) = next(iter(given.items()))
        with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}"):
            vit_engine.accelerate(model, **given)  # type: ignore[arg-type]


def test_not_a_module() -> None:
    for function in (vit_engine.accelerate, vit_engine.restore, vit_engine.explain, vit_engine.refresh):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
            function({})  # type: ignore[arg-type]


def test_not_accelerated() -> None:
    for function in (vit_engine.explain, vit_engine.refresh):
        with pytest.raises(ValueError, match=r"not accelerated; call vit_engine.accelerate"):
            function(nn.Linear(2, 2))


def test_our_own_model() -> None:
    ours = vit_engine.ViT(vit_engine.ViTConfig(image_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2))
    with pytest.raises(TypeError, match="already"):
        vit_engine.accelerate(ours.to(support.DEVICE))
