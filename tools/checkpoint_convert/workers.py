"""Runs the parts of a conversion in one process or several, and counts the bytes that they read.

Within `stoppable`, Ctrl-C and SIGTERM raise `Stopped`; within `uninterrupted` they wait until it
ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Protocol, TypeVar

from megatron_precision.config.errors import Problem, UserError

STOPPING = (signal.SIGINT, signal.SIGTERM)
_held = False
_waiting: int | None = None


class Stopped(KeyboardInterrupt):
    """One of `STOPPING` arrived.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within, the first signal raises `Stopped`; later ones do not disturb the cleaning up.

    A signal that the caller ignores, as a shell does for its background jobs, stays ignored.
    """
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within, a signal waits for the end of the block; processes started begin with it blocked."""
    global _held, _waiting
    _held = True
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _held = False
        if _waiting is not None:
            number, _waiting = _waiting, None
            raise Stopped(number)


def _stop(number: int, _frame: FrameType | None) -> None:
    global _waiting
    for each in STOPPING:
        signal.signal(each, signal.SIG_IGN)
    if _held:  # another thread took the signal that the main one has blocked
        _waiting = number
        return
    raise Stopped(number)


Result = TypeVar("Result", covariant=True)
Progress = Callable[[int], None]
_POLL_S = 0.2
# In a worker: bytes read by all workers of the pool.
_read: Any = None


class Task(Protocol[Result]):
    """Something that pickles and can be done in any process."""

    def run(self, progress: Progress) -> Result:
        """Do it; `progress` is told the bytes of every block that was read."""
        ...


def run_tasks(tasks: Sequence[Task[Result]], workers: int, progress: Progress) -> list[Result]:
    """The results of all tasks, in their order.

    Args:
        workers: processes; with 1 the work is done here.

    Raises:
        UserError: where a process was killed from outside.
        Exception: the first that a task raised; the other processes are killed.
    """
    if workers == 1 or len(tasks) == 1:
        return [task.run(progress) for task in tasks]
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), context, initializer=_begin, initargs=(counter,)
    )
    try:
        # A terminal's Ctrl-C goes to the workers too: only this process is to answer it.
        with uninterrupted():
            futures = [pool.submit(_run, task) for task in tasks]
        processes = _started(others)
        told = 0
        pending: set[Any] = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
            now = counter.get_obj().value  # without its lock, which a killed worker may hold
            progress(now - told)
            told = now
            for future in done:
                future.result()
            # The pool looks at a process that it started last only once another has a result.
            if pending and not all(process.is_alive() for process in processes):
                raise BrokenProcessPool
        return [future.result() for future in futures]
    except BaseException as wrong:
        for process in _started(others):
            process.kill()
        if isinstance(wrong, BrokenProcessPool):
            raise UserError(
                Problem(
                    "a worker was killed", "--workers", "a process that ended without a word",
                    "processes that are left alone", "fewer workers, if memory ran out",
                )
            ) from None  # fmt: skip
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _started(others: Sequence[BaseProcess]) -> list[BaseProcess]:
    """The children that are not among `others`, which were there before."""
    return [child for child in multiprocessing.active_children() if child not in others]


def _begin(counter: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    import torch

    from megatron_precision.platform.process import die_with_parent

    global _read
    _read = counter
    die_with_parent()
    torch.set_num_threads(1)


def _run(task: Task[Result]) -> Result:
    return task.run(_add)


def _add(count: int) -> None:
    with _read.get_lock():
        _read.value += count
