"""The tolerance rule: how wrong a kernel may be, measured against how wrong PyTorch itself is.

For one result, `truth` is the reference in float64 and `eager` the same reference in the model's dtype, which rounds
where eager PyTorch rounds. Then, with d = dtype of the result,

    1.  for every element   |ours - truth|       <=  2 max|eager - truth|       + 2 ulp_d(element)
    2.  for every row       ||ours - truth||_row <=  2 worst row of eager       + 2 eps_d            (relative L2 norms)
    3.  both again with the columns that dwarf the others (over 8 times the median column) scaled down to the median.

Why 2x: a kernel rounds elsewhere than eager (it keeps fp32 where eager stores 16 bits, and rounds folded weights where
eager rounds normalised activations). Those errors have the same size, but not the same sign, and the largest of
thousands of them scatters; a defect (a wrong mask, a lost parameter, a lost term) is far larger.

Why + 2 ulp: eager may be exact where there is hardly anything to compute (one key, one column), and the kernel still
may round once or twice more. One ulp_d(t) is the distance between neighbours of the dtype at |t|, the spacing that the
last rounding works with. The magnitude is that of the element, but at least the root mean square of its row: an element
that cancelled to nearly zero carries the rounding of the terms it was summed from, which have the size of its row.
An L2 norm of errors of at most 2 ulp(t) is at most 2 eps ||t||, since ulp(t) <= eps |t|; hence 2 eps in the second
line.

Why 3: the residual stream of real models has channels a hundred times the others. One ulp of such a channel in bfloat16
is as large as the other channels themselves, so in lines 1 and 2 it would hide anything that happens to them. Dividing
the columns by how far they exceed the median column is the same change for ours, eager and truth, and puts all on one
footing.

A value that is not finite passes only where truth has the same one (the same infinity, or NaN for NaN).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FACTOR = 2.0
ULPS = 2.0
DOMINANT = 8.0


@dataclass(frozen=True)
class Errors:
    """Figures of one comparison: the worst of each criterion, and what was allowed there."""

    largest: float
    largest_eager: float
    row: float
    row_allowed: float
    row_eager: float

    def __str__(self) -> str:
        return (
            f"largest absolute error {self.largest:.3e} (eager {self.largest_eager:.3e}), worst row's relative L2 "
            f"error {self.row:.3e} (eager {self.row_eager:.3e}, allowed {self.row_allowed:.3e})"
        )


def _rows(x: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """As float64 rows on this device; a scalar or vector is one row."""
    x = x.detach().to(device, torch.float64)
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1)


def ulp(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbouring values of dtype at these magnitudes (float64), not below that of its subnormals."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(
        magnitude.double().abs().clamp_min(info.tiny)
    )  # magnitude = mantissa 2^exponent, mantissa < 1
    return torch.ldexp(torch.full_like(magnitude, info.eps, dtype=torch.float64), exponent - 1)


def _unit(truth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One ulp at the magnitude of each element, or of its row's root mean square where that is larger."""
    return ulp(torch.maximum(truth.abs(), truth.square().mean(1, keepdim=True).sqrt()), dtype)


def _row_norms(error: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Relative L2 error of each row. A row of zeros has no scale of its own: there the error counts as it is."""
    size = torch.linalg.vector_norm(truth, dim=1)
    return torch.linalg.vector_norm(error, dim=1) / torch.where(size > 0, size, torch.ones_like(size))


def _non_finite(ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, name: str) -> torch.Tensor:
    """Checks the values that are not finite and returns where all are: the places left to compare."""
    finite = torch.isfinite(truth)
    same = torch.isfinite(ours) & finite | ((ours == truth) | (torch.isnan(ours) & torch.isnan(truth))) & ~finite
    if not bool(same.all()):
        row, column = (int(i) for i in torch.nonzero(~same)[0])
        raise AssertionError(
            f"{name}: {int((~same).sum())} value(s) that are not finite, or should not be; the first at row {row}, "
            f"column {column}: {ours[row, column]:g} where the truth is {truth[row, column]:g}"
        )
    if not bool(torch.isfinite(eager[finite]).all()):
        raise AssertionError(f"{name}: eager itself is not finite where the truth is: these inputs prove nothing")
    return finite


def _compare(
    ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, unit: torch.Tensor, eps: float, factor: float
) -> tuple[Errors, str]:
    error, eager_error = (ours - truth).abs(), (eager - truth).abs()
    allowed = factor * eager_error.max() + ULPS * unit
    rows, eager_rows = _row_norms(error, truth), _row_norms(eager_error, truth)
    row_allowed = factor * float(eager_rows.max()) + ULPS * eps
    errors = Errors(
        float(error.max()), float(eager_error.max()), float(rows.max()), row_allowed, float(eager_rows.max())
    )
    verdict = ""
    excess = error - allowed
    if bool((excess > 0).any()):
        worst = int(excess.argmax())
        row, column = divmod(worst, truth.shape[1])
        verdict = (
            f"element error {error[row, column]:.3e} at row {row}, column {column} (ours {ours[row, column]:.6g}, "
            f"truth {truth[row, column]:.6g}) is over the allowed {allowed[row, column]:.3e}"
        )
    if errors.row > row_allowed:
        verdict += "; " if verdict else ""
        verdict += (
            f"relative L2 error {errors.row:.3e} of row {int(rows.argmax())} is over the allowed {row_allowed:.3e}"
        )
    return errors, verdict


def check(
    ours: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    *,
    name: str = "result",
    on: str | torch.device = "cpu",
    factor: float = FACTOR,
) -> Errors:
    """Raises AssertionError with the figures unless `ours` obeys the rule above; returns those of lines 1 and 2.

    The last axis is the row's; all three have one shape. The dtype of `ours` decides what an ulp is, truth is float64.
    on: the device that compares. factor: in place of the 2 of lines 1 and 2, for results that are not ours.
    """
    if truth.dtype != torch.float64:
        raise TypeError(f"truth must be float64; got {truth.dtype}")
    if not ours.shape == eager.shape == truth.shape:
        raise AssertionError(
            f"{name}: shapes differ: ours {tuple(ours.shape)}, eager {tuple(eager.shape)}, truth {tuple(truth.shape)}"
        )
    if ours.dtype != eager.dtype:
        raise AssertionError(f"{name}: ours is {ours.dtype}, eager is {eager.dtype}")
    dtype, eps = ours.dtype, torch.finfo(ours.dtype).eps
    ours, eager, truth = _rows(ours, on), _rows(eager, on), _rows(truth, on)
    if truth.numel() == 0:
        return Errors(0.0, 0.0, 0.0, 0.0, 0.0)
    finite = _non_finite(ours, eager, truth, name)
    ours, eager, truth = (torch.where(finite, x, torch.zeros_like(x)) for x in (ours, eager, truth))

    errors, verdict = _compare(ours, eager, truth, _unit(truth, dtype), eps, factor)

    columns = truth.square().mean(0).sqrt()
    typical = columns.median()
    if not verdict and bool(typical > 0):
        excess = torch.where(columns > DOMINANT * typical, columns / typical, torch.ones_like(columns))
        unit = torch.maximum(_unit(truth / excess, dtype), ulp(truth, dtype) / excess)
        balanced, verdict = _compare(ours / excess, eager / excess, truth / excess, unit, eps, factor)
        verdict = f"with dominant columns scaled down, {balanced}: {verdict}" if verdict else ""
    if verdict:
        raise AssertionError(f"{name} ({str(dtype).removeprefix('torch.')}): {errors}: {verdict}")
    return errors
