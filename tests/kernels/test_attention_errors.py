"""Every refusal of `attention` and `qk_rope`: the error names the argument, what came and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vit_kernels import attention, qk_rope

from .refusals import HALF, WRONG, case, refused, refused_unless_in_memory, t


def attention_arguments(**changes: Any) -> dict[str, Any]:
    return {"q": t(2, 5, 4, 16), "k": t(2, 7, 2, 16), "v": t(2, 7, 2, 16)} | changes


@pytest.mark.parametrize(
    ("error", "text", "bad"),
    [
        case(TypeError, "q must be a torch.Tensor ... got str", q="q"),
        case(ValueError, "q must have 4 dimensions ... got shape (2, 5, 64)", q=t(2, 5, 64)),
        case(TypeError, "q must have dtype ... got float64", q=t(2, 5, 4, 16, dtype=WRONG)),
        case(TypeError, "k must have the dtype of q, float32 ... got float16", k=t(2, 7, 2, 16, dtype=HALF)),
        case(TypeError, "v must have the dtype of q, float32 ... got float16", v=t(2, 7, 2, 16, dtype=HALF)),
        case(ValueError, "k must have shape (2, keys, key heads, 16) ... got (3, 7, 2, 16)", k=t(3, 7, 2, 16)),
        case(ValueError, "k must have shape (2, keys, key heads, 16) ... got (2, 7, 2, 8)", k=t(2, 7, 2, 8)),
        case(ValueError, "v must have shape (2, 7, 2, 16) ... got (2, 6, 2, 16)", v=t(2, 6, 2, 16)),
        case(ValueError, "heads that divides q's 4 ... got 3", k=t(2, 7, 3, 16), v=t(2, 7, 3, 16)),
        case(ValueError, "heads that divides q's 4 ... got 0", k=t(2, 7, 0, 16), v=t(2, 7, 0, 16)),
        case(
            ValueError,
            "q must have a head width from 1 to 128 ... (2, 5, 4, 129)",
            q=t(2, 5, 4, 129),
            k=t(2, 7, 2, 129),
            v=t(2, 7, 2, 129),
        ),
        case(ValueError, "scale must be a positive finite number ... got 0", scale=0.0),
        case(ValueError, "scale must be a positive finite number ... got -1", scale=-1.0),
        case(ValueError, "scale must be a positive finite number ... got inf", scale=float("inf")),
        case(ValueError, "scale must be a positive finite number ... got nan", scale=float("nan")),
        case(TypeError, "scale must be a number ... got '1'", scale="1"),
        case(TypeError, "return_lse must be True or False ... got 1", return_lse=1),
        case(TypeError, "key_lengths must be a torch.Tensor ... got list", key_lengths=[7, 7]),
        case(TypeError, "mask must be a torch.Tensor ... got list", mask=[True]),
        case(TypeError, "causal must be True or False ... got 1", causal=1),
        case(TypeError, "key_lengths must have dtype int32 or int64 ... got float32", key_lengths=t(2)),
        case(ValueError, "key_lengths must have shape (2,) ... got (3,)", key_lengths=t(3, dtype=torch.int32)),
        case(ValueError, "key_lengths must be contiguous", key_lengths=t(4, dtype=torch.int32)[::2]),
        case(TypeError, "mask must be boolean or floating point ... got int32", mask=t(5, 7, dtype=torch.int32)),
        case(
            TypeError,
            "mask must have dtype bool, float32, float16 or bfloat16 ... got float64",
            mask=t(5, 7, dtype=WRONG),
        ),
        case(ValueError, "mask must be broadcastable to (B, H, Nq, Nk) = (2, 4, 5, 7) ... got (7, 5)", mask=t(7, 5)),
        case(ValueError, "mask must be broadcastable ... got (3, 1, 5, 7)", mask=t(3, 1, 5, 7)),
        case(ValueError, "mask must be broadcastable ... got (1, 2, 4, 5, 7)", mask=t(1, 2, 4, 5, 7)),
        case(TypeError, "tf32 must be True or False ... got 'yes'", tf32="yes"),
    ],
)
def test_attention(error, text, bad):
    refused(attention, error, text, attention_arguments(), bad)


QK_ROPE = {
    "q": t(2, 5, 4, 16), "k": t(2, 5, 4, 16), "norm": "layer", "q_weight": t(16), "q_bias": t(16), "k_weight": t(16),
    "k_bias": t(16), "cos": t(4, 16), "sin": t(4, 16), "prefix": 1,
}  # fmt: skip
PLAIN = dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias", "cos", "sin"))


@pytest.mark.parametrize(
    ("error", "text", "bad"),
    [
        case(TypeError, "q must be a torch.Tensor ... got NoneType", q=None),
        case(ValueError, "q must have 4 dimensions ... got shape (2, 5, 64)", q=t(2, 5, 64)),
        case(TypeError, "k must have dtype ... got float64", k=t(2, 5, 4, 16, dtype=WRONG)),
        case(TypeError, "k must have the dtype of q, float32 ... got float16", k=t(2, 5, 4, 16, dtype=HALF)),
        case(ValueError, "k must have shape (2, 5, key heads, 16) ... got (2, 6, 4, 16)", k=t(2, 6, 4, 16)),
        case(ValueError, "k must have shape (2, 5, key heads, 16) ... got (3, 5, 4, 16)", k=t(3, 5, 4, 16)),
        case(ValueError, "k must have shape (2, 5, key heads, 16) ... got (2, 5, 4, 8)", k=t(2, 5, 4, 8)),
        case(
            ValueError,
            "q must have a head width from 1 to 128 ... (2, 5, 4, 129)",
            q=t(2, 5, 4, 129),
            k=t(2, 5, 4, 129),
            **PLAIN,
        ),
        case(ValueError, "q must have a head width from 1 to 128 ... (2, 5, 4, 0)", q=t(2, 5, 4, 0), k=t(2, 5, 4, 0)),
        case(
            ValueError,
            "q must have an even head width where cos and sin are given ... (2, 5, 4, 7)",
            q=t(2, 5, 4, 7),
            k=t(2, 5, 4, 7),
            cos=t(4, 7),
            sin=t(4, 7),
            **dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias")),
        ),
        case(ValueError, "norm must be one of none, layer, rms ... got 'l2'", norm="l2"),
        case(ValueError, "q_weight belongs to norm='layer' or 'rms'", norm="none"),
        case(ValueError, "k_bias belongs to norm='layer' or 'rms'", **PLAIN | {"norm": "none", "k_bias": t(16)}),
        case(ValueError, "q_weight must have shape (16,) ... got (15,)", q_weight=t(15)),
        case(ValueError, "q_bias must have 1 dimensions ... got shape (1, 16)", q_bias=t(1, 16)),
        case(TypeError, "k_weight must have dtype ... got float64", k_weight=t(16, dtype=WRONG)),
        case(ValueError, "k_bias must have shape (16,) ... got (64,)", k_bias=t(64)),
        case(ValueError, "eps must be a finite number >= 0 ... got -1", eps=-1),
        case(ValueError, "cos and sin must be given together; got only cos", sin=None),
        case(ValueError, "cos and sin must be given together; got only sin", cos=None),
        case(TypeError, "cos must be a torch.Tensor ... got list", cos=[1.0]),
        case(TypeError, "sin must have dtype ... got float64", sin=t(4, 16, dtype=WRONG)),
        case(ValueError, "cos must have shape (N - prefix, D) = (4, 16) ... got (5, 16)", cos=t(5, 16)),
        case(ValueError, "sin must have shape (N - prefix, D) = (4, 16) ... got (4, 8)", sin=t(4, 8)),
        case(ValueError, "cos must have shape ... (1 or 4, 4, 16) ... got (2, 4, 16)", cos=t(2, 4, 16)),
        case(ValueError, "(1 or 2, 1 or 4, 4, 16); got (3, 1, 4, 16)", sin=t(3, 1, 4, 16)),
        case(ValueError, "(1 or 2, 1 or 4, 4, 16); got (2, 3, 4, 16)", sin=t(2, 3, 4, 16)),
        case(ValueError, "cos must have shape ... got (16,)", cos=t(16)),
        case(ValueError, "cos must have shape ... got (1, 1, 1, 4, 16)", cos=t(1, 1, 1, 4, 16)),
        case(ValueError, "cos must have shape ... (1, 4, 16) ... got (4, 4, 16)", k=t(2, 5, 2, 16), cos=t(4, 4, 16)),
        case(TypeError, "interleaved must be True or False ... got 1", interleaved=1),
        case(TypeError, "prefix must be an integer ... got 1.0", prefix=1.0),
        case(TypeError, "prefix must be an integer ... got True", prefix=True),
        case(ValueError, "prefix must be from 0 to the 5 tokens of q ... got 6", prefix=6),
        case(ValueError, "prefix must be from 0 to the 5 tokens of q ... got -1", prefix=-1),
        case(ValueError, "cos must have shape (N - prefix, D) = (5, 16) ... got (4, 16)", prefix=0),
    ],
)
def test_qk_rope(error, text, bad):
    refused(qk_rope, error, text, QK_ROPE, bad)


NOT_IN_MEMORY = {
    "attention-q": (attention, attention_arguments(), "q"),
    "attention-mask": (attention, attention_arguments(mask=t(5, 7)), "mask"),
    "qk_rope-cos": (qk_rope, QK_ROPE, "cos"),
}


@pytest.mark.parametrize("name", NOT_IN_MEMORY)
def test_tensors_whose_values_do_not_lie_in_memory_as_they_are(name):
    refused_unless_in_memory(*NOT_IN_MEMORY[name])


META_CASES = {"attention-k": (attention, attention_arguments(), "k"), "qk_rope-sin": (qk_rope, QK_ROPE, "sin")}


@pytest.mark.interpreted_only
@pytest.mark.parametrize("name", META_CASES)
def test_tensors_on_different_devices(name):
    launcher, good, argument = META_CASES[name]
    text = f"{argument} must be on the device of ... cpu ... got meta"
    refused(launcher, ValueError, text, good, {argument: good[argument].to("meta")})
