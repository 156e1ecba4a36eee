"""Results that several tests need and that take long to make: once a test run, for all workers."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

Made = TypeVar("Made")
VARIABLE = "MEGATRON_PRECISION_TESTS_SHARED"


def folder() -> Path:
    """Return the folder of this test run that all of its workers share."""
    return Path(os.environ[VARIABLE])


def once(name: str, make: Callable[[], Made]) -> Made:
    """Return what `make` returns; the first worker that asks calls it, the others wait for it.

    Args:
        name: names the result in this test run.
        make: makes it; the result must pickle.
    """
    path = folder() / f"{name}.pickle"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_bytes(pickle.dumps(make()))
            partial.rename(path)
    found: Made = pickle.loads(path.read_bytes())
    return found
