"""Ctrl-C and SIGTERM: one exception for both, and blocks that neither cuts."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

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
