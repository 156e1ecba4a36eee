"""Settings of all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.report.synthetic_runs import write_synthetic_run

# Time says nothing on a machine that is shared.
settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared machine")


@pytest.fixture
def synthetic_run() -> Callable[..., Path]:
    """Writes the folder of a finished run with made-up metrics."""
    return write_synthetic_run
