"""Settings of all tests, and how two workers share them."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


# The words by which a test file is known to start ranks: such jobs take both cores, and two at once
# take more than twice as long as one after the other.
STARTS_RANKS = ("run_distributed", "real_jobs", "engine_world", "one_machine")
ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def scope_of(path: str) -> str:
    """Return `ranks` for a test file that starts ranks, and the path itself for any other."""
    text = (ROOT / path).read_text(encoding="utf-8")
    known = path.startswith(("tests/e2e/", "tests/cluster/", "tests/launch/test_local"))
    return "ranks" if known or any(word in text for word in STARTS_RANKS) else path


@pytest.hookimpl(optionalhook=True)  # a GPU host need not have the plugin
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give all tests that start ranks to one worker, and each other file to either, as a whole."""
    from xdist.scheduler import LoadScopeScheduling

    class OneWorkerStartsRanks(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid.partition("::")[0])

    return OneWorkerStartsRanks(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that start ranks first: they take longest."""
    items.sort(key=lambda item: scope_of(item.nodeid.partition("::")[0]) != "ranks")
