"""Settings of all tests, and how two workers share them."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import shared
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


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder that the workers of this run share; they inherit the variable.

    A shell starts a job in the background with Ctrl-C ignored, and every process that a test
    starts would inherit that; tests of Ctrl-C need its default.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        os.environ[shared.VARIABLE] = tempfile.mkdtemp(prefix="megatron-precision-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the shared folder."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(shared.VARIABLE), ignore_errors=True)


# What a test file imports if it starts ranks: such jobs take both cores, and two at once more than
# twice as long as one after the other.
STARTS_RANKS = ("run_distributed", "real_jobs", "engine_world", "one_machine")


@pytest.hookimpl(tryfirst=True)  # before the plugin that reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all jobs of several ranks to one worker, and each other file to either, as a whole."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            names = vars(getattr(item, "module", None) or object)
            path = item.location[0]
            ranks = path.startswith(("tests/e2e/", "tests/cluster/", "tests/launch/test_local"))
            ranks = ranks or any(name in names for name in STARTS_RANKS)
            item.add_marker(pytest.mark.xdist_group("ranks" if ranks else path))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] != "ranks")
