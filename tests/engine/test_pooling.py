"""The attention-pooling head (MAP) against timm's, on both backends."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.engine.redraw import SMALL, images, redraw, relative, small_vit, timm_model
from tests.rung import DEVICE, DTYPES, RUNG
from vit_bench.plan import model_calls
from vit_bench.tolerance import check
from vit_engine import ViT, ViTConfig, fused, load_model, save_checkpoint
from vit_engine.pooling import AttentionPool

BACKEND = "interpret" if RUNG == "interpreted" else "triton"
MAP = {"global_pool": "map", "class_token": False}

VARIANTS: dict[str, dict] = {
    "SigLIP": MAP,
    "SigLIP 2": {**MAP, "activation": "gelu_tanh", "num_classes": 0},
    "class token and registers beside it": {"global_pool": "map", "num_register_tokens": 2},
    "norm after pooling": {**MAP, "fc_norm": True},
    "no qkv bias in the blocks, narrow MLP": {**MAP, "qkv_bias": False, "mlp_ratio": 1.5, "num_heads": 4},
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_timm(name: str) -> None:
    """timm's weights load with strict=True; tokens, pooled features and logits agree in float64."""
    config = ViTConfig(**{**SMALL, **VARIANTS[name]})
    theirs = timm_model(config).double()
    ours = ViT(config).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(2, 3, 32, 32)
    tokens = ours.forward_features(x)
    assert relative(tokens, theirs.forward_features(x)) < 1e-10
    pooled = theirs.forward_head(tokens, pre_logits=True)
    assert relative(ours.forward_head(tokens, pre_logits=True), pooled) < 1e-10
    assert relative(ours(x), theirs(x)) < 1e-10


@torch.no_grad()
def test_formula() -> None:
    """a = MHA(p W_q, x W_k, x W_v), y = a + MLP(LN(a)), head by head in plain operations."""
    pool = AttentionPool(ViTConfig(**{**SMALL, **MAP})).double()
    redraw(pool)
    x = images(2, 5, 48)
    state = pool.state_dict()
    query = state["latent"][0] @ state["q.weight"].T + state["q.bias"]
    key, value = (x @ state["kv.weight"].T + state["kv.bias"]).split(48, dim=2)
    heads = []
    for columns in torch.arange(48).split(16):
        scores = key[..., columns] @ query[0, columns] / 4
        heads.append(torch.einsum("bn,bnd->bd", scores.softmax(dim=1), value[..., columns]))
    a = torch.cat(heads, dim=1) @ state["proj.weight"].T + state["proj.bias"]
    normed = (a - a.mean(1, keepdim=True)) / (a.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    normed = normed * state["norm.weight"] + state["norm.bias"]
    hidden = torch.nn.functional.gelu(normed @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"])
    assert relative(pool(x), a + hidden @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"]) < 1e-12


@torch.no_grad()
def test_every_parameter_matters() -> None:
    model = small_vit(global_pool="map", num_register_tokens=1)
    assert model.attn_pool is not None
    x = images(2, 3, 32, 32)
    before = model(x)
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.zero_()
        assert relative(model(x), before) > 1e-4, name
        parameter.copy_(kept)
    # Softmax ignores what is added to all scores: the key half of the bias has no effect.
    model.attn_pool.kv.bias[:48].zero_()
    assert relative(model(x), before) < 1e-12


@torch.no_grad()
def test_only_patch_tokens_are_pooled() -> None:
    model = small_vit(global_pool="map", num_register_tokens=2)
    tokens = images(2, 19, 48)
    before = model.pool(tokens)
    changed = tokens.clone()
    changed[:, :3] += 1
    assert torch.equal(model.pool(changed), before)
    changed[:, 3] += 1
    assert not torch.equal(model.pool(changed), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_behind_the_kernels(dtype: torch.dtype) -> None:
    config = ViTConfig(**{**SMALL, "depth": 1, "num_register_tokens": 1, "global_pool": "map"})
    eager = redraw(ViT(config, backend="torch").eval()).to(dtype)
    truth = copy.deepcopy(eager).double()
    ours = copy.deepcopy(eager).to(DEVICE)
    assert isinstance(ours, ViT)
    ours.set_backend(BACKEND)
    x = images(2, 3, 32, 32, dtype=dtype)
    logits = ours(x.to(DEVICE))
    check(logits.cpu(), eager(x), truth(x.double()), name="MAP head")
    assert torch.equal(fused.forward_head(ours, ours.forward_features(x.to(DEVICE))), logits)
    assert ours(x[:0].to(DEVICE)).shape == (0, 7)


def test_it_trains_alone_on_the_kernels_features() -> None:
    model = small_vit(**MAP, depth=1).float().to(DEVICE).set_backend(BACKEND).requires_grad_(False).train()
    assert model.attn_pool is not None
    model.attn_pool.requires_grad_(True)
    x = images(1, 3, 32, 32, dtype=torch.float32).to(DEVICE)
    with pytest.raises(RuntimeError, match="computes no gradients"):
        model(x)
    model.forward_head(model.forward_features(x)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.attn_pool.parameters())


def test_has_no_dropout() -> None:
    model = small_vit(**MAP, dropout=0.5, attention_dropout=0.5).train()
    plain = small_vit(**MAP)
    tokens = images(2, 16, 48)
    assert torch.equal(model.pool(tokens), plain.pool(tokens))


def test_initialisation() -> None:
    torch.manual_seed(0)
    state = AttentionPool(ViTConfig(**{**SMALL, **MAP, "embed_dim": 1536, "mlp_ratio": 0.1})).state_dict()
    # A normal of deviation 1536^-0.5 = 0.0255 cut at two deviations has deviation 0.0225.
    assert 0.0213 < float(state["latent"].std()) < 0.0237
    assert float(state["latent"].abs().max()) <= 2 * 1536**-0.5 + 1e-7
    for name in ("q.weight", "kv.weight", "proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"):
        assert 0.0174 < float(state[name].std()) < 0.0178, name
    assert not any(state[name].any() for name in state if name.endswith(".bias"))


@pytest.mark.parametrize(("after_pool", "all_tokens", "one_row"), [(None, 1, 0), (True, 0, 1)])
def test_the_plan_of_launches_knows_what_is_normalised(after_pool: bool | None, all_tokens: int, one_row: int) -> None:
    config = ViTConfig.preset("vit_base_patch16_siglip_224", fc_norm=after_pool)
    planned = {call.label: call.times for call in model_calls(config, 1, torch.float16)}
    assert (planned["final norm"], planned["final norm, class token"]) == (all_tokens, one_row)


def test_file_and_graph(tmp_path) -> None:
    model = small_vit(**MAP)
    x = images(2, 3, 32, 32)
    save_checkpoint(model, tmp_path / "map.safetensors")
    back = load_model(tmp_path / "map.safetensors")
    assert back.config == model.config
    assert torch.equal(back(x), model(x))
    program = torch.export.export(model, (x,))
    assert relative(program.module()(x), model(x)) < 1e-12
