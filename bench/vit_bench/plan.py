"""The launches of one forward pass as calls of the launchers, by shape only.

What compiling and timing need of a model is the shapes, dtypes, strides and options with which it calls the
launchers. Tensors live on the meta device by default, so that a batch of 256 through ViT-g costs no memory; elsewhere
they are ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import vit_kernels
from vit_engine.config import ViTConfig
from vit_engine.encoder_block import one_partial, queries_apart
from vit_kernels.folding import keeps_sums

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as commands name them
BATCHES = (1, 8, 64, 256)
_MOST_ROWS = 2**31 - 1


@dataclass(frozen=True)
class Call:
    """One launcher call of a model.

    kernel: the launcher's name; label: what it is in the model; times: how often one forward pass of float images makes
    it, 0 for the calls of other entry points (uint8 images, features of all tokens, statistics of rows that no kernel
    of ours wrote) and of models that are no preset; block: "each" encoder block makes it, or the "last" one alone that
    computes no other token than the head reads, "" outside of them.
    """

    kernel: str
    label: str
    run: Callable[[], object]
    times: int
    block: str = ""


def check_batch(config: ViTConfig, batch: int) -> None:
    """ValueError for a batch of more tokens than kernels count: they number rows in 32 bits."""
    most = _MOST_ROWS // config.num_tokens
    if batch > most:
        raise ValueError(f"batch must be at most {most}: {config.num_tokens} tokens an image; got {batch}")


def model_calls(config: ViTConfig, batch: int, dtype: torch.dtype, device: str = "meta") -> Iterator[Call]:
    """The distinct launcher calls of `config` (encoder blocks repeat the same ones), in the order of a forward."""
    check_batch(config, batch)

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    new_fp32 = partial(new, dtype=torch.float32)
    width, tokens = config.embed_dim, config.num_tokens
    rows = batch * tokens
    vector = new(width)
    x = new(rows, width)

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

    yield from _block(config, batch, new, new_fp32)
    # The class token is normalised alone. Patches are pooled as normalised rows, or what was pooled is normalised.
    all_rows = config.global_pool != "token" and not config.norm_after_pool
    normalise = partial(vit_kernels.layer_norm, weight=vector, bias=new(width))
    yield Call("layer_norm", "final norm", partial(normalise, x), int(all_rows))
    if config.global_pool == "map":
        yield from _attention_pool(config, batch, new, new_fp32)
    run = partial(normalise, new(batch, width))
    yield Call("layer_norm", "final norm, class token", run, int(not all_rows))
    if config.num_classes:
        head = new(config.num_classes, width), new(config.num_classes)
        yield Call("linear", "head", partial(vit_kernels.linear, new(batch, width), *head), 1)


def _block(
    config: ViTConfig, batch: int, new: Callable[..., torch.Tensor], new_fp32: Callable[..., torch.Tensor]
) -> Iterator[Call]:
    """The calls of an encoder block, and those of the last one behind which the class token alone is read."""
    width, hidden, tokens = config.embed_dim, config.mlp_hidden, config.num_tokens
    rows, vector, partials = batch * tokens, new(width), -(-width // 64)
    class_token = config.global_pool == "token"
    times = config.depth - 1 if class_token else config.depth
    x, stats = new(rows, width), new_fp32(2, partials, rows)
    first = x.view(batch, tokens, width)[:, 0]
    scale = new(width) if config.layer_scale is not None else None

    def normed(x: torch.Tensor, stats: torch.Tensor, parts: int) -> Callable[[], object]:
        outputs = parts * width
        weight, bias = new(outputs, width), new_fp32(outputs)
        sums = new_fp32(outputs) if keeps_sums(width, x.dtype) else None
        return partial(vit_kernels.linear, x, weight, bias, norm="layer", stats=stats, column_sum=sums)

    def few(x: torch.Tensor) -> bool:
        return x is first and one_partial(x.dtype, width)

    def behind(x: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
        """Projection and MLP that add to rows x."""
        finish: dict[str, Any] = {"layer_scale": scale, "residual": x, "emit_stats": True}
        project = partial(vit_kernels.linear, new(len(x), width), new(width, width), vector, **finish)
        inner = hidden // 2 if config.activation == "swiglu" else hidden
        # What the projection made: the rows lie one behind the other.
        made = new(len(x), width)
        feed_forward = partial(
            vit_kernels.mlp, made, new(hidden, width), new_fp32(hidden), new(width, inner), vector,
            stats=new_fp32(2, 1 if few(x) else partials, len(x)), activation=config.activation,
            column_sum=new_fp32(hidden) if keeps_sums(width, x.dtype) else None, **finish | {"residual": made},
        )  # fmt: skip
        return project, feed_forward

    packed = new(batch, tokens, 3, config.num_heads, config.head_dim)
    projection, mlp = behind(x)
    yield Call("linear", "qkv", normed(x, stats, 3), times, "each")
    yield Call("attention", "attention", partial(vit_kernels.attention, *packed.unbind(2)), times, "each")
    yield Call("linear", "projection", projection, times, "each")
    yield Call("mlp", "mlp", mlp, times, "each")
    if not class_token:
        return
    projection, mlp = behind(first)
    q, k, v = packed.unbind(2)
    if queries_apart(rows, width, width):
        yield Call("row_stats", "last statistics", partial(vit_kernels.row_stats, first), 1, "last")
        yield Call("linear", "last queries", normed(first, new_fp32(2, 1, batch), 1), 1, "last")
        yield Call("linear", "last keys and values", normed(x, stats, 2), 1, "last")
        q = new(batch, 1, config.num_heads, config.head_dim)
        k, v = new(batch, tokens, 2, config.num_heads, config.head_dim).unbind(2)
    else:
        yield Call("linear", "last qkv", normed(x, stats, 3), 1, "last")
    yield Call("attention", "last attention", partial(vit_kernels.attention, q[:, :1], k, v), 1, "last")
    yield Call("linear", "last projection", projection, 1, "last")
    if few(first):
        anew = partial(vit_kernels.row_stats, new(batch, width))
        yield Call("row_stats", "last statistics, one partial", anew, 1, "last")
    yield Call("mlp", "last mlp", mlp, 1, "last")


def _attention_pool(
    config: ViTConfig, batch: int, new: Callable[..., torch.Tensor], new_fp32: Callable[..., torch.Tensor]
) -> Iterator[Call]:
    """The calls of the MAP head: a query that all images share, keys and values of all tokens."""
    width, hidden, tokens = config.embed_dim, config.mlp_hidden, config.num_tokens
    vector, made = new(width), new(batch, width)
    keys_and_values = partial(vit_kernels.linear, new(batch * tokens, width), new(2 * width, width), new(2 * width))
    yield Call("linear", "pool keys and values", keys_and_values, 1)
    k, v = new(batch, tokens, 2, config.num_heads, config.head_dim)[:, config.num_prefix_tokens :].unbind(2)
    q = new(1, 1, config.num_heads, config.head_dim).expand(batch, -1, -1, -1)
    yield Call("attention", "pool attention", partial(vit_kernels.attention, q, k, v), 1)
    project = partial(vit_kernels.linear, made, new(width, width), vector, emit_stats=True)
    yield Call("linear", "pool projection", project, 1)
    few = one_partial(made.dtype, width)
    if few:
        yield Call("row_stats", "pool statistics", partial(vit_kernels.row_stats, made), 1)
    inner = hidden // 2 if config.activation == "swiglu" else hidden
    feed_forward = partial(
        vit_kernels.mlp, made, new(hidden, width), new_fp32(hidden), new(width, inner), vector,
        stats=new_fp32(2, 1 if few else -(-width // 64), batch), activation=config.activation, residual=made,
        column_sum=new_fp32(hidden) if keeps_sums(width, made.dtype) else None, emit_stats=True,
    )  # fmt: skip
    yield Call("mlp", "pool mlp", feed_forward, 1)


def launch_labels(label: str, kernels: Sequence[str]) -> list[str]:
    """What each launch of a call is in the model, from the names of their kernels: an mlp of two products is fc1 and
    fc2, and a launch that adds up the parts of a product is that product's sums."""
    adds = [kernel == "linear_sum_kernel" for kernel in kernels]
    count = len(kernels) - sum(adds)
    if count == 1:
        names = [label]
    elif label.endswith("mlp") and count == 2:
        names = [f"{label.removesuffix('mlp')}{product}" for product in ("fc1", "fc2")]
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
