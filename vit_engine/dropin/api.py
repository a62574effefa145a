"""accelerate(), restore(), explain() and refresh(): a library's ViT on the kernels, and back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vit_kernels import use_tuned

from ..graphs import graph_limit
from ..vit import ViT
from .attached import NEEDS, Attached, State
from .describe import Unsupported, class_name
from .explain import Explanation, explanation_of
from .graphed import Graphed, whole_models
from .parts import FusedBlock, FusedNorm, describe_block, is_block
from .patch_embed import TIMM_PATCHES, FusedPatchEmbed
from .pools import TIMM_POOL, FusedPool
from .repeated import TIMM_LOOPS, Repeated, RepeatedEncoder, RepeatedFeatures, encoders, image_models
from .transformers_attention import model_with_own_attention
from .transformers_classifiers import TRANSFORMERS_CLASSIFIERS, FusedClassifier
from .transformers_stems import TRANSFORMERS_STEMS, FusedEmbeddings
from .whole_models import TIMM_MODELS, FusedTimmFeatures, FusedTimmLogits, FusedTorchvision

__all__ = ["accelerate", "attached_to", "explain", "refresh", "restore", "use_tuned"]

_TORCHVISION = "torchvision.models.vision_transformer.VisionTransformer"
# Norms that the libraries' models apply outside their blocks.
_NORMS = ("norm", "norm_pre", "fc_norm", "ln", "layernorm", "pre_layrnorm", "post_layernorm", "pre_layernorm")
SUPPORTED = (
    "timm's vision_transformer, deit, eva and beit models, torchvision's vit_*, and of transformers ViT, DeiT, DINOv2 "
    "(with registers too), DINOv3 ViT, CLIP, MetaCLIP 2, SigLIP, SigLIP 2, ViTMAE, ViT-MSN, I-JEPA, BEiT, OWL-ViT, "
    "OWLv2, BLIP and VideoMAE"
)


def accelerate(
    model: nn.Module,
    *,
    strict: bool = True,
    fold: bool = True,
    graphs: bool | int = False,
    tuned: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Makes the forward pass of a timm, torchvision or transformers ViT run on the kernels; returns the same model.

    Encoder blocks (equations 2 and 3 of arXiv 2010.11929 and their variants), the stem and the norms outside the blocks
    are taken over by objects set on the module instances; everything else stays the library's own. Class, parameters,
    buffers, state_dict, hooks on blocks and all methods are those of the model. Where the kernels cannot run (no GPU,
    autocast, float64, training, an adapter or hook inside a block, outputs that they do not compute) the original code
    of that part runs: explain(model) says where and why. restore(model) undoes it.

    Where a classifier reads the class token alone (timm's, torchvision's, transformers' ViT and DeiT), its last block
    computes that token only, unless a hook, a method of your own or an argument asks for the others.

    Results are those of the model in its own dtype within its own rounding error. In eval mode gradients are right,
    too: PyTorch's operators compute the pass again when backward() asks for it. Training runs the original code.

    model: in float32, float16 or bfloat16 for the kernels to run; may be moved or converted before or after.
    strict: True raises for an architecture of which any block, or the stem, has no kernels; False accelerates the
        blocks that have.
    fold: True keeps copies of the qkv and fc1 weights with the norm in front of them folded in (explain() prints their
        bytes), made when first needed and again whenever the originals change. False copies no weights and makes two
        launches more per block.
    graphs: True, or how many to keep at most, captures forward() of the whole model in a CUDA graph per shape, strides,
        dtype and plain arguments of its input, at the second pass of a shape; True keeps 8, the least recently used is
        given up first. For inference on a GPU: with gradients, autocast, training mode, hooks inside the model, blocks
        that run the original code, inside another capture or where a capture fails, the pass runs as without graphs,
        and explain(model) says why. Threads and streams may share the model: passes take turns. Its other entry
        points (forward_features, get_image_features) have no graphs.
    tuned: a file that `vit-engine tune` wrote on this GPU, put to use as by vit_engine.use_tuned(tuned): for this model
        and everything else in this process that runs on the kernels.

    Changes of parameters are seen by address, version counter and optimizer steps. Where these are blind (`.data`
    edits, numpy and dlpack views, collectives, replayed CUDA graphs, parameters made under torch.inference_mode()),
    call refresh(model) after the change. A query that an attention mask leaves no key gives 0, not an average of all.

    Raises TypeError for something that is no such model, has unsupported parts (the first four are named, the others
    counted) or a forward() of its own on every block, for an argument of a wrong type, and with graphs for a model
    without a library's own class around its blocks; ValueError for a model on the meta device, for graphs below 1, and
    for a tuned file of another GPU, Triton or kernel source (vit_kernels.TunedFileError, which names both); OSError for
    a tuned file that cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, ViT):
        raise TypeError("accelerate: a vit_engine.ViT runs on the kernels already; choose with model.set_backend(name)")
    for name in ("strict", "fold"):
        if not isinstance(locals()[name], bool):
            raise TypeError(f"accelerate: {name} must be True or False, got {locals()[name]!r}")
    limit = graph_limit(graphs, "accelerate")
    _refuse_meta(model)
    blocks = {name: part for name, part in model.named_modules() if is_block(part)}
    problems, usable = [], False
    for name, block in blocks.items():
        try:
            describe_block(block)
        except Unsupported as refusal:
            if not refusal.changed:
                problems.append(f"{name}: {refusal}")
                continue
        usable = True
    if not usable:
        found = _some(problems) or f"{class_name(model)}: it has no encoder block among its modules that is known"
        raise TypeError(f"accelerate: no kernels for {found}. Supported are {SUPPORTED}{_attention_alone(model)}")
    problems += _unsupported_stems(model)
    if strict and problems:
        raise TypeError(
            f"accelerate: no kernels for {_some(problems)}. With strict=False the other parts are accelerated"
        )
    whole = dict(whole_models(model, blocks)) if limit else {}
    if limit and not whole:
        raise TypeError(
            f"accelerate: graphs={graphs!r} captures a whole model of timm, torchvision or transformers; the blocks of "
            f"{class_name(model)} are in a class of its own, whose forward() may do anything. Use graphs=False"
        )
    if tuned is not None:
        use_tuned(tuned)
    restore(model)
    state = State(fold)
    for name, block in blocks.items():
        FusedBlock(block, name, state).attach()
    if not any(isinstance(attached, FusedBlock) for attached in attached_to(model)):
        raise TypeError("accelerate: forward() is overridden on every block instance; accelerate before wrapping them")
    _attach_the_rest(model, blocks, state)
    for name, part in image_models(model, blocks):
        Repeated(part, name, state).attach()
    for name, part in encoders(model, blocks):
        if "forward" not in vars(part):
            RepeatedEncoder(part, name, state).attach()
    for name, part in whole.items():
        Graphed(part, name, state, limit).attach()
    return model


def _attention_alone(model: Any) -> str:
    """What there is for models of transformers whose layers are not known."""
    if not class_name(model).startswith("transformers.models.") or model_with_own_attention(type(model.config)):
        return ""
    return ". Attention alone may run on its kernel in this model, too: vit_engine.register_attention()"


def _some(problems: list[str]) -> str:
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    return f"{'; '.join(problems[:4])}{more}"


def _refuse_meta(model: nn.Module) -> None:
    from vit_kernels import launch

    if any(p.is_meta for p in model.parameters()) and (launch.interpreting() or not launch.accepts("meta")):
        raise ValueError(
            "accelerate: the model is on the meta device and has no values yet: load its weights first, for example "
            f"with model.to_empty(device=...) and model.load_state_dict(...); {NEEDS}"
        )


def _unsupported_stems(model: nn.Module) -> list[str]:
    """Stems that are no patch projection: timm's hybrids, torchvision's `conv_stem_configs`."""
    problems = []
    for name, part in model.named_modules():
        kind, inside = class_name(part), f"{name}." if name else ""
        embed = getattr(part, "patch_embed", None) if kind.startswith("timm.models.") else None
        if isinstance(embed, nn.Module) and "Hybrid" in type(embed).__name__:
            problems.append(f"{inside}patch_embed: {class_name(embed)} (a convolutional network)")
        elif kind == _TORCHVISION and isinstance(part.conv_proj, nn.Sequential):
            problems.append(f"{inside}conv_proj: {len(part.conv_proj)} layers (a convolutional network)")
    return problems


def _attach_the_rest(model: nn.Module, blocks: dict[str, nn.Module], state: State) -> None:
    pools = [part for part in model.modules() if class_name(part) == TIMM_POOL]
    inside = {id(part) for block in blocks.values() for part in block.modules()}
    inside |= {id(part) for pool in pools for part in pool.modules() if part is not pool}
    for name, part in model.named_modules():
        if id(part) in inside:
            continue
        kind = class_name(part)
        if kind in TIMM_MODELS:
            FusedTimmFeatures(part, name, state).attach()
            FusedTimmLogits(part, name, state).attach()
        elif kind in TIMM_LOOPS:
            RepeatedFeatures(part, name, state).attach()
        elif kind == _TORCHVISION:
            FusedTorchvision(part, name, state).attach()
        elif kind in TRANSFORMERS_CLASSIFIERS:
            FusedClassifier(part, name, state).attach()
        elif kind == TIMM_POOL:
            FusedPool(part, name, state).attach()
        elif kind in TRANSFORMERS_STEMS:
            FusedEmbeddings(part, name, state).attach()
        elif kind == TIMM_PATCHES:
            FusedPatchEmbed(part, name, state).attach()
        elif isinstance(part, nn.LayerNorm | nn.RMSNorm) and name.rpartition(".")[2] in _NORMS:
            FusedNorm(part, name, state).attach()


def attached_to(model: nn.Module) -> Iterator[Attached]:
    """What accelerate() has set on the modules of a model, in the order of the modules, outer before inner."""
    return (attached for attached, _, _ in _places(model))


def _places(model: nn.Module) -> Iterator[tuple[Attached, nn.Module, str]]:
    """The same, each with the module that it is set on and the name it has there."""
    for part in model.modules():
        for place in ("forward", "forward_features", "_old_forward"):
            found = vars(part).get(place)
            if isinstance(found, Attached):
                yield found, part, place
            if isinstance(found, Graphed) and found.inner is not None:
                yield found.inner, part, place


def restore(model: nn.Module) -> nn.Module:
    """Undoes accelerate(): every module gets its own methods back. Returns the model; one that was never accelerated
    stays as it is. A shallow copy (copy.copy) shares its submodules with the original: those are restored in both.
    TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    for attached, module, place in list(_places(model)):
        attached.detach(module, place)
    return model


def refresh(model: nn.Module) -> nn.Module:
    """Forgets everything that was derived from the model's parameters, so that the next pass makes it anew.

    Needed only after changes that leave no trace, see accelerate(). Returns the model; ValueError if it is not
    accelerated, TypeError for what is no module.
    """
    for attached in _accelerated(model, "refresh"):
        attached.state.clear()
        attached.forget()
    return model


@torch.no_grad()
def explain(model: nn.Module) -> Explanation:
    """Prints, per module, what runs on which kernel and what does not and why, and the bytes of folded weights.

    As things stand now: parameters where they are, hooks and modes as they are, and, where a part fell back for the
    sake of its arguments, the reason of its last pass. Returns what was printed, with `rows` and `nbytes` to read.
    ValueError if the model is not accelerated, TypeError for what is no module.
    """
    explanation = explanation_of(model, _accelerated(model, "explain"))
    print(explanation)
    return explanation


def _accelerated(model: Any, function: str) -> list[Attached]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    found = list(attached_to(model))
    if not found:
        raise ValueError(f"{function}: the model is not accelerated; call vit_engine.accelerate(model) first")
    return found
