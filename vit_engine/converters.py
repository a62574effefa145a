"""Between the layouts in which libraries keep a ViT's weights: plain functions from dict to dict, by way of timm's.

    torchvision_to_timm     timm_to_torchvision
    transformers_to_timm    timm_to_transformers
    google_to_timm          timm_to_google
    dinov2_to_timm

Each docstring has the table of names and shapes. All are strict: a tensor that has no place in the other layout raises
ValueError, which names all such tensors. dtypes are kept. Tensors that merely change their name are the ones that came
in; those that are transposed, split or stacked are new. What a model lacks is not noticed here but by
load_state_dict(strict=True). What no tensor tells (pooling, activation, eps, the number of heads) has to be the same in
both models. vit_engine.ViT has timm's layout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .layouts.dinov2 import dinov2_to_timm
from .layouts.google import google_to_timm, timm_to_google
from .layouts.slots import check
from .layouts.torchvision import timm_to_torchvision, torchvision_to_timm
from .layouts.transformers import timm_to_transformers, transformers_to_timm

__all__ = [
    "convert",
    "dinov2_to_timm",
    "google_to_timm",
    "timm_to_google",
    "timm_to_torchvision",
    "timm_to_transformers",
    "torchvision_to_timm",
    "transformers_to_timm",
]


def _same(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    check("convert", state_dict)
    return dict(state_dict)


_TO_TIMM: dict[str, Callable[..., dict[str, Any]]] = {
    "timm": _same,
    "torchvision": torchvision_to_timm,
    "transformers": transformers_to_timm,
    "google": google_to_timm,
    "dinov2": dinov2_to_timm,
}
_FROM_TIMM: dict[str, Callable[..., dict[str, Any]]] = {
    "timm": _same,
    "torchvision": timm_to_torchvision,
    "transformers": timm_to_transformers,
    "google": timm_to_google,
}


def convert(state_dict: Mapping[str, Any], source: str, target: str, **options: Any) -> dict[str, Any]:
    """The weights of a ViT from one library's layout in another's.

    source: "timm", "torchvision", "transformers", "google" or "dinov2" (facebookresearch's files).
    target: "timm", "torchvision", "transformers" or "google".
    options: what the function timm_to_<target> takes besides: num_heads, layout, scan and root for "google"; family,
        layout and prefix for "transformers".

    Returns a new dict: tensors, or numpy arrays for "google". Raises what the functions in this module raise,
    ValueError for a name that is none of these, and TypeError for options that timm_to_<target> does not take or, as
    num_heads of "google", needs.
    """
    for argument, value, known in (("source", source, _TO_TIMM), ("target", target, _FROM_TIMM)):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"convert: {argument} must be one of {', '.join(map(repr, known))}, got {value!r}")
    taken = [*inspect.signature(_FROM_TIMM[target]).parameters][1:]
    if unknown := [name for name in options if name not in taken]:
        raise TypeError(f"convert: the options of target {target!r} are {', '.join(taken) or 'none'}, got {unknown[0]}")
    return _FROM_TIMM[target](_TO_TIMM[source](state_dict), **options)
