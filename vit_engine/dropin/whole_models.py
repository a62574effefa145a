"""timm's and torchvision's Vision Transformers from the image to the last norm, in one chain of launches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..class_code import replaced
from .attached import TRACED_BY_FX, Attached, traced_by_fx, wants_gradient
from .describe import Unsupported, class_name, norms_rows, required_norm
from .parts import CLASS_TOKEN_ALONE, chain
from .patch_embed import TIMM_PATCHES, check_timm_images
from .repeated import RepeatedFeatures
from .stem import Stem, check_images, patch_convolution, run_stem
from .structure import foreign_code

__all__ = ["TIMM_MODELS", "FusedTimmFeatures", "FusedTimmLogits", "FusedTorchvision"]

TIMM_MODELS = ("timm.models.vision_transformer.VisionTransformer", "timm.models.deit.VisionTransformerDistilled")
_IDENTITY, _DROPOUT = "torch.nn.modules.linear.Identity", "torch.nn.modules.dropout.Dropout"


def _untouched(parent: nn.Module, *names: str) -> None:
    """Unsupported if a child is hooked, or its forward() replaced by anybody else: it will not be called."""
    children = parent._modules
    for name in names:
        child: Any = children[name]
        own = vars(child).get("forward")
        if child._forward_hooks or child._forward_pre_hooks or not (own is None or isinstance(own, Attached)):
            raise Unsupported(f"{name} has a hook or a forward() of its own", changed=True)
        if replaced(type(child)):
            raise Unsupported(f"{name}: {type(child).__qualname__}.forward was replaced on the class", changed=True)


def _own_methods(model: nn.Module, *names: str) -> None:
    """Unsupported if somebody has replaced one of these methods on the model's class: they will not be called."""
    for name in names:
        if replaced(type(model), name):
            raise Unsupported(f"{type(model).__qualname__}.{name} was replaced on the class", changed=True)


def _chained(parent: nn.Module, name: str) -> None:
    """Unsupported unless the child does nothing but call its children one after the other."""
    found = class_name(getattr(parent, name))
    if found != "torch.nn.modules.container.Sequential":
        raise Unsupported(f"{name} is {found}, expected torch.nn.Sequential", changed=True)


def _inactive(parent: nn.Module, *names: str) -> None:
    """Unsupported unless these children let tokens through unchanged."""
    for name in names:
        child: Any = getattr(parent, name)
        if class_name(child) not in (_IDENTITY, _DROPOUT):
            raise Unsupported(f"{name} is {class_name(child)}, expected Identity or Dropout")
        if child.training and getattr(child, "p", 0):
            raise Unsupported(f"training mode with {name}", changed=True)


def _timm_stem(model: Any) -> Stem:
    embed = model.patch_embed
    if class_name(embed) != TIMM_PATCHES:
        raise Unsupported(f"patch_embed is {class_name(embed)}, expected timm.layers.PatchEmbed")
    if class_name(embed.norm) != _IDENTITY:
        raise Unsupported(f"patch_embed.norm is {class_name(embed.norm)}, expected Identity")
    if embed.dynamic_img_pad:
        raise Unsupported("patch_embed pads images (dynamic_img_pad)")
    if class_name(model) not in TIMM_MODELS or "_pos_embed" in vars(model):
        raise Unsupported(f"{class_name(model)} may embed positions in its own way")
    _untouched(model, "patch_embed", "pos_drop", "patch_drop", "norm_pre")
    _untouched(embed, "norm")
    _inactive(model, "pos_drop", "patch_drop")
    names = ["cls_token", "dist_token"] if "Distilled" in class_name(model) else ["cls_token", "reg_token"]
    prefix = tuple((model, name) for name in names if getattr(model, name) is not None)
    conv = patch_convolution(embed, "proj")
    if model.pos_embed is None:
        return Stem(conv, prefix)
    own = model.no_embed_class
    rows = model.patch_embed.num_patches + (0 if own else sum(getattr(model, name).shape[-2] for _, name in prefix))
    if tuple(model.pos_embed.shape[:2]) != (1, rows):
        # timm adds it up as PyTorch broadcasts, or raises.
        raise Unsupported(f"pos_embed has a shape of {list(model.pos_embed.shape)}, for {rows} tokens", changed=True)

    def position(height: int, width: int) -> Tensor:
        grid = embed.dynamic_feat_size((height, width))
        if not model.dynamic_img_size or tuple(grid) == tuple(embed.grid_size):
            return model.pos_embed[0]
        from timm.layers.pos_embed import resample_abs_pos_embed

        return resample_abs_pos_embed(
            model.pos_embed,
            new_size=grid,
            old_size=embed.grid_size,
            num_prefix_tokens=0 if own else model.num_prefix_tokens,
        )[0]

    return Stem(conv, prefix, position, ((model, "pos_embed"),), derive=bool(model.dynamic_img_size))


class FusedTimmFeatures(RepeatedFeatures):
    """Stands in for the forward_features() of timm's VisionTransformer: stem, blocks and final norm. Where the stem is
    not that of a plain ViT, timm's own code calls the blocks."""

    def stem(self) -> Stem | str:
        try:
            _own_methods(self.module, "forward_features", "_pos_embed")
            _untouched(self.module, "blocks", "norm")
            _chained(self.module, "blocks")
            return _timm_stem(self.module)
        except Unsupported as refusal:
            return str(refusal)

    def why_not(self, x: Tensor) -> str | None:
        model: Any = self.module
        if model.grad_checkpointing and model.training:
            return "gradient checkpointing"
        reason = self.unavailable(x, model.patch_embed.proj.weight)
        if reason is None and wants_gradient(model, x) and not torch.compiler.is_compiling():
            reason = "gradients are enabled: stem and norm run PyTorch's operators; call under torch.no_grad()"
        return reason

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A mask and a causal order, by the names that this version of timm has for them.
        if traced_by_fx(x):
            return self.instead(TRACED_BY_FX, x, *args, **kwargs)
        stem = self.stem()
        if isinstance(stem, str):
            result = super().__call__(x, *args, **kwargs)
            if not torch.compiler.is_compiling():
                self.why = stem
            return result
        check_timm_images(self.module.patch_embed, stem.conv, x)
        why = self.why_not(x)
        if why is None and any(value is not None and value is not False for value in (*args, *kwargs.values())):
            why = "attn_mask or is_causal was given: blocks are called one by one"
        if why is not None:
            return self.instead(why, x, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._features(stem, x)
        self.taken(self._parts)
        return self.replays.run("features", self.module, (x,), lambda: self._features(stem, x), self._objection)

    def class_token(self, x: Tensor) -> Tensor | None:
        """The class token [B, 1, D] of forward_features() and no other; None if that has to run as it is."""
        if not isinstance(x, Tensor) or x.ndim != 4:
            return None  # torch.fx, too, whose parameters cannot be looked at
        stem = self.stem()
        if isinstance(stem, str) or self.why_not(x) is not None:
            return None
        check_timm_images(self.module.patch_embed, stem.conv, x)
        if torch.compiler.is_compiling():
            return self._features(stem, x, class_token=True)
        self.taken(self._parts)
        run = partial(self._features, stem, x, class_token=True)
        return self.replays.run("class token", self.module, (x,), run, self._objection)

    def _parts(self) -> list[nn.Module]:
        model: Any = self.module
        return [model.patch_embed, model.norm_pre, *model.blocks, model.norm]

    def _features(self, stem: Stem, x: Tensor, class_token: bool = False) -> Tensor:
        model: Any = self.module
        z, stats = run_stem(stem, x, self.state.derived, f"{self.name}.stem")
        before = z
        z = model.norm_pre(z)
        z, _ = chain(model.blocks, z, stats if z is before else None, class_token)
        return model.norm(z)

    def covers(self) -> list[nn.Module]:
        return [self.module.patch_embed]  # type: ignore[list-item]

    def report(self) -> tuple[str, str | None]:
        stem = self.stem()
        if isinstance(stem, str):
            return "", stem
        why = self.why_not(stem.conv.weight) or self.why
        return "patch_embed (positions and prefix tokens in the same launch)", why


class FusedTimmLogits(Attached):
    """Stands in for the forward() of timm's VisionTransformer where its head reads the class token alone.

    The last block and the final norm then compute that token only. Anything else is timm's own forward(), which calls
    forward_features().
    """

    def _features(self) -> FusedTimmFeatures | None:
        """Who makes the class token; None if others than the head's Linear may look at the tokens."""
        model: Any = self.module
        mine = vars(model)
        found = mine.get("forward_features")
        usual = class_name(model) == TIMM_MODELS[0] and not {"pool", "forward_head"} & mine.keys()
        usual = usual and not any(replaced(type(model), name) for name in ("forward", "forward_head", "pool"))
        # A norm of somebody's own may look at several tokens at once.
        usual = usual and norms_rows(model.norm)
        alone = usual and model.attn_pool is None and model.global_pool == "token"
        return found if alone and isinstance(found, FusedTimmFeatures) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        # With a mask or a causal order as well, forward_features() has more to ask.
        alone = len(given) == 1 and kwargs.keys() <= {"x"}
        features = self._features() if alone else None
        token = None if features is None else features.class_token(given[0])
        return self.original(*args, **kwargs) if token is None else self.module.forward_head(token)  # type: ignore[operator]

    def covers(self) -> list[nn.Module]:
        return []

    def report(self) -> tuple[str, str | None] | None:
        features = self._features()
        if features is None or features.report()[1] is not None:
            return None
        return CLASS_TOKEN_ALONE, None


class FusedTorchvision(Attached):
    """Stands in for the forward() of torchvision's VisionTransformer, up to the head."""

    def stem(self) -> Stem | str:
        model: Any = self.module
        try:
            encoder = model.encoder
            if class_name(encoder) != "torchvision.models.vision_transformer.Encoder":
                raise Unsupported(f"encoder is {class_name(encoder)}, expected torchvision's own")
            if "_process_input" in vars(model):
                raise Unsupported("_process_input is overridden on the instance", changed=True)
            _own_methods(model, "forward", "_process_input")
            _untouched(model, "conv_proj", "encoder")
            _untouched(encoder, "dropout", "layers", "ln")
            _chained(encoder, "layers")
            required_norm(encoder, "ln")
            _inactive(encoder, "dropout")
            foreign = foreign_code(encoder.ln)
            if foreign is not None:
                raise Unsupported(f"encoder.ln: {foreign}", changed=True)
            conv, position = patch_convolution(model, "conv_proj"), ((encoder, "pos_embedding"),)
            return Stem(conv, ((model, "class_token"),), lambda *_: encoder.pos_embedding[0], position)
        except Unsupported as refusal:
            return str(refusal)

    def why_not(self, x: Tensor, stem: Stem) -> str | None:
        reason = self.unavailable(x, stem.conv.weight)
        if reason is None and wants_gradient(self.module, x) and not torch.compiler.is_compiling():
            reason = "gradients are enabled: stem and norm run PyTorch's operators; call under torch.no_grad()"
        return reason

    def __call__(self, x: Tensor) -> Tensor:
        model: Any = self.module
        if traced_by_fx(x):
            return self.instead(TRACED_BY_FX, x)
        stem = self.stem()
        if isinstance(stem, str):
            return self.instead(stem, x)
        check_images(x, stem.conv)
        if tuple(x.shape[-2:]) != (model.image_size, model.image_size):
            wanted = (model.image_size, model.image_size)
            raise ValueError(f"images must be {wanted} pixels (H, W), got {tuple(x.shape[-2:])}")
        why = self.why_not(x, stem)
        if why is not None:
            return self.instead(why, x)
        if torch.compiler.is_compiling():
            return model.heads(self._class_token(stem, x))
        self.taken(lambda: (*model.encoder.layers, model.encoder.ln))
        token = self.replays.run("features", model, (x,), lambda: (self._class_token(stem, x),))[0]
        return model.heads(token)

    def _class_token(self, stem: Stem, x: Tensor) -> Tensor:
        encoder: Any = self.module.encoder
        z, stats = run_stem(stem, x, self.state.derived, f"{self.name}.stem")
        # The head reads the class token alone, so the last block and the norm compute no other.
        z, _ = chain(encoder.layers, z, stats, first_token=True)
        return encoder.ln(z[:, 0])

    def covers(self) -> list[nn.Module]:
        return [self.module.conv_proj]  # type: ignore[list-item]

    def report(self) -> tuple[str, str | None]:
        stem = self.stem()
        if isinstance(stem, str):
            return "", stem
        why = self.why_not(stem.conv.weight, stem) or self.why
        return "patch_embed (positions and class token in the same launch)", why
