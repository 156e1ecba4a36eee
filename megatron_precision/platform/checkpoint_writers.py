"""Makes Megatron's checkpoint writers return results by a pipe, not a server process."""

from __future__ import annotations

import functools
import multiprocessing
import queue
import threading
from collections.abc import Callable
from typing import Any

from megatron_precision.platform.patching import Patch, apply

# A writer has ended before its result is asked for; what is waited for are threads of this process.
_PATIENCE_S = 60.0


class Results:
    """A queue that writers inherit by being forked, as Megatron uses one.

    A writer ends when all that it has put is in the pipe, which holds 64 KiB, and Megatron asks for
    a result when the writer has ended: a thread takes results out of the pipe as they come.
    """

    def __init__(self) -> None:
        self._pipe: Any = multiprocessing.get_context("fork").Queue()
        self._received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._receive, name="checkpoint results", daemon=True).start()

    def _receive(self) -> None:
        while True:
            try:
                result = self._pipe.get()
            except (EOFError, OSError):
                return  # closed as this process ends; earlier, `get_nowait` finds nothing
            self._received.put(result)

    def put(self, result: Any) -> None:
        """Queue a result; a thread sends it."""
        self._pipe.put(result)

    def get_nowait(self) -> Any:
        """Take the next result, which has been put.

        Raises:
            queue.Empty: where none comes.
        """
        return self._received.get(timeout=_PATIENCE_S)


def _one_queue(_original: Callable[[], Any]) -> Callable[[], Any]:
    return functools.cache(Results)


PATCHES = (
    Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "_get_write_results_queue",
        _one_queue,
        reason=(
            "a multiprocessing Manager holds the queue: a spawned process a rank, which imports "
            "torch (seconds, hundreds of MiB), lives as long as the rank, and dies of the signal "
            "that Slurm sends to all processes of a step, and the checkpoint with it; all writers "
            "are forked, and inherit a pipe"
        ),
        upstream="megatron-core 0.16.1",
    ),
)


@functools.cache
def use_pipes() -> None:
    """Apply the patch, once.

    Raises:
        UpstreamChangedError: where the name has gone.
    """
    apply(PATCHES)
