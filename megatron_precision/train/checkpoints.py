"""A run's checkpoints: when one is due, what it stores, and how a resume finds and loads one.

`checkpoint/store.py` writes the tensors. This file adds `trainer.json`: the counters, orders and
other small state of a run between two iterations. It is equal on every rank, except for the sizes
of files, which rank 0 writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_precision.actor.parallel import agree_any
from megatron_precision.checkpoint import compatible, folders, store
from megatron_precision.checkpoint.run_folder import go_back
from megatron_precision.config import user_files
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import RunConfig, fingerprint, to_dict
from megatron_precision.data import start
from megatron_precision.data.tasks import PromptOrder
from megatron_precision.platform import startup
from megatron_precision.precision.dtypes import torch_dtype
from megatron_precision.train.dumps import Dumper
from megatron_precision.train.recorder import Counters, PhaseClock, RangeRecord
from megatron_precision.train.session import Session


@dataclass(frozen=True)
class RunState:
    """The parts of a run, besides weights and optimizer moments, that a checkpoint stores.

    Attributes:
        orders: the orders of prompts, of the first round of an iteration and of further ones.
        ranges: the trainer's range since the last iteration event.
    """

    session: Session
    counters: Counters
    orders: tuple[PromptOrder, PromptOrder]
    dumper: Dumper
    ranges: RangeRecord

    def standing(self, described: dict[str, Any], elapsed_s: float, files: Any) -> Standing:
        """Read everything that a resume needs, between two iterations.

        Args:
            described: which run it is; see `describe`.
            elapsed_s: seconds that the run has taken.
            files: sizes of the run's growing files, in bytes.
        """
        optimizer = self.session.actor.optimizer
        now = {
            **asdict(self.counters),
            "elapsed_s": elapsed_s,
            "applied_steps": optimizer.applied_steps,
            "hopeless_overflows": optimizer.hopeless_overflows,
            "loss_scale": optimizer.loss_scale.state() if optimizer.loss_scale else None,
            "orders": [order.state() for order in self.orders],
            "dumps": self.dumper.state(),
        }
        of_rank = {
            "generators": store.capture(),
            "act_max": [self.ranges.act_max, self.session.engine.act_max],
        }
        return Standing({**now, **described, "files": files}, of_rank)

    def restore(self, state: Mapping[str, Any], of_rank: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state; weights and moments are loaded already.

        Args:
            of_rank: this rank's own state; empty where the job has another number of ranks.
        """
        for name in Counters.__dataclass_fields__:
            setattr(self.counters, name, state[name])
        optimizer = self.session.actor.optimizer
        optimizer.hopeless_overflows = state["hopeless_overflows"]
        if optimizer.loss_scale is not None:
            optimizer.loss_scale.restore(state["loss_scale"])
        for order, stored in zip(self.orders, state["orders"], strict=True):
            order.restore(stored)
        self.dumper.restore(state["dumps"])
        if of_rank:
            self.ranges.act_max, self.session.engine.act_max = of_rank["act_max"]
            store.restore(of_rank["generators"])


@dataclass(frozen=True)
class Standing:
    """A run's small state between two iterations.

    Attributes:
        state: the content of `trainer.json`.
        of_rank: this rank's own state: generators and ranges.
    """

    state: dict[str, Any]
    of_rank: dict[str, Any]

    @property
    def iteration(self) -> int:
        """The number of finished iterations."""
        return int(self.state["iteration"])


@dataclass(frozen=True)
class Found:
    """A checkpoint that a run resumes from.

    Attributes:
        damaged: a line for each newer checkpoint that cannot be used.
        not_identical: reasons why the rest of the run can differ from an unbroken one in rounding.
    """

    folder: Path
    state: dict[str, Any]
    damaged: list[str] = field(default_factory=list)
    not_identical: list[str] = field(default_factory=list)

    def event(self, config: RunConfig) -> dict[str, Any]:
        """Return the fields of the `resume` event."""
        changed = compatible.changes(config, self.state["config"])
        return {
            "checkpoint": self.folder.name,
            "damaged": self.damaged,
            "changed": {path: list(values) for path, values in changed.items()},
            "not_identical": self.not_identical,
            "versions": startup.versions(),
        }

    def lines(self) -> list[str]:
        """Return the lines for the console."""
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
        since: runs since its first byte.
        held_up: counts the seconds that training waits for it.
    """

    standing: Standing
    writing: store.Writing
    since: PhaseClock
    held_up: PhaseClock


@dataclass(frozen=True)
class Written:
    """A finished checkpoint and its cost, as metrics."""

    iteration: int
    cost: dict[str, float]


class Checkpoints:
    """Writes a run's checkpoints and finds them again; every rank calls every method.

    Attributes:
        last: iterations that were done at the last checkpoint; -1 before the first.
    """

    def __init__(self, config: RunConfig, out: Path, session: Session) -> None:
        self._config = config
        self._out = out
        self._session = session
        self._under_way: _UnderWay | None = None
        self._resumes = False
        self.last = -1

    def find(self, resume: bool) -> Found | None:
        """Return the newest usable checkpoint; None where there is none or `resume` is off.

        Raises:
            UserError: where all are damaged, or belong to another run.
        """
        # Where a job was restarted, its ranks may have seen the folder at different times.
        self._resumes = agree_any(resume)
        return newest_whole(self._config, self._out) if self._resumes else None

    def load(self, found: Found | None) -> Mapping[str, Any]:
        """Load the trainer's first weights, or the weights and moments of a checkpoint.

        Returns:
            This rank's own state; empty where there is none for it.
        """
        if found is None:
            self._session.load_start()
            return {}
        ranks = found.state["config"]["parallel"]["world_size"]
        same_ranks = ranks == self._config.parallel.world_size
        self.last = int(found.state["iteration"])
        return store.read(
            self._session.actor, found.folder, found.state["applied_steps"], same_ranks
        )

    def go_back_to(self, found: Found | None) -> None:
        """In a resume, cut the run's files to their size at the checkpoint, on rank 0."""
        if self._resumes and dist.get_rank() == 0:
            go_back(self._out, None if found is None else found.state)
            nothing = [f"no checkpoint in {self._out}: from the beginning"]
            for line in found.lines() if found else nothing:
                print(line, flush=True)

    def is_due(self, iteration: int) -> bool:
        """Say whether a checkpoint is due after `iteration` iterations and not yet written."""
        every = self._config.checkpoint.every
        last = iteration == self._config.train.iterations
        return iteration not in (0, self.last) and (last or (every > 0 and iteration % every == 0))

    def begin(self, standing: Standing) -> None:
        """Begin to write a checkpoint; `finished` must have returned the one before it."""
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
        """Verify and name the checkpoint that is being written, once its writers are done.

        Args:
            wait: wait for the writers.

        Returns:
            The checkpoint, or None where none is being written or its writers are not done.
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
        """Add the small state and give the folder its final name; returns its bytes, on rank 0."""
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
    """Find the newest checkpoint whose files are as they were written; None where there is none.

    Damaged ones are renamed, so that no later resume tries them.

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


def describe(config: RunConfig) -> dict[str, Any]:
    """Return what identifies a run, with hashes of the user's own files."""
    own = user_files.hashes(config)
    return {
        "version": compatible.VERSION,
        "config": to_dict(config),
        "fingerprint": fingerprint(to_dict(config)),
        "start_fingerprint": start.start_fingerprint(config),
        "versions": startup.versions(),
        **({"user_files": own} if own else {}),
    }
