"""nemo-run's experiment, quiet, with a home that the caller chooses; its import takes seconds."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

# Read before the first job gives nemo-run a home of its own.
HOME_IS_CHOSEN = "NEMORUN_HOME" in os.environ


def load(home: Path) -> Any:
    """The module `nemo_run`, which keeps its files in `home` unless NEMORUN_HOME names another.

    nemo-run reads that variable as it is imported.
    """
    os.environ.setdefault("NEMORUN_HOME", str(home.resolve()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nemo_run
        from nemo_run.core.frontend.console.api import CONSOLE
    CONSOLE.quiet = True  # what it says of launchers is no news to the user
    return nemo_run


def open_experiment(nemo_run: Any, title: str, executor: Any, home: Path) -> Any:
    """An experiment that prints nothing of its own."""
    return nemo_run.Experiment(
        title,
        executor=executor,
        log_level="ERROR",
        base_dir=os.environ["NEMORUN_HOME"] if HOME_IS_CHOSEN else str(home.resolve()),
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
    )
