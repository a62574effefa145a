"""Position embeddings for image sizes other than the one they were trained at: interpolation and a cache."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .derived import PLAIN, lasting, transformed

__all__ = ["PositionCache", "resample_position", "square_grid"]

METHODS = ("bicubic", "bilinear")


def square_grid(rows: int) -> tuple[int, int] | None:
    """(side, side) of a square grid with that many cells, None if there is none."""
    side = math.isqrt(max(rows, 0))
    return (side, side) if side > 0 and side * side == rows else None


def resample_position(
    position: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int] | None = None,
    *,
    num_prefix: int = 0,
    method: str = "bicubic",
) -> Tensor:
    """Position embeddings for a grid of new_grid patches, made from those for old_grid (ViT paper, section 3.2).

    position: [R + Gh * Gw, D] or [1, R + Gh * Gw, D], rows in row-major order of the grid after R = num_prefix rows for
        class and register tokens, which are kept as they are.
    new_grid, old_grid: (rows, columns) of patches; old_grid is taken as square if left out.
    method: "bicubic" with antialiasing, cell centres aligned (timm's resample_abs_pos_embed), or "bilinear" with corner
        cells aligned (scipy.ndimage.zoom(order=1), which Google's original code uses).

    Returns a tensor of the same rank and dtype with R + new rows * new columns rows; `position` itself if the grid is
    the same. Computes in float32, in float64 if position is. Raises ValueError or TypeError naming the argument.
    """
    if not isinstance(position, Tensor):
        raise TypeError(f"resample_position: position must be a torch.Tensor, got {type(position).__name__}")
    if not _is_int(num_prefix):
        raise TypeError(f"resample_position: num_prefix must be an int, got {num_prefix!r}")
    _check_grid("new_grid", new_grid)
    if old_grid is not None:
        _check_grid("old_grid", old_grid)
    if method not in METHODS:
        raise ValueError(f"resample_position: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if position.dim() not in (2, 3) or (position.dim() == 3 and position.shape[0] != 1):
        raise ValueError(f"resample_position: position must be [rows, D] or [1, rows, D], got {list(position.shape)}")
    if not position.is_floating_point():
        raise ValueError(f"resample_position: position must be floating point, got {position.dtype}")
    rows, width = position.shape[-2:]
    if not 0 <= num_prefix <= rows:
        raise ValueError(
            f"resample_position: num_prefix must be between 0 and the {rows} rows of position, got {num_prefix}"
        )
    if old_grid is None:
        old_grid = square_grid(rows - num_prefix)
        if old_grid is None:
            raise ValueError(
                f"resample_position: old_grid must be given, for {rows - num_prefix} rows after {num_prefix} prefix "
                "rows are not those of a square grid"
            )
    for name, grid in (("new_grid", new_grid), ("old_grid", old_grid)):
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"resample_position: {name} must be two positive ints, got {tuple(grid)}")
    if old_grid[0] * old_grid[1] != rows - num_prefix:
        raise ValueError(
            f"resample_position: old_grid {tuple(old_grid)} has {old_grid[0] * old_grid[1]} cells, but position has "
            f"{rows - num_prefix} rows after {num_prefix} prefix rows"
        )
    if tuple(new_grid) == tuple(old_grid):
        return position

    table = position.reshape(rows, width)
    prefix, cells = table[:num_prefix], table[num_prefix:]
    working = cells if cells.dtype == torch.float64 else cells.float()
    image = working.reshape(1, *old_grid, width).permute(0, 3, 1, 2)
    if method == "bicubic":
        image = F.interpolate(image, size=tuple(new_grid), mode="bicubic", align_corners=False, antialias=True)
    else:
        image = F.interpolate(image, size=tuple(new_grid), mode="bilinear", align_corners=True)
    cells = image.permute(0, 2, 3, 1).reshape(-1, width).to(position.dtype)
    return torch.cat([prefix, cells]).reshape(*position.shape[:-2], -1, width)


def _is_int(value: Any) -> bool:
    # In traced graphs sizes may be symbols.
    return isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)


def _check_grid(name: str, grid: Any) -> None:
    if not isinstance(grid, (tuple, list)) or not all(map(_is_int, grid)):
        raise TypeError(f"resample_position: {name} must be two positive ints, got {grid!r}")


class PositionCache:
    """Interpolated position embeddings by grid, rebuilt when the embeddings they came from change.

    A change is seen by address and by autograd's version counter, so every ordinary way of writing a parameter counts
    (optimizers, load_state_dict, in-place operations, a new Parameter, .to()). Writing through `.data` bypasses the
    counter: call clear() after that. Threads and streams may share it. Not part of any state_dict, and left out of
    copies and pickles.
    """

    def __init__(self, capacity: int = 32) -> None:
        self.capacity = capacity
        self._source: Tensor | None = None
        self._state: tuple = ()
        self._tables: OrderedDict[tuple[tuple[int, int], str], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._source, self._state = None, ()
        self._tables.clear()

    def get(
        self,
        position: Tensor,
        new_grid: tuple[int, int],
        old_grid: tuple[int, int],
        *,
        num_prefix: int,
        method: str,
    ) -> Tensor:
        """resample_position(...), from the cache where that is right.

        It is not where a gradient has to flow, while PyTorch traces a graph or torch.func transforms a function, for
        tensors that are no plain ones (fake or inference tensors have no address or version counter to ask for), and
        while a CUDA graph is captured, as the table is there only once the graph runs: those are computed anew.
        """
        _check_grid("new_grid", new_grid)
        if tuple(new_grid) == tuple(old_grid):
            return position
        plain = type(position) in PLAIN and not transformed()
        needs_grad = torch.is_grad_enabled() and position.requires_grad
        if needs_grad or not plain or torch.compiler.is_compiling() or position.is_inference():
            return resample_position(position, new_grid, old_grid, num_prefix=num_prefix, method=method)
        key = ((new_grid[0], new_grid[1]), method)
        # Asked for before the table is made: what is written meanwhile is then a change.
        state = _state(position)
        with self._lock:
            if state == self._state and (known := self._tables.get(key)) is not None:
                self._tables.move_to_end(key)
                return known
        on_gpu = _on_gpu(position)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return resample_position(position, new_grid, old_grid, num_prefix=num_prefix, method=method)
        # Outside inference mode, whose tensors could not take part in a later forward pass that needs gradients.
        with torch.inference_mode(False), torch.no_grad():
            table = resample_position(position, new_grid, old_grid, num_prefix=num_prefix, method=method)
            # The alias keeps the storage alive, so that no other tensor can come to lie at the remembered address.
            source = position.detach()
        if not lasting((source, table)):
            return table
        if on_gpu:
            # Whoever finds it may be on another stream.
            torch.cuda.current_stream(table.device).synchronize()
        with self._lock:
            if state != self._state:
                self._forget()
                self._source, self._state = source, state
            self._tables[key] = table
            if len(self._tables) > self.capacity:
                self._tables.popitem(last=False)
        return table

    def __getstate__(self) -> dict[str, int]:
        return {"capacity": self.capacity}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["capacity"])


def _state(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _on_gpu(tensor: Tensor) -> bool:
    # A sanitizer may call its tensors on the CPU "cuda": there is no stream to ask then.
    return tensor.device.type == "cuda" and torch.cuda.is_initialized()
