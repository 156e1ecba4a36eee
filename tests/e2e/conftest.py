"""One prepared start for all of these tests, and the means to run and watch real jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import shared
from tests.e2e import real_jobs


def _dense_run() -> real_jobs.DenseRun:
    folder = shared.folder() / "dense"
    folder.mkdir()
    finished = real_jobs.launch(folder, "sanity.tiny_dense", "--out", "run", *real_jobs.settings())
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return real_jobs.DenseRun(folder, finished)


@pytest.fixture(scope="session")
def dense_run() -> real_jobs.DenseRun:
    """A finished `launch.py` run in a folder without a cache: it made its own start first."""
    return shared.once("dense run", _dense_run)


@pytest.fixture(scope="session")
def dense_start(dense_run: real_jobs.DenseRun) -> Path:
    """The start that `dense_run` made: a tiny dense model that is right about half of the time."""
    return dense_run.start
