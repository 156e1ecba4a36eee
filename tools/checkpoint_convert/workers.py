"""The parts of a conversion, in this process or in several, with the bytes they have read."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from typing import Any, Protocol, TypeVar

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
        Exception: the first that a task raised; tasks that have not begun are dropped.
    """
    if workers == 1 or len(tasks) == 1:
        return [task.run(progress) for task in tasks]
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    told = 0
    with ProcessPoolExecutor(
        min(workers, len(tasks)), context, initializer=_begin, initargs=(counter,)
    ) as pool:
        futures = [pool.submit(_run, task) for task in tasks]
        pending: set[Any] = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
            now = counter.value
            progress(now - told)
            told = now
            if any(future.exception() is not None for future in done):
                pool.shutdown(wait=True, cancel_futures=True)
                break
        failed = [f for f in futures if f.done() and not f.cancelled() and f.exception()]
        if failed:
            raise failed[0].exception()  # type: ignore[misc]
        return [future.result() for future in futures]


def _begin(counter: Any) -> None:
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
