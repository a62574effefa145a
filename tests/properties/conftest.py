"""Profiles of the property tests.

ci         the default: a few examples of each property, the same ones in every run. A failing one is printed as it is:
           interpreted kernels are slow, and looking for a simpler one takes a minute.
sanitized  the default under ttsem, which compiles every example anew: four of each property marked `sanitize`.
nightly    `pytest tests/properties --hypothesis-profile nightly`: 500 random examples of each property, and a failing
           one is simplified, printed and kept in `.hypothesis/` to be tried first the next time.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings

from ..rung import RUNG

# Interpreted kernels take as long as they take; how long an example ran says nothing about it.
PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

REPEATED = {"derandomize": True, "database": None, "phases": [Phase.explicit, Phase.generate]}

settings.register_profile("ci", max_examples=10, **REPEATED, **PATIENT)
settings.register_profile("sanitized", max_examples=4, **REPEATED, **PATIENT)
settings.register_profile("nightly", max_examples=500, print_blob=True, **PATIENT)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("sanitized" if RUNG == "sanitized" else "ci")
