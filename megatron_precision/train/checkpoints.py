"""A run's checkpoints: written where they are due, and found again by a resume.

Where a run stands between two iterations, as `trainer.json` of a checkpoint holds it.

Tensors and what each rank has of its own are in `checkpoint/store.py`. Everything here is equal on
every rank, but for the sizes of files, which rank 0 writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_precision.checkpoint import compatible, folders, store
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import RunConfig, fingerprint, to_dict
from megatron_precision.data import start
from megatron_precision.platform import startup
from megatron_precision.precision.dtypes import torch_dtype
from megatron_precision.train.recorder import PhaseClock
from megatron_precision.train.session import Session


@dataclass(frozen=True)
class Standing:
    """Where a run stands between two iterations.

    Attributes:
        state: what `trainer.json` will hold.
        of_rank: what this rank has of its own.
    """

    state: dict[str, Any]
    of_rank: dict[str, Any]

    @property
    def iteration(self) -> int:
        """Iterations that are done."""
        return int(self.state["iteration"])


@dataclass(frozen=True)
class Found:
    """A checkpoint that a run resumes from.

    Attributes:
        damaged: a line for each newer one that cannot be used.
        not_identical: what keeps the rest from being bit for bit what it would have been.
    """

    folder: Path
    state: dict[str, Any]
    damaged: list[str] = field(default_factory=list)
    not_identical: list[str] = field(default_factory=list)

    def event(self, config: RunConfig) -> dict[str, Any]:
        """The `resume` event's fields."""
        changed = compatible.changes(config, self.state["config"])
        return {
            "checkpoint": self.folder.name,
            "damaged": self.damaged,
            "changed": {path: list(values) for path, values in changed.items()},
            "not_identical": self.not_identical,
            "versions": startup.versions(),
        }

    def lines(self) -> list[str]:
        """What the console is told."""
        done = self.state["iteration"]
        lines = [*self.damaged, f"resuming after {done} iterations, from {self.folder}"]
        if self.not_identical:
            reasons = "; ".join(self.not_identical)
            lines.append(f"from here on equal to rounding, not bit for bit: {reasons}")
        return lines


@dataclass
class _UnderWay:
    """A checkpoint that is being written.

    Attributes:
        held_up: seconds that training has waited for it.
    """

    standing: Standing
    writing: store.Writing
    since: PhaseClock
    held_up: PhaseClock


@dataclass(frozen=True)
class Written:
    """A checkpoint that has its name, and what it cost."""

    iteration: int
    cost: dict[str, float]


class Checkpoints:
    """Writes them; every rank calls every method."""

    def __init__(self, config: RunConfig, out: Path, session: Session) -> None:
        self._config = config
        self._out = out
        self._session = session
        self._under_way: _UnderWay | None = None
        self.last = -1

    def is_due(self, iteration: int) -> bool:
        """Whether one is written after so many iterations, if none has been."""
        every = self._config.checkpoint.every
        last = iteration == self._config.train.iterations
        return iteration not in (0, self.last) and (last or (every > 0 and iteration % every == 0))

    def begin(self, standing: Standing) -> None:
        """Begin to write one; none may be under way. `finished` tells of it."""
        assert self._under_way is None
        since, held_up = PhaseClock(), PhaseClock()
        with held_up.phase("checkpoint"):
            writing = store.Writing(
                self._session.actor,
                self._partial(standing),
                standing.of_rank,
                background=self._config.checkpoint.background,
            )
        self._under_way = _UnderWay(standing, writing, since, held_up)
        self.last = standing.iteration

    def finished(self, wait: bool) -> Written | None:
        """The checkpoint that was under way, if it is written now; verified, and under its name.

        Args:
            wait: for its writers.
        """
        found = self._under_way
        if found is None:
            return None
        with found.held_up.phase("checkpoint"):
            if not (wait or not self._config.checkpoint.background or found.writing.is_written()):
                return None
            found.writing.finish()
            size = self._seal(found.standing)
        self._under_way = None
        cost = {
            "time/checkpoint_s": found.held_up.seconds("checkpoint"),
            "time/checkpoint_written_s": found.since.metrics()["time/iteration_s"],
            "checkpoint/bytes": size,
        }
        return Written(found.standing.iteration, cost)

    def _seal(self, standing: Standing) -> int:
        """Add what is not a tensor, and give the folder its name; returns bytes, on rank 0."""
        partial, size = self._partial(standing), 0
        if dist.get_rank() == 0:
            text = json.dumps(standing.state, indent=1) + "\n"
            (partial / folders.STATE).write_text(text, encoding="utf-8")
        store.seal(partial, self._session.model_dir, torch_dtype(self._config.policy.params))
        if dist.get_rank() == 0:
            size = store.bytes_of(folders.finish(partial, self._config.checkpoint.keep))
        dist.barrier()
        return size

    def _partial(self, standing: Standing) -> Path:
        return folders.folder_of(self._out, standing.iteration).with_suffix(folders.PARTIAL)


def newest_whole(config: RunConfig, out: Path) -> Found | None:
    """The newest checkpoint whose files are as they were written; None where there is none.

    Damaged ones are put aside.

    Raises:
        UserError: where there are checkpoints and all are damaged, or of another run.
    """
    first = dist.get_rank() == 0
    if first:
        folders.remove_partial(out)
    listed = [folders.finished(out)]
    dist.broadcast_object_list(listed, 0)
    damaged: list[str] = []
    for folder in reversed(listed[0]):
        wrong = _damage(folder)
        if not wrong:
            return _usable(config, folder, damaged)
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        damaged.append(f"checkpoint {folder} is damaged ({wrong[0]}{more}): the one before is used")
        if first:
            folders.put_aside(folder)
        dist.barrier()
    if damaged:
        raise UserError(
            Problem(
                "no checkpoint of this run is whole", str(out / folders.CHECKPOINTS),
                "; ".join(damaged), "one whose files are as they were written",
                "restore them from a copy, or start over with --overwrite",
            )
        )  # fmt: skip
    return None


def _damage(folder: Path) -> list[str]:
    try:
        found = store.damage(folder)
        folders.read_state(folder)
    except UserError as unreadable:  # the same files on every rank
        return [f"{problem.where}: {problem.what}" for problem in unreadable.problems]
    return found


def _usable(config: RunConfig, folder: Path, damaged: list[str]) -> Found:
    state: Mapping[str, Any] = folders.read_state(folder)
    if wrong := compatible.state_problems(config, state, str(folder)):
        raise UserError(wrong)
    notes = compatible.not_identical(config, state, startup.versions())
    return Found(folder, dict(state), damaged, notes)


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
