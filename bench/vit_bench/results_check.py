"""What the values of a file of results must be before anything is computed from them.

A file may have been edited, cut short or written by something else: what is wrong in it must be named when it is read,
and not show up later as a division by zero, or as a comparison in which nothing has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], bool]
_TOO_LARGE = 10**300


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _number(value: Any) -> bool:
    """Also infinity and NaN, which an error may be; no whole number that is too large to compute with."""
    if isinstance(value, bool):
        return False
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < _TOO_LARGE)


def _positive(value: Any) -> bool:
    return _number(value) and math.isfinite(value) and value > 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and _number(value)


def _known(value: Any) -> bool:
    return value is not None and _amount(value)


def _amount(value: Any) -> bool:
    return value is None or (_number(value) and math.isfinite(value) and value >= 0)


def _time(value: Any) -> bool:
    return value is None or _positive(value)


def _numbers(value: Any) -> bool:
    return _table(value) and all(_number(one) for one in value.values())


def _rates(value: Any) -> bool:
    return value is None or (_table(value) and all(_positive(one) for one in value.values()))


def _sizes(value: Any) -> bool:
    return value is not None and _rates(value)


_WORDS: dict[Check, str] = {
    _text: "a string",
    _table: "an object",
    _positive: "a positive number",
    _whole: "a whole number",
    _known: "a number from 0 on",
    _amount: "null or a number from 0 on",
    _time: "null or a positive number",
    _numbers: "an object of numbers",
    _rates: "null or an object of positive numbers",
    _sizes: "an object of positive numbers",
}
_SPREAD = {"median": _positive, "p20": _positive, "p80": _positive, "timings": _whole}
_RUN = {"started": _text, "command": _text, "environment": _table, "datasheet": _rates}
_ROW = {
    **dict.fromkeys(("suite", "case", "label", "contender", "device", "dtype", "source", "model", "reason"), _text),
    **dict.fromkeys(("run", "images"), _whole),
    **dict.fromkeys(("flops", "nbytes", "launches", "peak_bytes"), _amount),
    **dict.fromkeys(("modelled_s", "bound_s"), _time),
    "shape": _sizes,
    "errors": _numbers,
    **dict.fromkeys(("settings", "code", "state"), _table),
}
_KERNEL = {"seconds": _time, "modelled_s": _time, "bound_s": _time, "spilled_bytes": _amount, "tile": _table}
_KERNEL |= dict.fromkeys(("flops", "bytes"), _amount) | {"waves": _known}
_MOVED = {"activations": _known, "weight_bytes": _known}
_LAUNCH = {"launch": _text, "kernel": _text, "times": _whole}


def check_run(run: Any, where: str) -> None:
    """run: an element of "runs" as it stands in the file; where: its place there, for messages.

    Raises ValueError that names the value, what it is and what it must be. What is missing is not looked at.
    """
    _check(run, _RUN, where)
    if run.get("ceilings") is not None:
        _check(run["ceilings"], {"copy": _positive, "matmul": _sizes}, f"{where}.ceilings")


def check_row(row: Any, where: str) -> None:
    """The same for an element of "rows"."""
    _check(row, _ROW, where)
    for name, checks in (("seconds", _SPREAD), ("sustained", {"seconds": _positive, "clock": _positive})):
        if row.get(name) is not None:
            _check(row[name], checks, f"{where}.{name}")
    if row.get("code", {}).get("block"):
        _check_block(row["code"]["block"], f"{where}.code.block")
    kernels = row.get("code", {}).get("kernels", [])
    if not isinstance(kernels, list):
        raise ValueError(f"{where}.code.kernels must be a list; got {kernels!r}")
    for number, kernel in enumerate(kernels):
        place = f"{where}.code.kernels[{number}]"
        _check(kernel, _KERNEL, place)
        if row.get("suite") == "model":  # reports show these launch by launch
            _check({name: kernel.get(name) for name in _LAUNCH}, _LAUNCH, place)


def _check_block(block: Any, where: str) -> None:
    """What a block of a model moves, ours, eager's and what is quoted of others."""
    _check(block, {"quoted": _table}, where)
    moved = {f"{where}.{name}": block.get(name) for name in ("ours", "eager")}
    moved |= {f"{where}.quoted.{name}": one for name, one in block.get("quoted", {}).items()}
    for place, one in moved.items():
        _check(one, _MOVED, place)
        _check({"activations": one.get("activations")}, _MOVED, place)


def _check(values: Any, checks: dict[str, Check], where: str) -> None:
    if not _table(values):
        raise ValueError(f"{where} must be an object; got {values!r}")
    for name, check in checks.items():
        if name in values and not check(values[name]):
            raise ValueError(f"{where}.{name} must be {_WORDS[check]}; got {values[name]!r}")
