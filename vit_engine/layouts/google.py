"""Google's ViTs in flax: google-research/vision_transformer (AugReg too) and big_vision (SigLIP)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .slots import BLOCK, Slot, check, gather, refuse

__all__ = ["LAYOUTS", "from_google", "google_to_timm", "timm_to_google"]

LAYOUTS = ("vision_transformer", "big_vision")

# Where the image model's parameters lie in a file that holds more: optimizer state, or SigLIP's text model.
_ROOTS = ("params/img/", "opt/target/", "params/")
_LAYER = re.compile(r"Transformer/encoderblock_(\d+)/(.+)")
_STACK = "Transformer/encoderblock/"
_POSITION = {"vision_transformer": "Transformer/posembed_input/pos_embedding", "big_vision": "pos_embedding"}
# The number that flax gave each submodule of a block.
_NUMBERS = {"vision_transformer": (1, 2, 3), "big_vision": (0, 1, 0)}
_QKV = ("query", "key", "value")
_LEAVES = {"weight": "kernel", "bias": "bias"}


def _dense(table: dict[str, str]) -> dict[str, Slot]:
    return {f"{name}/{leaf}": Slot(f"{ours}.{end}") for name, ours in table.items() for end, leaf in _LEAVES.items()}


def _norm(table: dict[str, str]) -> dict[str, Slot]:
    leaves = {"weight": "scale", "bias": "bias"}
    return {f"{name}/{leaf}": Slot(f"{ours}.{end}") for name, ours in table.items() for end, leaf in leaves.items()}


def _shared(folder: str, parts: tuple[str, ...], ours: str) -> dict[str, Slot]:
    return {
        f"{folder}/{part}/{leaf}": Slot(f"{ours}.{end}", i, len(parts))
        for i, part in enumerate(parts)
        for end, leaf in _LEAVES.items()
    }


def _layer(layout: str) -> dict[str, Slot]:
    attention, norm, mlp = _NUMBERS[layout]
    folder = f"MultiHeadDotProductAttention_{attention}"
    return {
        **_norm({"LayerNorm_0": "norm1", f"LayerNorm_{norm}": "norm2"}),
        **_shared(folder, _QKV, "attn.qkv"),
        **_dense({f"{folder}/out": "attn.proj"}),
        **_dense({f"MlpBlock_{mlp}/Dense_{i}": f"mlp.fc{i + 1}" for i in (0, 1)}),
    }


_MAP = "MAPHead_0"
_TOP = {
    "cls": Slot("cls_token"),
    **_dense({"embedding": "patch_embed.proj", "pre_logits": "pre_logits.fc", "head": "head"}),
    **_norm({"Transformer/encoder_norm": "norm"}),
    f"{_MAP}/probe": Slot("attn_pool.latent"),
    **_shared(f"{_MAP}/MultiHeadDotProductAttention_0", _QKV[:1], "attn_pool.q"),
    **_shared(f"{_MAP}/MultiHeadDotProductAttention_0", _QKV[1:], "attn_pool.kv"),
    **_dense({f"{_MAP}/MultiHeadDotProductAttention_0/out": "attn_pool.proj"}),
    **_norm({f"{_MAP}/LayerNorm_0": "attn_pool.norm"}),
    **_dense({f"{_MAP}/MlpBlock_0/Dense_{i}": f"attn_pool.mlp.fc{i + 1}" for i in (0, 1)}),
}
_LAYERS = {layout: _layer(layout) for layout in LAYOUTS}
_ANY_TOP = {**_TOP, **{name: Slot("pos_embed") for name in _POSITION.values()}}
_ANY_LAYER = {**_LAYERS["vision_transformer"], **_LAYERS["big_vision"]}


def _place(name: str) -> Slot | None:
    block = _LAYER.fullmatch(name)
    if block is None:
        return _ANY_TOP.get(name)
    slot = _ANY_LAYER.get(block[2])
    return slot and slot._replace(name=f"blocks.{block[1]}.{slot.name}")


def _ends(name: str) -> tuple[str, str]:
    """The last two parts of a path: a layer and its leaf."""
    *_, layer, leaf = ["", *name.split("/")]
    return layer, leaf


def _axes(name: str) -> int | None:
    """How many axes a kernel, or the bias of query, key or value, has there; None for all else."""
    layer, leaf = _ends(name)
    if layer in _QKV:
        return 3 if leaf == "kernel" else 2
    if leaf != "kernel":
        return None
    return {"out": 3, "embedding": 4}.get(layer, 2)


def _output_first(name: str, array: Tensor) -> Tensor:
    """An array that has the axes it should have, with outputs first and heads side by side."""
    axes = _axes(name)
    if axes is None:
        return array
    if axes == 4:
        return array.permute(3, 2, 0, 1).contiguous()
    if _ends(name)[0] not in _QKV:
        return array.flatten(0, axes - 2).t().contiguous()
    return array.flatten(1).t().contiguous() if axes == 3 else array.flatten()


def _unstacked(arrays: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Arrays of all blocks along a leading axis (flax's scan) as one per block; and what each new name was."""
    single: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, array in arrays.items():
        leaf = name[len(_STACK) :]
        stacked = name.startswith(_STACK) and leaf in _ANY_LAYER and array.dim() > 0
        ones = [f"{_STACK[:-1]}_{number}/{leaf}" for number in range(len(array))] if stacked else []
        # Beside the same layer of a block on its own, a stack has no place: it must not take that one's.
        if ones and not any(one in arrays for one in ones):
            for one, layer in zip(ones, array, strict=True):
                single[one] = layer.clone()
                origin[one] = name
        else:
            single[name] = array
            origin[name] = name
    return single, origin


def from_google(arrays: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str], set[int]]:
    """timm's tensors from a flattened flax tree, why others were left (by their paths there), and the numbers of heads
    that attention has in it.

    Of a tree that holds more than the image model (optimizer state; SigLIP's text model), only that is taken.
    """
    names = list(arrays)
    root = next((root for root in _ROOTS if any(name.startswith(root) for name in names)), "")
    taken = {name[len(root) :]: _tensor(name, arrays[name]) for name in names if name.startswith(root)}
    single, origin = _unstacked(taken)
    odd = {name: axes for name, array in single.items() if (axes := _axes(name)) not in (None, array.dim())}
    flat = {name: array if name in odd else _output_first(name, array) for name, array in single.items()}
    tensors, left = gather(flat, lambda name: None if name in odd else _place(name))
    for name in odd:
        if _place(name):
            left[name] = f"it should have {odd[name]} axes, not the shape {list(single[name].shape)}"
    heads = {single[name].shape[-2] for name in set(single) - set(odd) if _place(name) and _ends(name)[0] in _QKV}
    return tensors, {root + origin[name]: why for name, why in left.items()}, heads


def _tensor(name: str, array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    plain = np.asarray(array)
    shape = plain.shape
    if not plain.dtype.isnative:
        plain = plain.astype(plain.dtype.newbyteorder("="))
    # A tensor can be written: memory that must not be, as that of jax's arrays, is not its.
    plain = np.ascontiguousarray(plain) if plain.flags.writeable else plain.copy(order="C")
    # numpy knows no bfloat16: flax writes it as two opaque bytes.
    if plain.dtype.kind == "V" and plain.dtype.itemsize == 2:
        return torch.from_numpy(plain.view(np.int16)).view(torch.bfloat16).reshape(shape)
    try:
        return torch.from_numpy(plain.reshape(shape))
    except TypeError as error:
        raise TypeError(f"{name} must be an array of numbers, got one of {plain.dtype}") from error


def google_to_timm(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """A flax tree of Google's ViT under the names and in the shapes of timm's state_dict.

    arrays: numpy arrays or tensors by path, as in the .npz files of google-research/vision_transformer and big_vision;
        bfloat16 may come as two opaque bytes. Below "opt/target/", "params/" or "params/img/" only that part is taken:
        the rest is the optimizer's, or SigLIP's text model.

    With D the width, H heads of d, M the MLP's width, N patches, C classes, L the block; on the left as in
    vision_transformer, in parentheses big_vision. There, blocks may also be stacked along a leading axis below
    Transformer/encoderblock instead of Transformer/encoderblock_L.

        cls [1, 1, D]                                                  cls_token
        embedding/kernel [P, P, 3, D], bias [D]                        patch_embed.proj [D, 3, P, P], [D]
        Transformer/posembed_input/pos_embedding (pos_embedding)       pos_embed [1, 1 + N or N, D]
        Transformer/encoderblock_L
            LayerNorm_0, LayerNorm_2 (LayerNorm_1) / scale, bias [D]       blocks.L.norm1, norm2
            MultiHeadDotProductAttention_1 (..._0)
                query, key, value / kernel [D, H, d], bias [H, d]          blocks.L.attn.qkv [3 D, D], [3 D]
                out / kernel [H, d, D], bias [D]                           blocks.L.attn.proj [D, D], [D]
            MlpBlock_3 (MlpBlock_0) / Dense_0 [D, M], [M]                  blocks.L.mlp.fc1 [M, D], [M]
                                      Dense_1 [M, D], [D]                  blocks.L.mlp.fc2 [D, M], [D]
        Transformer/encoder_norm / scale, bias [D]                     norm
        pre_logits / kernel [D, R], bias [R]                           pre_logits.fc (ViTConfig(head="pretrain"))
        head / kernel [D, C], bias [C]                                 head [C, D], [C]
        MAPHead_0 / probe [1, 1, D]                                    attn_pool.latent
            MultiHeadDotProductAttention_0 / query                         attn_pool.q [D, D], [D]
                key, value                                                 attn_pool.kv [2 D, D], [2 D]
                out                                                        attn_pool.proj [D, D], [D]
            LayerNorm_0, MlpBlock_0 as in a block                          attn_pool.norm, attn_pool.mlp

    Position embeddings are passed on as they are: with a class token, vision_transformer has a row for it and
    big_vision has none (timm's no_embed_class).

    Raises ValueError naming every array that has no place, has the wrong number of axes, or lacks its query, key or
    value; TypeError if something is no array of numbers.
    """
    names = list(arrays) if isinstance(arrays, Mapping) else None
    if names is None or not all(isinstance(name, str) for name in names):
        found = type(arrays).__name__ if names is None else next(repr(n) for n in names if not isinstance(n, str))
        raise TypeError(f"google_to_timm: arrays must map paths to arrays, as numpy.load(path) does, got {found}")
    tensors, left, _ = from_google(arrays)
    refuse("google_to_timm", "timm's layout", left)
    return tensors


def _shares(tensor: Tensor, paths: list[str], num_heads: int) -> list[Tensor] | None:
    """The arrays at these paths that make up a tensor of timm's; None if its shape is no such tensor's."""
    axes, (layer, leaf) = _axes(paths[0]), _ends(paths[0])
    if axes is None:
        return [tensor]
    if tensor.dim() != (1 if leaf == "bias" else 4 if axes == 4 else 2):
        return None
    if axes == 4:
        return [tensor.permute(2, 3, 1, 0)]
    if layer == "out":
        width, inputs = tensor.shape
        return None if inputs % num_heads else [tensor.t().reshape(num_heads, -1, width)]
    if layer not in _QKV:
        return [tensor.t()]
    if tensor.shape[0] % (len(paths) * num_heads):
        return None
    shares = tensor.chunk(len(paths))
    if leaf == "bias":
        return [share.reshape(num_heads, -1) for share in shares]
    return [share.t().reshape(tensor.shape[1], num_heads, -1) for share in shares]


def timm_to_google(
    state_dict: Mapping[str, Tensor],
    num_heads: int,
    layout: str = "vision_transformer",
    scan: bool = False,
    root: str = "",
) -> dict[str, np.ndarray]:
    """The inverse of google_to_timm, which has the table: numpy arrays by path, fit for numpy.savez(path, **arrays).

    num_heads: H, which no shape of timm's tells. bfloat16 becomes two opaque bytes, as flax writes it.
    layout: "vision_transformer" or "big_vision". scan: with "big_vision", all blocks stacked below
        Transformer/encoderblock. root: put in front of every path, such as "params/" or "params/img/".

    Raises ValueError naming every tensor without a place (register tokens, LayerScale; attention pooling in
    vision_transformer) or that does not divide among the heads, or the argument; TypeError if something is no tensor.
    """
    check("timm_to_google", state_dict)
    if layout not in LAYOUTS:
        raise ValueError(f"timm_to_google: layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if scan and layout != "big_vision":
        raise ValueError(f"timm_to_google: scan must be False for layout {layout!r}, which never stacks blocks")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"timm_to_google: num_heads must be a positive int, got {num_heads!r}")
    if not isinstance(root, str):
        raise TypeError(f"timm_to_google: root must be a str, got {root!r}")
    top = {**_TOP, _POSITION[layout]: Slot("pos_embed")}
    if layout == "vision_transformer":
        top = {name: slot for name, slot in top.items() if not name.startswith(_MAP)}
    paths, inner = _paths(top), _paths(_LAYERS[layout])

    def place(name: str) -> list[str] | None:
        block = BLOCK.fullmatch(name)
        if block is None:
            return paths.get(name)
        leaves = inner.get(block[2])
        return leaves and [f"Transformer/encoderblock_{block[1]}/{leaf}" for leaf in leaves]

    arrays: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for name, tensor in state_dict.items():
        theirs = place(name)
        shares = _shares(tensor, theirs, num_heads) if theirs else None
        if theirs and shares:
            arrays.update(zip(theirs, shares, strict=True))
        else:
            left[name] = f"its shape {list(tensor.shape)} does not divide among {num_heads} heads" if theirs else ""
    if scan:
        arrays = _stacked(arrays, left)
    refuse("timm_to_google", f"Google's layout {layout!r}", left)
    return {root + name: _array(tensor) for name, tensor in arrays.items()}


def _paths(table: Mapping[str, Slot]) -> dict[str, list[str]]:
    """For each of timm's names the paths of its shares, in order."""
    paths: dict[str, list[str]] = {}
    for path, slot in table.items():
        paths.setdefault(slot.name, []).append(path)
    return paths


def _stacked(arrays: Mapping[str, Tensor], left: dict[str, str]) -> dict[str, Tensor]:
    """The arrays of all blocks stacked by block; adds to `left` those that not every block has, or in other shapes."""
    stacks: dict[str, dict[int, Tensor]] = {}
    single: dict[str, Tensor] = {}
    for name, array in arrays.items():
        block = _LAYER.fullmatch(name)
        if block is None:
            single[name] = array
        else:
            stacks.setdefault(block[2], {})[int(block[1])] = array
    depth = 1 + max((max(stack) for stack in stacks.values()), default=-1)
    for leaf, stack in stacks.items():
        if len(stack) < depth or len({array.shape for array in stack.values()}) > 1:
            left[f"blocks.*.{_ANY_LAYER[leaf].name}"] = f"to be stacked, all {depth} blocks need it in one shape"
        else:
            single[_STACK + leaf] = torch.stack([stack[number] for number in range(depth)])
    return single


def _array(tensor: Tensor) -> np.ndarray:
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().view("V2")
    return plain.numpy()
