"""The embeddings modules of transformers' vision models: patches, positions and prefix tokens in one launch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..class_code import constant_in_graphs, replaced
from .attached import TRACED_BY_FX, Attached, State, counting_changes, differentiable, traced_by_fx, wants_gradient
from .describe import Unsupported, class_name
from .stem import Stem, check_images, patch_convolution, run_stem
from .structure import foreign_code, only_listens

__all__ = ["TRANSFORMERS_STEMS", "FusedEmbeddings"]


def _position(module: Any, prefix: int, interpolate: bool) -> Callable[[int, int], Tensor]:
    """Rows of position embeddings, resized by the library's own method where that is asked for."""

    def rows(height: int, width: int) -> Tensor:
        table = _table(module)
        if not interpolate:
            return table
        ph, pw = _conv(module).kernel_size
        tokens = (height // ph) * (width // pw) + prefix
        # Only the shape of the tokens is looked at.
        tokens_like = torch.empty(1, tokens, table.shape[-1], device="meta")
        return module.interpolate_pos_encoding(tokens_like, height, width)[0]

    return rows


def _table(module: Any) -> Tensor:
    if hasattr(module, "position_embedding"):
        return module.position_embedding.weight
    return module.position_embeddings[0]


def _conv(module: Any) -> nn.Conv2d:
    for name in ("patch_embedding", "patch_embeddings"):
        if hasattr(module, name):
            found = getattr(module, name)
            if isinstance(found, nn.Conv2d):
                return patch_convolution(module, name)
            own = class_name(found).startswith(f"{type(module).__module__}.") and not replaced(type(found))
            if not own or found._forward_hooks or found._forward_pre_hooks or "forward" in vars(found):
                raise Unsupported(f"{name} has a hook or a forward() of its own, or is of another class", changed=True)
            return patch_convolution(found, "projection")
    raise Unsupported("it has no patch projection")


def _registers_without_position(rows: Callable[[int, int], Tensor], registers: int) -> Callable[[int, int], Tensor]:
    """Zeros for the register tokens behind the class token's row."""

    def spread(height: int, width: int) -> Tensor:
        table = rows(height, width)
        return torch.cat([table[:1], table.new_zeros(registers, table.shape[1]), table[1:]])

    return spread


def _describe(module: Any, prefix: tuple[str, ...], interpolate: bool) -> Stem:
    """A stem of tokens [prefix, patches] with a position for each."""
    table = (module.position_embedding, "weight") if hasattr(module, "position_embedding") else None
    source = table or (module, "position_embeddings")
    position = _position(module, len(prefix), interpolate)
    return Stem(_conv(module), tuple((module, name) for name in prefix), position, (source,), derive=interpolate)


def _vit(module: Any, interpolate: bool) -> Stem:
    return _describe(module, ("cls_token",), interpolate)


def _deit(module: Any, interpolate: bool) -> Stem:
    return _describe(module, ("cls_token", "distillation_token"), interpolate)


def _dinov2(module: Any, interpolate: bool) -> Stem:
    # DINOv2 resizes to whatever the image asks for.
    return _describe(module, ("cls_token",), True)


def _dinov2_registers(module: Any, interpolate: bool) -> Stem:
    stem = _describe(module, ("cls_token",), True)
    assert stem.position is not None
    spread = _registers_without_position(stem.position, module.register_tokens.shape[1])
    prefix = ((module, "cls_token"), (module, "register_tokens"))
    return Stem(stem.conv, prefix, spread, stem.position_sources, derive=True)


def _dinov3(module: Any, interpolate: bool) -> Stem:
    registers = ("register_tokens",) if module.register_tokens.shape[1] else ()
    return Stem(_conv(module), tuple((module, name) for name in ("cls_token", *registers)))


def _clip(module: Any, interpolate: bool) -> Stem:
    return _describe(module, ("class_embedding",), interpolate)


def _patches_alone(module: Any, interpolate: bool) -> Stem:
    return _describe(module, (), interpolate)


def _models(name: str, layer: str) -> str:
    return f"transformers.models.{name}.modeling_{name}.{layer}"


TRANSFORMERS_STEMS: dict[str, Callable[[Any, bool], Stem]] = {
    _models("vit", "ViTEmbeddings"): _vit,
    _models("deit", "DeiTEmbeddings"): _deit,
    _models("dinov2", "Dinov2Embeddings"): _dinov2,
    _models("dinov2_with_registers", "Dinov2WithRegistersEmbeddings"): _dinov2_registers,
    _models("dinov3_vit", "DINOv3ViTEmbeddings"): _dinov3,
    _models("clip", "CLIPVisionEmbeddings"): _clip,
    _models("vit_msn", "ViTMSNEmbeddings"): _vit,
    _models("ijepa", "IJepaEmbeddings"): _patches_alone,
    _models("metaclip_2", "MetaClip2VisionEmbeddings"): _clip,
    _models("owlvit", "OwlViTVisionEmbeddings"): _clip,
    _models("owlv2", "Owlv2VisionEmbeddings"): _clip,
    _models("siglip", "SiglipVisionEmbeddings"): _patches_alone,
}


_KNOWN = ("bool_masked_pos", "interpolate_pos_encoding")
_PARTS = ("torch.nn.modules.dropout.Dropout", "torch.nn.modules.sparse.Embedding")


class FusedEmbeddings(Attached):
    """Stands in for the forward() of an embeddings module."""

    def __init__(self, module: nn.Module, name: str, state: State) -> None:
        super().__init__(module, name, state)
        self._parameters = list(inspect.signature(type(module).forward).parameters)[2:]
        self._ids: tuple[Tensor, tuple[int | None, int], bool] | None = None

    def attach(self) -> None:
        self._in_order()  # known from now on, should the first pass be one that traces a graph
        super().attach()

    @constant_in_graphs
    def _in_order(self) -> bool:
        """Whether position_ids, where there are any, take the rows of the table as they come; asked once per change."""
        ids: Any = getattr(self.module, "position_ids", None)
        if ids is None:
            return True
        # Fake ones stand for these while a graph is traced, and while one is captured nothing can be read.
        unreadable = type(ids) is not Tensor or ids.is_meta
        if unreadable or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self._ids is None or self._ids[2]
        state = None if ids.is_inference() else ids._version, len(_table(self.module))
        if self._ids is None or self._ids[0] is not ids or self._ids[1] != state:
            with _disable_current_modes():
                in_order = ids.shape == (1, state[1]) and ids[0].tolist() == list(range(state[1]))
            self._ids = ids, state, in_order
        return self._ids[2]

    def stem(self, interpolate: bool = False) -> Stem | str:
        module: Any = self.module
        kind = type(module)
        if class_name(module) not in TRANSFORMERS_STEMS:
            return f"it is {class_name(module)}, a class of its own"
        if replaced(kind):
            return f"{kind.__qualname__}.forward was replaced on the class"
        resize = "interpolate_pos_encoding"
        if resize in vars(module) or (hasattr(kind, resize) and replaced(kind, resize)):
            return f"{resize} was replaced"
        if not self._in_order():
            return "position_ids are not in order"
        try:
            for name, child in module.named_children():
                if name in ("patch_embedding", "patch_embeddings"):
                    continue
                if class_name(child) not in _PARTS or foreign_code(child) is not None:
                    raise Unsupported(f"{name} is {class_name(child)}, expected Dropout or Embedding, unchanged")
                if getattr(child, "max_norm", None) is not None:
                    raise Unsupported(f"{name} has a max_norm")
                if child.training and getattr(child, "p", 0):
                    raise Unsupported("training mode with dropout")
                if child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child):
                    raise Unsupported(f"{name} has a hook or a forward() of its own")
            return TRANSFORMERS_STEMS[class_name(module)](module, interpolate)
        except Unsupported as refusal:
            return str(refusal)

    def _why_not(self, stem: Stem, images: Any, masked: Any) -> str | None:
        if masked is not None:
            return "bool_masked_pos puts mask tokens in"
        weight = stem.conv.weight
        reason = self.unavailable(images.to(weight.dtype) if images.is_floating_point() else images, weight)
        if reason is not None:
            return reason
        module: Any = self.module
        settings = module if hasattr(module, "image_size") else getattr(module, "config", None)
        size = getattr(settings, "image_size", None)
        wanted = (size, size) if isinstance(size, int) else size
        if stem.position is not None and not stem.derive and tuple(images.shape[-2:]) != tuple(wanted or ()):
            (height, width), (ph, pw) = images.shape[-2:], stem.conv.kernel_size
            if (height // ph) * (width // pw) != len(_table(self.module)) - len(stem.prefix):
                raise ValueError(
                    f"images must be {wanted} pixels (H, W), got {(height, width)}; with interpolate_pos_encoding=True "
                    "positions are resized for others"
                )
            return f"images of {(height, width)} pixels, where the model has positions for {wanted}"
        if self.module.training and wants_gradient(self.module, images):
            return "training: gradients"
        return None

    def __call__(self, pixel_values: Tensor, *args: Any, **named: Any) -> Tensor:
        # Only some of the classes take bool_masked_pos, so the second argument is not the same for all.
        given = {**dict(zip(self._parameters, args, strict=False)), **named}
        if len(given) != len(args) + len(named):
            return self.original(pixel_values, *args, **named)  # which says what is too much
        more = [name for name in given if name not in _KNOWN or name not in self._parameters]
        masked = given.get("bool_masked_pos")
        interpolate = bool(given.get("interpolate_pos_encoding"))
        if traced_by_fx(pixel_values):
            return self.instead(TRACED_BY_FX, pixel_values, **given)
        stem = self.stem(interpolate)
        if isinstance(stem, str) or more:
            return self.instead(str(stem) if not more else f"arguments {sorted(more)}", pixel_values, **given)
        # The library casts images to the parameters' dtype, here or in the model's forward().
        check_images(pixel_values, stem.conv, cast=True)
        why = self._why_not(stem, pixel_values, masked)
        if why is not None:
            return self.instead(why, pixel_values, **given)
        if torch.compiler.is_compiling() or not wants_gradient(self.module, pixel_values):
            images = pixel_values.to(stem.conv.weight.dtype)
            tokens, stats = counting_changes(lambda: self._repeated(stem, images, interpolate))
            if only_listens(self.module._forward_hooks):
                self.state.hand_over(tokens, stats)
            return tokens
        return differentiable(
            lambda images: self._run(stem, images)[0],
            lambda images: self.original(images, **given),
            self.module,
            pixel_values,
        )

    def _repeated(self, stem: Stem, images: Tensor, interpolate: bool) -> tuple[Tensor, Tensor]:
        kind = f"interpolate {interpolate}"
        tokens, stats = self.replays.run(kind, self.module, (images,), lambda: self._run(stem, images))
        return tokens, stats

    def _run(self, stem: Stem, images: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():
            self.why = None
        return run_stem(stem, images.to(stem.conv.weight.dtype), self.state.derived, self.name)

    def report(self) -> tuple[str, str | None]:
        stem = self.stem()
        if isinstance(stem, str):
            return "", stem
        reason = self.unavailable(stem.conv.weight, stem.conv.weight)
        return "patch_embed (positions and prefix tokens in the same launch)", reason or self.why
