"""Ends a run early: when a rank hangs, when a signal asks for it, or when every step overflows.

`Watchdog` ends the job when a rank hangs, and names the phase and the ranks that are missing. The
main thread records its phase with two assignments. A second thread writes the phase to a small
file in the run's folder at every beat. If this rank exceeds a phase's time limit, that thread
reads the other ranks' files, reports which ranks are silent or behind, and ends the process; the
launcher then ends the others.

A signal handler could not do this: a rank in a collective runs no Python in its main thread. A
rank that is stopped, or stuck with the interpreter's lock held, cannot watch itself; its peers
name it. The ranks share files instead of a `TCPStore`, because a client waits without a limit for
a store whose process is stopped (seen with torch 2.13), and that process is one of the ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_precision.actor.optimizer import ActorOptimizer
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import LossScaleConfig

# A beat can be late on a busy machine; a rank that misses this many is silent.
BEAT_S = 2.0
SILENT_BEATS = 5
START, BETWEEN = "start", "other"
_RECORD_BYTES = 256


@dataclass(frozen=True)
class Post:
    """A rank's state, as it writes it for its peers.

    Attributes:
        beat: counts up for as long as its interpreter runs.
        entered: phases entered so far; all ranks enter the same phases in the same order.
        iteration, phase: the phase that its main thread is in.
    """

    beat: int
    entered: int
    iteration: int
    phase: str


class HungJobError(RuntimeError):
    """A phase took longer than its limit; the message names who is missing."""


class Watchdog:
    """Ends this rank's process if a phase exceeds its time limit.

    Args:
        limits: seconds allowed for each phase, by name; a phase without an entry, or with 0, has
            no limit.
        folder: for the ranks' files; shared by all ranks, and created if it does not exist.
        rank, world_size: this rank's number, and the number of ranks.
        end: called from the watching thread with a `HungJobError`; it should not return.
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        folder: Path,
        rank: int,
        world_size: int,
        end: Callable[[HungJobError], None],
    ) -> None:
        self._limits = limits
        self._folder = folder
        self._rank = rank
        self._world_size = world_size
        self._end = end
        folder.mkdir(parents=True, exist_ok=True)
        # Open for good and written in place: neither a full disk nor a folder that vanishes
        # under the run gets in its way.
        self._file = os.open(_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._main = threading.get_ident()
        self._post = Post(0, 0, 0, START)
        self._enter(0, START)
        self._beat = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """End the start-up phase; from here on, time in no phase is `other`."""
        self._enter(0, BETWEEN)

    @contextlib.contextmanager
    def phase(self, iteration: int, name: str) -> Iterator[None]:
        """Record that the main thread is in a phase while the block runs."""
        outer = self._post.phase
        self._enter(iteration, name)
        try:
            yield
        finally:
            self._enter(iteration, outer)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()
        os.close(self._file)

    def _enter(self, iteration: int, name: str) -> None:
        self._since = time.monotonic()
        self._post = Post(0, self._post.entered + 1, iteration, name)

    # ---- the watching thread -------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.wait(BEAT_S):
            post, since = self._post, self._since
            limit = self._limits.get(post.phase, 0.0)
            self._say(post)
            if not limit or time.monotonic() - since <= limit:
                continue
            before = self._read()
            for _ in range(SILENT_BEATS):
                self._closed.wait(BEAT_S)
                self._say(post)  # peers may be looking, too
            missing = missing_ranks(before, self._read(), self._rank)
            if self._since == since and not self._closed.is_set():
                self._end(HungJobError(self._message(post, limit, missing)))

    def _say(self, post: Post) -> None:
        self._beat += 1
        text = json.dumps({**asdict(post), "beat": self._beat})
        os.pwrite(self._file, text.ljust(_RECORD_BYTES).encode(), 0)

    def _read(self) -> list[Post | None]:
        posts: list[Post | None] = []
        for rank in range(self._world_size):
            try:
                posts.append(Post(**json.loads(_path(self._folder, rank).read_bytes())))
            except (FileNotFoundError, json.JSONDecodeError):  # none yet, or no longer
                posts.append(None)
        return posts

    def _message(self, post: Post, limit: float, missing: Sequence[str]) -> str:
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame else "  it has ended\n"
        return (
            f"{post.phase} of iteration {post.iteration} took longer than its {limit:g} s "
            f"(watchdog.{post.phase}_s)\n"
            + "".join(f"  {line}\n" for line in missing)
            + f"main thread of rank {self._rank}, which waited:\n{stack}"
        )


def missing_ranks(
    before: Sequence[Post | None], after: Sequence[Post | None], own: int
) -> list[str]:
    """Describe each rank that a hung rank may be waiting for, one line each.

    Args:
        before, after: all ranks' posts, read some beats apart; None if a rank wrote none.
        own: the rank that asks; the others are compared with it.
    """
    me = after[own] or before[own]
    lines = []
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        if rank == own:
            continue
        if new is None:
            lines.append(f"rank {rank}: posted nothing")
        elif old is not None and old.beat == new.beat:
            lines.append(
                f"rank {rank}: no sign of life; last in {new.phase} of iteration {new.iteration}"
            )
        elif me is not None and new.entered < me.entered:
            lines.append(f"rank {rank}: behind, in {new.phase} of iteration {new.iteration}")
    return lines or ["every rank lives and is in this phase: see their stacks in errors/"]


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that a signal asked for the run's end.

    The handler does nothing else. It also runs in the forked writers of a checkpoint: a scheduler
    may send the signal to every process, and torchrun forwards its own.
    """

    def __init__(self) -> None:
        self._number = 0

    def install(self) -> None:
        """Install the handlers; call it after the engine starts, which may install its own."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._number = number

    def agreed(self) -> str:
        """Return the name of a signal that reached any rank, or ""; every rank calls it."""
        number = torch.tensor([self._number])
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if number else ""


def give_up_where_hopeless(
    optimizer: ActorOptimizer, settings: LossScaleConfig, cause: str
) -> None:
    """End a run whose every step overflows at the smallest loss scale.

    Args:
        cause: the cause of the last overflow.

    Raises:
        UserError: with advice, on every rank.
    """
    if optimizer.hopeless_overflows < settings.hopeless_overflows:
        return
    scale = optimizer.loss_scale
    where = "with no scale" if scale is None else f"at the smallest loss scale, {scale.value:g}"
    raise UserError(
        Problem(
            what=f"{optimizer.hopeless_overflows} optimizer steps in a row overflowed {where}",
            where="loss_scale.min_scale, loss_scale.hopeless_overflows",
            got=f"cause of the last: {cause}",
            expected="a step that can be taken now and then",
            remedy=(
                "resume from a checkpoint before the weights grew, with a lower learning rate in a "
                "new run; look at precision/act_max_trainer (65504 is FP16's end) and "
                "loss/grad_norm; bf16 has fp32's range"
            ),
        )
    )
