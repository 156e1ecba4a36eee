"""Where a run stands between two iterations, as `trainer.json` of a checkpoint holds it.

Tensors and what each rank has of its own are in `checkpoint/store.py`. Everything here is equal on
every rank, but for the sizes of files, which rank 0 writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_precision.config import RunConfig, fingerprint, to_dict
from megatron_precision.platform import startup
from megatron_precision.train import start

VERSION = 1


@dataclass
class Counters:
    """What the loop counts.

    Attributes:
        iteration: the next one; as many are done.
        step: optimizer steps attempted so far.
        skipped: of these, without effect.
        calibrated: whether the loss scale has been.
        weight_version: of the engine's weights.
        elapsed_s: seconds that the run has taken, in earlier processes.
        evaluation: {"iteration", "accuracy"} of the last evaluation.
        best: the same of the best so far, of equal ones the first.
    """

    iteration: int = 0
    step: int = 0
    skipped: int = 0
    calibrated: bool = False
    weight_version: int = 0
    elapsed_s: float = 0.0
    evaluation: dict[str, float] | None = None
    best: dict[str, float] | None = None

    def evaluated(self, iteration: int, accuracy: float) -> None:
        """Take an evaluation's result."""
        self.evaluation = {"iteration": iteration, "accuracy": accuracy}
        if self.best is None or accuracy > self.best["accuracy"]:
            self.best = self.evaluation


def counters(state: dict[str, Any]) -> Counters:
    """The counters of a checkpoint."""
    return Counters(**{name: state[name] for name in Counters.__dataclass_fields__})


def describe(config: RunConfig) -> dict[str, Any]:
    """Which run it is."""
    return {
        "version": VERSION,
        "config": to_dict(config),
        "fingerprint": fingerprint(to_dict(config)),
        "start_fingerprint": start.start_fingerprint(config),
        "versions": startup.versions(),
    }
