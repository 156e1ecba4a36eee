"""Running a job of this project through nemo-run: `launch.py`, `make sanity` and their like.

A job is `torchrun -m megatron_precision COMMAND --config FILE`, on this machine (`local.py`), on a
Slurm cluster (`slurm.py`) or by another of nemo-run's executors (`elsewhere.py`). `command.py` is
`launch.py`; its options are read and checked by `options.py`, with a site's defaults (`site.py`).

nemo-run takes seconds to import, so it is imported when a job starts and not before.
"""

from __future__ import annotations

from megatron_precision.launch.jobs import (
    CHECKOUT,
    Job,
    environment,
    prepare_job,
    torchrun_line,
    train_job,
)
from megatron_precision.launch.local import elapsed, ensure_start, exclusive, run_job

__all__ = [
    "CHECKOUT",
    "Job",
    "elapsed",
    "ensure_start",
    "environment",
    "exclusive",
    "prepare_job",
    "run_job",
    "torchrun_line",
    "train_job",
]
