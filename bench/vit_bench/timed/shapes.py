"""The table of shapes that all benchmarks run: `vit-engine bench`, `pytest bench`, and the dry run of all of them.

    model/vit_base_patch16_224/b64              a forward pass
    kernels/vit_base_patch16_224/b64/qkv        one launcher call of it
    attention/h12d64/n197/b64                   attention alone: 12 heads of width 64, 197 tokens

A case is shapes alone; the dtype is chosen when it is run.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

import vit_kernels
from vit_bench.plan import BATCHES, Call, model_calls
from vit_bench.results import SUITES
from vit_engine.config import ViTConfig

DEFAULT_MODEL = "vit_base_patch16_224"


def _models() -> dict[str, ViTConfig]:
    """ViT-Ti, S, B, L and H at 224, 384 and 518 pixels; with patches of 14 at 518 and in ViT-H, where 384 is 378."""
    names = [f"vit_{size}_patch16_{pixels}" for size in ("tiny", "small", "base", "large") for pixels in (224, 384)]
    names += [f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large")]
    found = {name: ViTConfig.preset(name) for name in names}
    found["vit_tiny_patch14_518"] = ViTConfig.preset("vit_tiny_patch16_224", patch_size=14, image_size=518)
    huge = ViTConfig.preset("vit_huge_patch14_224")
    found["vit_huge_patch14_224"] = huge
    for pixels in (378, 518):
        found[f"vit_huge_patch14_{pixels}"] = replace(huge, image_size=pixels)
    return dict(sorted(found.items(), key=lambda item: (item[1].embed_dim, item[1].num_tokens)))


MODELS = _models()

# (heads, width of a head): ViT-B, ViT-L, SO400M, ViT-H, and the width that many models beside ViT have.
HEADS = ((12, 64), (16, 64), (16, 72), (16, 80), (16, 128))
# What images of 224 pixels at patch 32, 16, 14 and of 384 and 512 at patch 16, of 518 at patch 14 come to, and powers
# of two beyond.
TOKENS = (50, 197, 257, 577, 1025, 1370, 2048, 4096, 8192, 16384)
MOST_TOKENS = 131_072  # of all images of a batch together


@dataclass(frozen=True)
class Case:
    """One line of the table.

    label: "forward", what a launcher call is in the model, or "attention"; batch: images; shape: for `results.Row`;
    config: of the model, None for attention alone; times: how often a forward pass makes this call.
    """

    name: str
    suite: str
    label: str
    batch: int
    shape: dict[str, int]
    model: str = ""
    config: ViTConfig | None = field(default=None, repr=False)
    times: int = 1

    def __str__(self) -> str:
        return self.name

    def calls(self, dtype: torch.dtype, device: str = "meta") -> list[Call]:
        """The launcher calls that it stands for: those of a forward pass, or its own."""
        if self.config is None:
            return [attention_call(self.shape, dtype, device)]
        made = [call for call in model_calls(self.config, self.batch, dtype, device) if call.times]
        return made if self.suite == "model" else [call for call in made if call.label == self.label]


def attention_call(shape: dict[str, int], dtype: torch.dtype, device: str = "meta") -> Call:
    """Attention on views of one packed projection [B, N, 3, H, D], as a model calls it."""
    packed = torch.ones(
        shape["batch"], shape["tokens"], 3, shape["heads"], shape["head_dim"], dtype=dtype, device=device
    )
    return Call("attention", "attention", partial(vit_kernels.attention, *packed.unbind(2)), 1)


def _model_shape(config: ViTConfig, batch: int) -> dict[str, int]:
    return {"batch": batch, "tokens": config.num_tokens, "heads": config.num_heads, "head_dim": config.head_dim}


def _model_cases() -> Iterator[Case]:
    for name, config in MODELS.items():
        for batch in BATCHES:
            shape = _model_shape(config, batch)
            yield Case(f"model/{name}/b{batch}", "model", "forward", batch, shape, name, config)


def _kernel_cases() -> Iterator[Case]:
    for name, config in MODELS.items():
        for batch in BATCHES:
            for call in model_calls(config, batch, torch.bfloat16):
                # What the last block does for the class token alone are small launches, timed with the whole model.
                if call.times and call.block != "last":
                    slug = call.label.replace(",", "").replace(" ", "-")
                    place = f"kernels/{name}/b{batch}/{slug}"
                    shape = _call_shape(config, batch, call)
                    yield Case(place, "kernels", call.label, batch, shape, name, config, call.times)


def _call_shape(config: ViTConfig, batch: int, call: Call) -> dict[str, int]:
    if call.kernel == "attention":
        return _model_shape(config, batch)
    rows, width = batch * config.num_tokens, config.embed_dim
    patches = batch * config.num_patches
    pixels = config.in_channels * config.patch_hw[0] * config.patch_hw[1]
    m, n, k = {
        "stem": (patches, width, pixels),
        "qkv": (rows, 3 * width, width),
        "projection": (rows, width, width),
        "mlp": (rows, config.mlp_hidden, width),
        "final norm": (rows, width, 0),
        "final norm, class token": (batch, width, 0),
        "head": (batch, config.num_classes, width),
    }[call.label]
    return {"batch": batch, "tokens": config.num_tokens, "m": m, "n": n} | ({"k": k} if k else {})


def _attention_cases() -> Iterator[Case]:
    for heads, width in HEADS:
        for tokens in TOKENS:
            for batch in BATCHES:
                if batch * tokens <= MOST_TOKENS:
                    shape = {"batch": batch, "tokens": tokens, "heads": heads, "head_dim": width}
                    name = f"attention/h{heads}d{width}/n{tokens}/b{batch}"
                    yield Case(name, "attention", "attention", batch, shape)


@functools.cache
def table() -> tuple[Case, ...]:
    """Every case, smaller models first."""
    return (*_kernel_cases(), *_model_cases(), *_attention_cases())


def _any_match(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def select(
    suites: Sequence[str] = SUITES,
    models: Sequence[str] = (),
    batches: Sequence[int] = (),
    only: Sequence[str] = (),
) -> list[Case]:
    """The cases of these suites that match; an empty sequence leaves nothing out.

    models: glob patterns; attention alone matches by the heads of the models. batches: numbers of images. only: glob
    patterns of names of cases.

    Raises ValueError, its first argument the name of the argument, for a pattern or a batch that no case has.
    """
    known = [name for name in MODELS if _any_match(name, models)]
    for argument, values, has in (
        ("models", models, lambda one: any(fnmatch.fnmatchcase(name, one) for name in MODELS)),
        ("batches", batches, BATCHES.__contains__),
        ("only", only, lambda one: any(fnmatch.fnmatchcase(case.name, one) for case in table())),
    ):
        if bad := [one for one in values if not has(one)]:
            raise ValueError(argument, f"{bad[0]!r} matches nothing in the table of shapes{_allowed(argument)}")
    heads = {(MODELS[name].num_heads, MODELS[name].head_dim) for name in known}

    def wanted(case: Case) -> bool:
        in_models = case.model in known if case.model else (case.shape["heads"], case.shape["head_dim"]) in heads
        return (
            case.suite in suites
            and (not models or in_models)
            and (not batches or case.batch in batches)
            and (not only or _any_match(case.name, only))
        )

    return [case for case in table() if wanted(case)]


def _allowed(argument: str) -> str:
    known: dict[str, Callable[[], str]] = {
        "models": lambda: f": {', '.join(MODELS)}",
        "batches": lambda: f": {', '.join(map(str, BATCHES))}",
        "only": lambda: "; `vit-engine bench --list` prints the names",
    }
    return known[argument]()
