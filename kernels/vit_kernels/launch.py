"""Where a launch happens: is this device usable, and which device must be current while launching."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from .device import UnsupportedDeviceError, device_of, interpreting

__all__ = ["accepts", "interpreting", "launching_on"]


def accepts(device: torch.device | str) -> bool:
    """Whether the kernels can run on tensors of this device, here and now."""
    try:
        device_of(torch.empty(0, device=device))
    except UnsupportedDeviceError:
        return False
    return True


def launching_on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's own GPU the current one: Triton launches on the current device, whatever its arguments say."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
