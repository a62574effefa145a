"""Decides, before triton is imported by anyone, how kernels run in the tests, and says so in the header.

It also fails a test whose launches the sanitizer could not check for races: those were executed and compared, but a
green run would claim more than was done.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.interpreter import remember_builtins
from tests.rung import HEADER, RUNG

MARKERS = (
    "slow: takes long, or builds and installs; not in the default run (`pytest -m slow`)",
    "sanitize: numerical test that is also run under `python -m ttsem.sanitize pytest -m sanitize`",
    "interpreted_only: needs Triton's interpreter; skipped on a GPU and under the sanitizer",
    "compiled: compiles kernels with Triton's compiler, in a child process without TRITON_INTERPRET",
    "gpu: needs an NVIDIA GPU; skipped with a reason where there is none",
)


def pytest_configure(config: pytest.Config) -> None:
    # How PyTorch splits a sum depends on its threads, and with it the references' rounding: one thread repeats.
    torch.set_num_threads(1)
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if RUNG == "interpreted" and importlib.util.find_spec("triton") is not None:
        remember_builtins()
    if RUNG == "sanitized":
        # Without it the sanitizer refuses every launch that uses the hardware's tanh.
        from vit_bench.sanitizer import teach_assembly, teach_gluon

        teach_assembly()
        teach_gluon()


def pytest_report_header() -> str:
    return HEADER


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreted_only = pytest.mark.skip(reason=f"needs Triton's interpreter; kernels are {RUNG} here")
    gpu = pytest.mark.skip(reason=f"needs an NVIDIA GPU; kernels are {RUNG} here")
    for item in items:
        if RUNG != "interpreted" and item.get_closest_marker("interpreted_only"):
            item.add_marker(interpreted_only)
        if RUNG != "executed" and item.get_closest_marker("gpu"):
            item.add_marker(gpu)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Layers that a test makes without a seed of its own draw the same weights in every run, others in every test."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


def _sanitizer_session(config: pytest.Config) -> Any:
    """The session of ttsem, held by the plugin it registers; `races_unchecked` counts launches over its budget."""
    for plugin in config.pluginmanager.get_plugins():
        session = getattr(plugin, "state", None)
        if hasattr(session, "races_unchecked"):
            return session
    raise pytest.UsageError(
        "this ttsem has no count of launches that were not checked for races (Session.races_unchecked), so a run under "
        "it proves less than these tests claim; they are written for ttsem 0.1.0."
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if RUNG != "sanitized":
        return (yield)
    session = _sanitizer_session(item.config)
    before = session.races_unchecked
    result = yield
    unchecked = session.races_unchecked - before
    if unchecked:
        pytest.fail(
            f"{unchecked} launch(es) of this test were too large for the sanitizer's race check: use smaller shapes",
            pytrace=False,
        )
    return result
