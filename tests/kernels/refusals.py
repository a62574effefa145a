"""What the tests of refusals share: good arguments are accepted, one bad one is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ..rung import DEVICE


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


HALF, WRONG = torch.float16, torch.float64


def refused(
    launcher: Callable[..., Any], error: type[Exception], text: str, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    launcher(**good)
    with pytest.raises(error) as caught:
        launcher(**good | bad)
    assert type(caught.value) is error
    message = str(caught.value)
    for piece in text.split(" ... "):
        assert piece in message, f"{piece!r} is not in {message!r}"


def case(error: type[Exception], text: str, /, **bad: Any) -> Any:
    """One refusal: `bad` replaces good arguments, and every piece of `text` between " ... " must be in the message."""
    return pytest.param(error, text, bad, id=text)


def refused_unless_in_memory(launcher: Callable[..., Any], good: dict[str, Any], argument: str) -> None:
    """A view whose values PyTorch negates when they are read (in memory they have the other sign), and a sparse one."""
    lazy, sparse = torch._neg_view(good[argument]), good[argument].to_sparse()  # type: ignore[reportPrivateImportUsage]
    refused(launcher, ValueError, f"{argument} ... .resolve_neg()", good, {argument: lazy})
    text = f"{argument} must be dense ... got torch.sparse_coo ... .to_dense()"
    refused(launcher, ValueError, text, good, {argument: sparse})
