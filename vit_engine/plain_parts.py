"""Whether a ViT is made of nothing but what the kernels compute: they read its parameters and call none of its parts.

Whatever else a user has put into it (an adapter, a hook, another head) would be left out without a word, so it is
refused by name. What is asked is remembered until anything about the model changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .class_code import replaced
from .layers import Attention, Block, DropPath, LayerScale, Mlp, PatchEmbed
from .pooling import AttentionPool

if TYPE_CHECKING:
    from .fingerprint import Fingerprint
    from .vit import ViT

__all__ = ["PlainParts", "changed_methods"]

# What stands in front of the head, by the names of a model's parts, and the classes that the kernels know there.
_STEM: dict[str, tuple[type, ...]] = {
    "patch_embed": (PatchEmbed,),
    "patch_embed.proj": (nn.Conv2d,),
    "pos_drop": (nn.Dropout, nn.Identity),
    "blocks": (nn.Sequential,),
    "norm": (nn.LayerNorm, nn.Identity),
}
_BLOCK: dict[str, tuple[type, ...]] = {
    "": (Block,),
    "norm1": (nn.LayerNorm,),
    "attn": (Attention,),
    "attn.qkv": (nn.Linear,),
    "attn.proj": (nn.Linear,),
    "attn.proj_drop": (nn.Dropout, nn.Identity),
    "ls1": (LayerScale, nn.Identity),
    "drop_path1": (DropPath, nn.Identity),
    "norm2": (nn.LayerNorm,),
    "mlp": (Mlp,),
    "mlp.fc1": (nn.Linear,),
    "mlp.drop1": (nn.Dropout, nn.Identity),
    "mlp.fc2": (nn.Linear,),
    "mlp.drop2": (nn.Dropout, nn.Identity),
    "ls2": (LayerScale, nn.Identity),
    "drop_path2": (DropPath, nn.Identity),
}
_POOL: dict[str, tuple[type, ...]] = {
    "": (AttentionPool,),
    **dict.fromkeys(("q", "kv", "proj", "mlp.fc1", "mlp.fc2"), (nn.Linear,)),
    "norm": (nn.LayerNorm,),
    "mlp": (Mlp,),
    "mlp.drop1": (nn.Dropout, nn.Identity),
    "mlp.drop2": (nn.Dropout, nn.Identity),
}
_HEAD: dict[str, tuple[type, ...]] = {
    "fc_norm": (nn.LayerNorm, nn.Identity),
    "pre_logits": (nn.Identity, nn.Sequential),
    "head_drop": (nn.Dropout, nn.Identity),
    "head": (nn.Linear, nn.Identity),
}
_HIDDEN: dict[str, tuple[type, ...]] = {"fc": (nn.Linear,), "act": (nn.Tanh,)}
# What has parameters, in front of and behind the pooling.
_FRONT = ("cls_token", "reg_token", "pos_embed", "patch_embed", "blocks", "norm")
_BEHIND = ("attn_pool", "fc_norm", "pre_logits", "head")
# Methods of a ViT that passes on the kernels do not call; a class made from it may have others.
_METHODS = ("forward_features", "forward_head", "pool")
# Those that they do call, though not when they are made again.
_CALLED = ("prefix_tokens", "position_embedding")


class PlainParts:
    """What was found in one model, and remembered. Not part of any state_dict, and left out of copies and pickles."""

    def __init__(self) -> None:
        self._known: list[Fingerprint | None] = [None, None]

    def objection(self, model: ViT, head: bool) -> str | None:
        """What a backend of kernels cannot do with the model, and the way out, as the end of a sentence that begins
        with the backend; None for nothing.

        head: whether what stands behind the final norm is part of the pass.
        """
        found = self._left_out(model, head)
        if found is None:
            return None if self._known[head] is not None else self._unreadable(model, head)
        behind = head and self._left_out(model, head=False) is None
        apart = ", or model.forward_head(model.forward_features(images)), which runs any head" if behind else ""
        return (
            f"would leave out what is in the model: {found}; take it out, or use model.set_backend('torch'){apart}"
        )

    def _left_out(self, model: ViT, head: bool) -> str | None:
        """The part, what it is and what is allowed."""
        # Before what is remembered, which knows the parts of the model and no methods but forward().
        if head and (method := next(_overridden(model, _METHODS), None)) is not None:
            return method
        known = self._known[head]
        if known is not None and known.holds():
            return None
        self._known[head] = None
        return next(_objections(model, head), None)

    def _unreadable(self, model: ViT, head: bool) -> str | None:
        from .fingerprint import Fingerprint

        found = next(_unread(model, head), None)
        if found is None:
            self._known[head] = Fingerprint(model)
            return None
        return f"{found}, or use model.set_backend('torch')"

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()


def _objections(model: ViT, head: bool) -> Iterator[str]:
    yield from _of_tensors("", model)
    yield from _of_parts(model, "", _STEM)
    conv, patch = model.patch_embed.proj, model.patch_embed.patch_hw
    settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    if settings != (patch, patch, (0, 0), (1, 1), 1):
        yield f"patch_embed.proj is {conv}, expected a convolution of {patch[0]} x {patch[1]} patches that touch"
    if not len(model.blocks):
        yield "blocks is empty, expected at least one Block"
    for name, block in model.blocks.named_children():
        yield from _of_parts(block, f"blocks.{name}", _BLOCK)
    if not head:
        return
    if model.attn_pool is not None:
        yield from _of_parts(model.attn_pool, "attn_pool", _POOL)
    yield from _of_parts(model, "", _HEAD)
    if isinstance(model.pre_logits, nn.Sequential):
        inside = [name for name, _ in model.pre_logits.named_children()]
        if inside != list(_HIDDEN):
            yield f"pre_logits is a Sequential of {inside}, expected {list(_HIDDEN)} or Identity"
        yield from _of_parts(model.pre_logits, "pre_logits", _HIDDEN)


def _unread(model: ViT, head: bool) -> Iterator[str]:
    """Parameters that the launchers would refuse under names of their own, or that have no values to read."""
    from vit_kernels.checks import FLOAT_DTYPES

    first = model.patch_embed.proj.weight
    way_out = "model.float(), model.half() or model.bfloat16()"
    allowed = f"the kernels take float32, float16 and bfloat16: use {way_out}"
    if first.dtype not in FLOAT_DTYPES:
        yield f"cannot run a model in {first.dtype}; {allowed}"
    for name, tensor in model.named_parameters():
        if name.partition(".")[0] not in (*_FRONT, *_BEHIND[: len(_BEHIND) * head]):
            continue
        if tensor.dtype not in FLOAT_DTYPES:
            yield f"cannot read {name}, which is {tensor.dtype}; {allowed}"
        if name.endswith("weight") and tensor.dim() > 1 and tensor.dtype != first.dtype:
            both = f"{name} is {tensor.dtype}, and patch_embed.proj.weight {first.dtype}"
            yield f"needs weights of one dtype: {both}; use {way_out}"
        if tensor.device.type == "meta" and first.device.type != "meta":
            yield f"cannot read {name}, which is on the meta device and has no values: load them"


def changed_methods(model: ViT, head: bool) -> str | None:
    """A method of somebody's own among those that a pass stands for: it is to run as written. None for none."""
    return next(_overridden(model, _CALLED + _METHODS if head else _CALLED), None)


def _overridden(model: ViT, methods: tuple[str, ...]) -> Iterator[str]:
    kind, own = type(model), vars(model)
    for name in methods:
        if name in own:
            yield f"{name}() is overridden on the instance"
        if getattr(getattr(kind, name), "__module__", None) != f"{__package__}.vit" or replaced(kind, name):
            yield f"{name}() is overridden in {_called(kind)}"


def _of_parts(root: nn.Module, prefix: str, expected: dict[str, tuple[type, ...]]) -> Iterator[str]:
    """Objections to the parts of these names below root, whose own name is prefix. Parents come before children."""
    for name, classes in expected.items():
        part: Any = root
        for step in name.split(".") if name else ():
            part = getattr(part, step)
        full = ".".join(filter(None, (prefix, name)))
        if type(part) not in classes:
            yield f"{full} is {_called(type(part))}, expected {' or '.join(map(_called, classes))}"
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if hooks:
            yield f"{full} has a hook ({getattr(hooks[0], '__qualname__', type(hooks[0]).__name__)}), expected none"
        if "forward" in vars(part):
            yield f"{full}.forward is overridden on the instance"
        if replaced(type(part)):
            yield f"{full}: {type(part).__qualname__}.forward was replaced on the class"
        if type(part) is nn.LayerNorm and len(part.normalized_shape) != 1:
            yield f"{full} normalises {part.normalized_shape}, expected the last dimension alone"
        if part.training and any(vars(part).get(rate) for rate in ("p", "rate", "attention_dropout")):
            yield f"{full} is in training mode and acts at random ({part})"
        yield from _of_tensors(full, part)


def _of_tensors(name: str, part: nn.Module) -> Iterator[str]:
    for key, tensor in part._parameters.items():
        if tensor is not None and not _plain(tensor):
            yield f"{f'{name}.{key}'.lstrip('.')} is a {_called(type(tensor))}, expected a plain Parameter"


def _plain(tensor: Tensor) -> bool:
    # While a graph is traced, parameters are tensors of other classes that stand for plain ones.
    if type(tensor) in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return True
    from torch._subclasses.fake_tensor import is_fake

    return is_fake(tensor)


def _called(kind: type) -> str:
    """A class's full name; PyTorch's as everybody writes it."""
    if kind.__module__.startswith("torch.nn.modules."):
        return f"torch.nn.{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"
