"""The launches of one forward pass as calls of the launchers, by shape only.

What compiling and timing need of a model is the shapes, dtypes, strides and options with which it calls the
launchers. Tensors live on the meta device by default, so that a batch of 256 through ViT-g costs no memory; elsewhere
they are ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import vit_kernels
from vit_engine.config import ViTConfig

BATCHES = (1, 8, 64, 256)


@dataclass(frozen=True)
class Call:
    """One launcher call of a model.

    kernel: the launcher's name; label: what it is in the model; times: how often one forward pass of float images makes
    it, 0 for the calls of other entry points (uint8 images, features of all tokens, statistics of rows that no kernel
    of ours wrote) and of models that are no preset.
    """

    kernel: str
    label: str
    run: Callable[[], object]
    times: int


def model_calls(config: ViTConfig, batch: int, dtype: torch.dtype, device: str = "meta") -> Iterator[Call]:
    """The distinct launcher calls of `config` (each encoder block repeats the same ones), in the order of a forward."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    new_fp32 = partial(new, dtype=torch.float32)
    width, hidden, tokens = config.embed_dim, config.mlp_hidden, config.num_tokens
    rows = batch * tokens
    vector = new(width)
    scale = new(width) if config.layer_scale is not None else None
    x = new(rows, width)
    stats = new_fp32(2, -(-width // 64), rows)

    size = (batch, config.in_channels, *config.image_hw)
    stem: list[torch.Tensor | None] = [new(width, config.in_channels, *config.patch_hw), vector]
    stem.append(new(config.num_prefix_tokens, width) if config.num_prefix_tokens else None)
    stem.append(new(config.num_patches + config.num_position_prefix, width))
    constants = new_fp32(config.in_channels)
    embed = partial(vit_kernels.patch_embed, emit_stats=True)
    yield Call("patch_embed", "stem", partial(embed, new(*size), *stem), 1)
    raw = new(*size, dtype=torch.uint8)
    yield Call("patch_embed", "stem, uint8", partial(embed, raw, *stem, mean=constants, std=constants), 0)
    yield Call("row_stats", "statistics", partial(vit_kernels.row_stats, x), 0)

    qkv, sums, folded_bias = new(3 * width, width), new_fp32(3 * width), new_fp32(3 * width)
    normed = partial(vit_kernels.linear, norm="layer", stats=stats, column_sum=sums)
    yield Call("linear", "qkv", partial(normed, x, qkv, folded_bias), config.depth)
    packed = new(batch, tokens, 3, config.num_heads, config.head_dim)
    yield Call("attention", "attention", partial(vit_kernels.attention, *packed.unbind(2)), config.depth)
    added = partial(vit_kernels.linear, layer_scale=scale, residual=x, emit_stats=True)
    attended = new(rows, width)
    yield Call("linear", "projection", partial(added, attended, new(width, width), vector), config.depth)

    inner = hidden // 2 if config.activation == "swiglu" else hidden
    sums, folded_bias = new_fp32(hidden), new_fp32(hidden)
    feed_forward = partial(
        vit_kernels.mlp,
        stats=stats,
        column_sum=sums,
        activation=config.activation,
        layer_scale=scale,
        residual=x,
        emit_stats=True,
    )
    run = partial(feed_forward, x, new(hidden, width), folded_bias, new(width, inner), vector)
    yield Call("mlp", "mlp", run, config.depth)
    # The class token is normalised alone. Patches are pooled as normalised rows, or what was pooled is normalised.
    all_rows = config.global_pool != "token" and not config.norm_after_pool
    normalise = partial(vit_kernels.layer_norm, weight=vector, bias=new(width))
    yield Call("layer_norm", "final norm", partial(normalise, x), int(all_rows))
    run = partial(normalise, x.view(batch, tokens, width)[:, 0])
    yield Call("layer_norm", "final norm, class token", run, int(not all_rows))
    if config.num_classes:
        head = new(config.num_classes, width), new(config.num_classes)
        yield Call("linear", "head", partial(vit_kernels.linear, new(batch, width), *head), 1)


def launch_labels(label: str, kernels: Sequence[str]) -> list[str]:
    """What each launch of a call is in the model, from the names of their kernels: an mlp of two products is fc1 and
    fc2, and a launch that adds up the parts of a product is that product's sums."""
    adds = [kernel == "linear_sum_kernel" for kernel in kernels]
    count = len(kernels) - sum(adds)
    if count == 1:
        names = [label]
    elif label == "mlp" and count == 2:
        names = ["fc1", "fc2"]
    else:
        names = [f"{label} {n + 1}/{count}" for n in range(count)]
    found: list[str] = []
    for added in adds:
        found.append(f"{found[-1]} sums" if added else names.pop(0))
    return found


@dataclass(frozen=True)
class Heads:
    """Queries and keys of a family of models without a preset, as it asks `qk_rope` for them.

    rope: "" or how columns pair, "halves" or "interleaved"; own: each head has a table of its own.
    """

    family: str
    heads: int
    width: int
    norm: str = "none"
    rope: str = ""
    prefix: int = 0
    own: bool = False


HEADS = (
    Heads("timm's qk_norm, ViT-B", 12, 64, "layer"),
    Heads("RMS-normalised heads, ViT-L", 16, 64, "rms"),
    Heads("EVA-02, ViT-B", 12, 64, rope="interleaved", prefix=1),
    Heads("EVA, ViT-g", 16, 88, rope="interleaved", prefix=1),
    Heads("DINOv3, ViT-L", 16, 64, rope="halves", prefix=5),
    Heads("DINOv3, ViT-7B", 32, 128, rope="halves", prefix=5),
    Heads("normalised and rotated heads, ViT-H", 16, 80, "layer", "halves", 5),
    Heads("tables of each head, ViT-L", 16, 64, "rms", "interleaved", 1, own=True),
)


def heads_call(heads: Heads, batch: int, dtype: torch.dtype, device: str = "meta") -> Call:
    """`qk_rope` on a packed projection of 14 x 14 patches and the prefix.

    Tables are in fp32 and packed as timm has them for interleaved pairs, in the model's dtype and apart as Hugging Face
    has them for halves.
    """
    new = partial(torch.ones, device=device)
    q, k, _ = new(batch, 196 + heads.prefix, 3, heads.heads, heads.width, dtype=dtype).unbind(2)
    options: dict[str, torch.Tensor] = {}
    if heads.norm != "none":
        beta = ("q_bias", "k_bias") if heads.norm == "layer" else ()
        options |= {name: new(heads.width, dtype=dtype) for name in ("q_weight", "k_weight", *beta)}
    shape = (heads.heads, 196) if heads.own else (196,)
    if heads.rope == "interleaved":
        options["sin"], options["cos"] = new(*shape, 2 * heads.width, dtype=torch.float32).chunk(2, -1)
    elif heads.rope:
        options |= {name: new(*shape, heads.width, dtype=dtype) for name in ("cos", "sin")}
    interleaved = heads.rope == "interleaved"
    fixed = partial(vit_kernels.qk_rope, norm=heads.norm, interleaved=interleaved, prefix=heads.prefix)
    run = partial(fixed, q, k, **options)
    return Call("qk_rope", "queries and keys", run, 0)


def all_calls(models: Sequence[str], batches: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[str, int, Call]]:
    """(model, batch, call) of these presets, and of the families whose kernels no preset needs."""
    for model in models:
        for batch in batches:
            for call in model_calls(ViTConfig.preset(model), batch, dtype):
                yield model, batch, call
    for heads in HEADS:
        for batch in batches:
            yield heads.family, batch, heads_call(heads, batch, dtype)
