"""What a Vision Transformer is made of: one frozen dataclass, and timm's named architectures as presets."""

from __future__ import annotations

import dataclasses
import difflib
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

from .presets import PRESETS

__all__ = ["ACTIVATIONS", "PRESETS", "ViTConfig"]

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu")
POOLS = ("token", "avg", "map")
HEADS = ("finetune", "pretrain")
INTERPOLATIONS = ("bicubic", "bilinear")


def _refuse(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"ViTConfig: {name} must be {allowed}, got {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and _is_finite(lambda: value)


def _is_finite(number: Callable[[], float]) -> bool:
    """Whether a calculation ends in a number that a float can hold."""
    try:
        return math.isfinite(number())
    except OverflowError:
        return False


def _in_float32(value: float) -> float:
    """A finite number as kernels and parameters hold it: 0 and infinity for what is too small and too large."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf


def _size(name: str, value: Any) -> int | tuple[int, int]:
    """A positive int or a (height, width) pair; a square pair becomes the int, so that equal configs compare equal."""
    if _is_int(value) and value > 0:
        return value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_int(v) and v > 0 for v in value):
        height, width = value
        return height if height == width else (height, width)
    raise _refuse(name, value, "a positive int or a (height, width) pair of positive ints")


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _channels(name: str, value: Any, channels: int, positive: bool) -> tuple[float, ...] | None:
    """Per-channel constants: one number stands for all channels."""
    if value is None:
        return None
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    wanted = f"{'positive' if positive else 'finite'} numbers in float32, one or one per channel ({channels})"
    if len(values) not in (1, channels) or not all(map(_is_number, values)):
        raise _refuse(name, value, wanted)
    held = [_in_float32(v) for v in values]
    if not all(math.isfinite(v) and (v > 0 or not positive) for v in held):
        raise _refuse(name, value, wanted)
    return tuple(float(v) for v in (values * channels if len(values) == 1 else values))


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Architecture and training-time rates of a ViT (arXiv 2010.11929, and the later variants that timm names).

    image_size: input the position embeddings are made for, in pixels: int or (height, width). forward() takes any other
        size that patch_size divides, with interpolated position embeddings.
    patch_size: pixels per patch, int or (height, width); must divide image_size.
    in_channels: image channels.
    embed_dim: D, width of a token. num_heads must divide it.
    depth: L, number of encoder blocks.
    mlp_ratio, hidden_dim: outputs of fc1 = hidden_dim, or int(embed_dim * mlp_ratio) where hidden_dim is None. With
        activation="swiglu" that counts gate and value together (as timm's SwiGLUPacked), so it must be even.
    qkv_bias: whether the query, key and value projection has a bias.
    num_classes: outputs of the classifier; 0 leaves it out, and forward() returns the pooled features.
    class_token, num_register_tokens: learned tokens put before the patches, in this order.
    global_pool: "token" (the class token, equation 4), "avg" (mean over the patch tokens) or "map" (attention of a
        learned probe to the patch tokens and an MLP, see AttentionPool; not with activation="swiglu").
    fc_norm: True puts the final LayerNorm after pooling, False before it; None is timm's rule: True for "avg".
    layer_scale: initial value of the factor per channel of each residual branch (arXiv 2103.17239), None for none.
    no_embed_class: True gives class and register tokens no position embedding.
    norm_eps: added to the variance in LayerNorm; timm's and Google's ViTs use 1e-6.
    activation: "gelu" (erf), "gelu_tanh", "quick_gelu" (x * sigmoid(1.702 x)), "silu", or "swiglu".
    head: "finetune" (one zero-initialised linear) or "pretrain" (a hidden layer with tanh before it; section 3.1).
    representation_size: width of the hidden layer of the "pretrain" head; None is embed_dim.
    dropout: rate after the position embedding and after every dense layer of the blocks but qkv (appendix B.1), in
        training mode.
    attention_dropout, head_dropout: rates on the attention weights and in front of the classifier.
    stochastic_depth: rate at which the last block's branches are dropped per image (arXiv 1603.09382); it rises
        linearly from 0.
    position_interpolation: "bicubic" (antialiased, as timm) or "bilinear" (corners aligned, as Google's code).
    mean, std: per-channel constants for uint8 images, in units of [0, 1]: (pixel / 255 - mean) / std. One number stands
        for every channel, None for no normalisation. Float images are taken as already normalised and left alone.

    Raises ValueError that names the argument, what came and what is allowed.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    in_channels: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    hidden_dim: int | None = None
    qkv_bias: bool = True
    num_classes: int = 1000
    class_token: bool = True
    num_register_tokens: int = 0
    global_pool: str = "token"
    fc_norm: bool | None = None
    layer_scale: float | None = None
    no_embed_class: bool = False
    norm_eps: float = 1e-6
    activation: str = "gelu"
    head: str = "finetune"
    representation_size: int | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    head_dropout: float = 0.0
    stochastic_depth: float = 0.0
    position_interpolation: str = "bicubic"
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("in_channels", "embed_dim", "depth", "num_heads"):
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise _refuse(name, value, "a positive int")
        for name in ("num_classes", "num_register_tokens"):
            value = getattr(self, name)
            if not _is_int(value) or value < 0:
                raise _refuse(name, value, "an int of 0 or more")
        for name in ("qkv_bias", "class_token", "no_embed_class"):
            if not isinstance(getattr(self, name), bool):
                raise _refuse(name, getattr(self, name), "True or False")
        if not (self.fc_norm is None or isinstance(self.fc_norm, bool)):
            raise _refuse("fc_norm", self.fc_norm, "True, False or None")
        for name, allowed in (
            ("global_pool", POOLS),
            ("activation", ACTIVATIONS),
            ("head", HEADS),
            ("position_interpolation", INTERPOLATIONS),
        ):
            # An array of numpy's compares by element, and such an answer is neither true nor false.
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in allowed:
                raise _refuse(name, getattr(self, name), "one of " + ", ".join(map(repr, allowed)))
        for name in ("hidden_dim", "representation_size"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise _refuse(name, value, "a positive int or None")
        if not _is_number(self.mlp_ratio) or self.mlp_ratio <= 0:
            raise _refuse("mlp_ratio", self.mlp_ratio, "a positive number")
        if not _is_number(self.norm_eps) or not 0 < _in_float32(self.norm_eps) < math.inf:
            raise _refuse("norm_eps", self.norm_eps, "a positive number in float32")
        for name in ("dropout", "attention_dropout", "head_dropout", "stochastic_depth"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise _refuse(name, value, "a number in [0, 1)")
        scale = self.layer_scale
        if scale is not None and (not _is_number(scale) or not 0 < abs(_in_float32(scale)) < math.inf):
            raise _refuse("layer_scale", scale, "a number other than 0 in float32, or None for no LayerScale")

        # Frozen: normalised values are written once, here, past the dataclass's own __setattr__.
        for name in ("image_size", "patch_size"):
            object.__setattr__(self, name, _size(name, getattr(self, name)))
        for name, positive in (("mean", False), ("std", True)):
            object.__setattr__(self, name, _channels(name, getattr(self, name), self.in_channels, positive))
        self._check_together()

    def _check_together(self) -> None:
        (height, width), (patch_height, patch_width) = self.image_hw, self.patch_hw
        if height % patch_height or width % patch_width:
            raise _refuse("image_size", self.image_size, f"divisible by patch_size {self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise _refuse("embed_dim", self.embed_dim, f"divisible by num_heads {self.num_heads}")
        if self.global_pool == "token" and not self.class_token:
            raise _refuse("global_pool", self.global_pool, "'avg' or 'map' where class_token is False")
        if self.global_pool == "map" and self.activation == "swiglu":
            raise _refuse("global_pool", self.global_pool, "'token' or 'avg' where activation is 'swiglu'")
        if self.hidden_dim is None and not _is_finite(lambda: self.embed_dim * self.mlp_ratio):
            raise _refuse("mlp_ratio", self.mlp_ratio, f"such that embed_dim {self.embed_dim} times it is finite")
        if self.mlp_hidden < 1:
            raise _refuse("mlp_ratio", self.mlp_ratio, f"large enough for a hidden layer at embed_dim {self.embed_dim}")
        if self.activation == "swiglu" and self.mlp_hidden % 2:
            name, value = ("mlp_ratio", self.mlp_ratio) if self.hidden_dim is None else ("hidden_dim", self.hidden_dim)
            raise _refuse(
                name, value, f"such that fc1 has an even number of outputs, not {self.mlp_hidden}, for 'swiglu'"
            )
        if self.representation_size is not None and self.head != "pretrain":
            raise _refuse("representation_size", self.representation_size, "None unless head is 'pretrain'")
        if (self.mean is None) != (self.std is None):
            missing = "mean" if self.mean is None else "std"
            raise _refuse(missing, None, "given where the other of mean and std is given")

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) of the image that position embeddings are stored for, in pixels."""
        return _pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """(height, width) of a patch, in pixels."""
        return _pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches in an image of image_size."""
        (height, width), (patch_height, patch_width) = self.image_hw, self.patch_hw
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """Patches in an image of image_size."""
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens in front of the patches."""
        return int(self.class_token) + self.num_register_tokens

    @property
    def num_position_prefix(self) -> int:
        """How many of the prefix tokens have a row of their own in pos_embed: all, or none with no_embed_class."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    @property
    def num_tokens(self) -> int:
        """T, tokens of an image of image_size."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Outputs of fc1 (gate and value together for "swiglu")."""
        return int(self.embed_dim * self.mlp_ratio) if self.hidden_dim is None else self.hidden_dim

    @property
    def norm_after_pool(self) -> bool:
        """Whether the final LayerNorm is fc_norm (after pooling) instead of norm (before it)."""
        return self.global_pool == "avg" if self.fc_norm is None else self.fc_norm

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ViTConfig:
        """The architecture that timm registers under `name`, with any field replaced by keyword.

        Raises ValueError with the nearest names if there is no such preset, and TypeError for an unknown field or a
        name that is no string.
        """
        if not isinstance(name, str):
            raise TypeError(f"ViTConfig.preset: name must be a str, got {type(name).__name__}")
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"ViTConfig.preset: no preset {name!r}{hint} (vit_engine.config.PRESETS lists all {len(PRESETS)})"
            )
        return cls.from_dict({**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain values of every field, fit for JSON; ViTConfig.from_dict takes them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """A config from field values. Raises TypeError naming every unknown field, or for what is no mapping."""
        if not isinstance(values, Mapping):
            raise TypeError(f"ViTConfig.from_dict: values must map fields to values, got {type(values).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known, key=str)
        if unknown:
            raise TypeError(
                f"ViTConfig has no field {', '.join(map(repr, unknown))}; its fields are {', '.join(sorted(known))}"
            )
        return cls(**values)
