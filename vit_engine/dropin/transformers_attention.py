"""The attention kernel as an attention implementation of Hugging Face transformers.

transformers looks two functions up under the name of an implementation: the attention itself, and the function that
makes its masks. A name without the second gets no mask at all, padding and all, and transformers does not say so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vit_kernels import launch

from .. import ops

NAME = "vit_engine"

# What models hand down to every attention function although it asks nothing of it. Anything else is refused unless it
# is None: an argument that nobody here has heard of may well change the result.
HARMLESS = (
    "position_ids",  # are in query and key already (rotary embeddings), or in the mask (packed sequences)
    "position_embeddings",  # likewise
    "cache_position",  # where the cache was written: key and value are its content after that
    "use_cache",  # likewise
    "return_dict",  # what the model makes of the outputs of its layers
    "output_hidden_states",  # likewise
    "output_router_logits",  # likewise
    "logits_to_keep",  # likewise
    "num_items_in_batch",  # scales the loss
    "deterministic",  # asks it of the backward pass of flash attention
)


def register_attention() -> None:
    """Makes `attn_implementation="vit_engine"` known to transformers: the attention and its masks, for all models.

    Afterwards `from_pretrained(..., attn_implementation="vit_engine")` or `model.set_attn_implementation("vit_engine")`
    runs `vit_engine.ops.attention` in every model whose layers look their attention up in `AttentionInterface`; a model
    with attention code of its own raises ValueError when it makes a mask. May be called again.

    For inference, in fp32, fp16 and bf16, heads up to 128 wide. What the kernel cannot do (softcap, attention sinks,
    position_bias, dropout, packed sequences, returned weights) raises and names the argument.

    A query that may attend to no key (a padding token on the left) gives 0, as with "sdpa", where "eager" gives an
    average of all values. Raises ModuleNotFoundError without transformers.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask_of)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """o = softmax(scaling q k^T + mask) v, as transformers calls it for one layer.

    query [B, H, Nq, D]; key [B, Hk, Nk, D] and value [B, Hk, Nk, Dv], Dv <= D <= 128, Hk a divisor of H. attention_mask
    broadcastable to [B, H, Nq, Nk], boolean (True: may attend) or additive. Returns (o [B, Nq, H, Dv], None).

    Without a mask, more than one query and `is_causal` (default: the module's own, default True) it is causal, as in
    transformers' integrations/sdpa_attention.py. There, as many queries as keys are not asked for: with fewer queries
    the first keys are meant (a static cache being filled) or the last ones (a model that dropped queries), so that is
    refused here; `attention_mask_of` makes a mask for both.
    sliding_window is the mask's business, as with "eager" and "sdpa"; without a mask no key may lie outside of it.

    Raises ValueError that names the argument, NotImplementedError when a gradient would be needed, and what
    `vit_kernels.attention` raises.
    """
    if output_attentions:
        raise ValueError(_unsupported("output_attentions", output_attentions) + " The weights are never written.")
    if dropout:
        raise ValueError(_unsupported("dropout", dropout) + " Call model.eval().")
    for name, argument in kwargs.items():
        if argument is not None and name not in HARMLESS:
            raise ValueError(_unsupported(name, argument))
    if attention_mask is not None and attention_mask.ndim != 4:
        raise ValueError(f"attention_mask must have shape [B, H, Nq, Nk]; got {tuple(attention_mask.shape)}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, attention_mask)):
        raise NotImplementedError(
            f"attn_implementation={NAME!r} has no backward pass: run the model under torch.no_grad() or "
            'torch.inference_mode(), or train with model.set_attn_implementation("sdpa")'
        )

    queries, keys = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = queries > 1 and attention_mask is None and bool(is_causal)
    if causal and queries != keys:
        raise ValueError(
            f"attention_mask must be given for causal attention of {queries} queries to {keys} keys: nothing else says "
            "which keys they come after"
        )
    if sliding_window is not None and attention_mask is None and keys > sliding_window:
        raise ValueError(
            _unsupported("sliding_window", sliding_window) + f" There are {keys} keys and no attention_mask that says "
            "which of them lie inside."
        )

    if torch.is_autocast_enabled(query.device.type):
        # As PyTorch's own attention does under autocast; a custom operator is not on its list.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.dtype == torch.bfloat16 and launch.interpreting():
        raise ValueError(
            f"attn_implementation={NAME!r} does not support bfloat16 in Triton's interpreter, which computes it "
            "wrongly; use float32 or float16 with it"
        )
    if query.shape[0] == 1:
        # Learned queries that all images share.
        query = query.expand(key.shape[0], -1, -1, -1)
    width = value.shape[3]
    if width < query.shape[3]:
        # Latent attention: columns of zeros, dropped again below.
        value = nn.functional.pad(value, (0, query.shape[3] - width))
    out = ops.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scaling,
        causal=causal,
        mask=attention_mask,
    )
    assert isinstance(out, Tensor)
    return out[..., :width], None


def attention_mask_of(
    *, config: Any, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **kwargs: Any
) -> Tensor | None:
    """transformers' boolean mask for "sdpa", [B, 1, q_length, kv_length], or None where attention needs none.

    It is None under fewer conditions: a causal mask goes only where queries and keys are the same tokens, or where
    there is one query. Raises ValueError for the configuration of a model whose attention is code of its own: that
    would take the mask for one to be added.
    """
    from transformers.masking_utils import sdpa_mask

    own_code = model_with_own_attention(type(config))
    if own_code:
        raise ValueError(
            f"attn_implementation={NAME!r} is not supported by {own_code}: its attention is code of its own that does "
            'not use AttentionInterface; use "eager"'
        )
    allow_is_causal_skip = allow_is_causal_skip and (q_length == 1 or q_length == kv_length)
    return sdpa_mask(
        config=config, q_length=q_length, kv_length=kv_length, allow_is_causal_skip=allow_is_causal_skip, **kwargs
    )


def _unsupported(name: str, value: Any) -> str:
    shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return f'attn_implementation={NAME!r} does not support {name}; got {shown}. Use "eager" if the model needs it.'


# torch.compile takes the answer as it is: traced, the walk over all model classes costs seconds.
@torch.compiler.assume_constant_result
def model_with_own_attention(config_class: type) -> str | None:
    """The name of a model class of this configuration, already imported, that does not use `AttentionInterface`.

    Read from its module: it defines an attention layer, and holds no such interface. (A module that defines no
    attention layer builds on others'.)
    """
    from transformers import AttentionInterface, PreTrainedModel

    for model in _subclasses(PreTrainedModel):
        if model.config_class is not config_class or model.__module__ not in sys.modules:
            continue
        contents = vars(sys.modules[model.__module__])
        classes = [x for x in contents.values() if isinstance(x, type) and x.__module__ == model.__module__]
        defines_layer = any(issubclass(x, nn.Module) and "Attention" in x.__name__ for x in classes)
        if defines_layer and not any(isinstance(x, AttentionInterface) for x in contents.values()):
            return model.__name__
    return None


def _subclasses(of: type) -> Iterator[Any]:
    for each in of.__subclasses__():
        yield each
        yield from _subclasses(each)
