"""The references, held against PyTorch's own operators in float64, and the precision of their 16-bit form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers.activations import quick_gelu
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp, SwiGLUPacked

from vit_kernels import reference

from ..weights import Draw

FLOAT64 = torch.float64


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.fixture
def draw() -> Draw:
    return Draw(FLOAT64, device="cpu")


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_layer_norm(draw, eps):
    x, gamma, beta = draw.rows(7, 100), draw.gamma(100), draw.bias(100)
    close(reference.layer_norm(x, gamma, beta, eps), F.layer_norm(x, (100,), gamma, beta, eps))
    close(reference.layer_norm(x, None, None, eps), F.layer_norm(x, (100,), None, None, eps))


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm(draw, eps):
    x, gamma, beta = draw.rows(7, 100), draw.gamma(100), draw.bias(100)
    close(reference.layer_norm(x, gamma, None, eps, "rms"), F.rms_norm(x, (100,), gamma, eps))
    close(reference.layer_norm(x, gamma, beta, eps, "rms"), F.rms_norm(x, (100,), gamma, eps) + beta)


def test_norm_in_float32_is_torchs_own(draw):
    x, gamma, beta = draw.rows(7, 100).float(), draw.gamma(100).float(), draw.bias(100).float()
    assert torch.equal(reference.layer_norm(x, gamma, beta), F.layer_norm(x, (100,), gamma, beta, 1e-6))
    assert torch.equal(reference.layer_norm(x, gamma, kind="rms"), F.rms_norm(x, (100,), gamma, 1e-6))


def test_norm_refuses_another_kind(draw):
    with pytest.raises(ValueError, match="kind must be layer or rms; got 'batch'"):
        reference.layer_norm(draw.rows(2, 4), kind="batch")


def test_row_stats(draw):
    x = draw.rows(9, 77)
    mean, m2 = reference.row_stats(x)[:, 0]
    close(mean, x.mean(1))
    close(m2, x.var(1, correction=0) * 77)
    assert reference.row_stats(x.half()).dtype == torch.float32


ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name):
    x = torch.cat([torch.linspace(-20, 20, 2001), torch.tensor([-6e4, -12.0, 0.0, 12.0, 6e4])]).double()
    ours, theirs = reference.activate(x, name), ACTIVATIONS[name](x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_activation_refuses_another_name(draw):
    with pytest.raises(ValueError, match=r"activation must be one of none, gelu, .*got 'relu'"):
        reference.activate(draw.normal(2, 2), "relu")


def test_linear_with_everything(draw):
    x, weight, bias = draw.rows(6, 40), draw.weight(24, 40), draw.bias(24)
    gamma, beta, scale, residual = draw.gamma(40), draw.bias(40), draw.layer_scale(24), draw.rows(6, 24)
    norm = torch.nn.LayerNorm(40, eps=1e-5, dtype=FLOAT64)
    norm.load_state_dict({"weight": gamma, "bias": beta})
    fc = torch.nn.Linear(40, 24, dtype=FLOAT64)
    fc.load_state_dict({"weight": weight, "bias": bias})
    layer_scale = LayerScale(24)
    layer_scale.gamma = torch.nn.Parameter(scale)
    theirs = residual + layer_scale(F.gelu(fc(norm(x))))
    ours = reference.linear(x, weight, bias, "layer", gamma, beta, 1e-5, "gelu", scale, residual)
    close(ours, theirs.detach())


def test_mlp_is_timms(draw):
    module = Mlp(40, 70).double()
    module.load_state_dict(
        {
            "fc1.weight": draw.weight(70, 40),
            "fc1.bias": draw.bias(70),
            "fc2.weight": draw.weight(40, 70),
            "fc2.bias": draw.bias(40),
        }
    )
    x = draw.rows(6, 40)
    ours = reference.mlp(x, module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias, "none")
    close(ours.detach(), module(x).detach())


def test_swiglu_mlp_is_timms(draw):
    module = SwiGLUPacked(40, 60).double()
    module.load_state_dict(
        {
            "fc1.weight": draw.weight(60, 40),
            "fc1.bias": draw.bias(60),
            "fc2.weight": draw.weight(40, 30),
            "fc2.bias": draw.bias(40),
        }
    )
    x = draw.rows(6, 40)
    ours = reference.mlp(
        x, module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias, "none", activation="swiglu"
    )
    close(ours.detach(), module(x).detach())


def sdpa(q, k, v, **options) -> torch.Tensor:
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads_first, **options).transpose(1, 2)


def test_attention(draw):
    q, k, v = draw.normal(2, 5, 3, 16), draw.normal(2, 7, 3, 16), draw.normal(2, 7, 3, 16)
    close(reference.attention(q, k, v)[0], sdpa(q, k, v))
    close(reference.attention(q, k, v, scale=0.7)[0], sdpa(q, k, v, scale=0.7))


@pytest.mark.parametrize("shape", [(5, 7), (1, 1, 5, 7), (2, 1, 1, 7), (2, 3, 5, 7), (3, 1, 7)])
def test_attention_masks(draw, shape):
    q, k, v = draw.normal(2, 5, 3, 16), draw.normal(2, 7, 3, 16), draw.normal(2, 7, 3, 16)
    additive = draw.normal(*shape)
    boolean = additive > -1
    boolean[..., 0] = True
    close(reference.attention(q, k, v, mask=additive)[0], sdpa(q, k, v, attn_mask=additive))
    close(reference.attention(q, k, v, mask=boolean)[0], sdpa(q, k, v, attn_mask=boolean))


def test_attention_causal(draw):
    q, k, v = draw.normal(2, 6, 3, 16), draw.normal(2, 6, 3, 16), draw.normal(2, 6, 3, 16)
    close(reference.attention(q, k, v, causal=True)[0], sdpa(q, k, v, is_causal=True))


def test_attention_causal_is_aligned_to_the_last_query(draw):
    """The last queries of a longer sequence see what they saw in it."""
    q, k, v = draw.normal(2, 6, 3, 16), draw.normal(2, 6, 3, 16), draw.normal(2, 6, 3, 16)
    whole = reference.attention(q, k, v, causal=True)[0]
    close(reference.attention(q[:, 4:], k, v, causal=True)[0], whole[:, 4:])


def test_attention_key_lengths_cut_keys_off(draw):
    q, k, v = draw.normal(2, 4, 3, 16), draw.normal(2, 6, 3, 16), draw.normal(2, 6, 3, 16)
    o, lse = reference.attention(q, k, v, key_lengths=torch.tensor([2, 6]))
    for image, length in enumerate((2, 6)):
        alone = reference.attention(q[image, None], k[image, None, :length], v[image, None, :length])
        close(o[image, None], alone[0])
        close(lse[image, None], alone[1])


def test_attention_grouped_heads(draw):
    q, k, v = draw.normal(2, 4, 6, 16), draw.normal(2, 5, 2, 16), draw.normal(2, 5, 2, 16)
    close(reference.attention(q, k, v)[0], sdpa(q, k, v, enable_gqa=True))


def test_attention_log_sum_exp(draw):
    q, k, v = draw.normal(2, 5, 3, 16), draw.normal(2, 7, 3, 16), draw.normal(2, 7, 3, 16)
    scores = 0.25 * q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    close(reference.attention(q, k, v)[1], scores.logsumexp(-1))


def test_attention_without_an_allowed_key(draw):
    q, k, v = draw.normal(1, 2, 1, 16), draw.normal(1, 3, 1, 16), draw.normal(1, 3, 1, 16)
    o, lse = reference.attention(q, k, v, mask=torch.tensor([[True, False, True], [False, False, False]]))
    assert torch.equal(o[0, 1], torch.zeros(1, 16, dtype=FLOAT64))
    assert lse[0, 0, 1] == -torch.inf
    assert torch.isfinite(lse[0, 0, 0])


@pytest.mark.parametrize("patch", [(4, 4), (2, 5)], ids=["square", "2x5"])
def test_patch_embed_is_a_convolution(draw, patch):
    weight, bias, images = draw.weight(24, 3, *patch), draw.bias(24), draw.images(2, 3, 4 * patch[0], 3 * patch[1])
    theirs = F.conv2d(images, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    close(reference.patch_embed(images, weight, bias), theirs)


def test_patch_embed_prefix_and_both_forms_of_positions(draw):
    weight, images, prefix = draw.weight(24, 3, 4, 4), draw.images(2, 3, 8, 12), draw.normal(3, 24)
    patches = reference.patch_embed(images, weight)
    every, only = draw.normal(9, 24), draw.normal(6, 24)
    with_prefix = torch.cat([prefix.expand(2, 3, 24), patches], 1)
    close(reference.patch_embed(images, weight, None, prefix, every), with_prefix + every)
    theirs = torch.cat([prefix.expand(2, 3, 24), patches + only], 1)
    close(reference.patch_embed(images, weight, None, prefix, only), theirs)


def test_patch_embed_bytes(draw):
    weight, images = draw.weight(24, 3, 4, 4), draw.bytes(2, 3, 8, 12)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images.double() / 255 - mean.double()[:, None, None]) / std.double()[:, None, None]
    ours = reference.patch_embed(images, weight, None, None, None, mean.double(), std.double())
    close(ours, reference.patch_embed(pixels, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_products_accumulate_in_float32(dtype):
    """What eager rounds is the yardstick of every kernel test: a sloppy CPU product would make it a lenient one."""
    draw = Draw(dtype, device="cpu")
    x, weight = draw.normal(17, 1280), draw.weight(50, 1280)
    truth = reference.linear(x.double(), weight.double())
    error = (reference.linear(x, weight).double() - truth).norm() / truth.norm()
    rounded_once = (truth.to(dtype).double() - truth).norm() / truth.norm()
    assert error <= 1.05 * rounded_once
    q, k, v = draw.normal(2, 50, 3, 64), draw.normal(2, 197, 3, 64), draw.normal(2, 197, 3, 64)
    truth = reference.attention(q.double(), k.double(), v.double())[0]
    error = (reference.attention(q, k, v)[0].double() - truth).norm() / truth.norm()
    assert error <= 1.0 * torch.finfo(dtype).eps
