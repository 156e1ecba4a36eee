"""When an iteration is worth keeping: its mismatch or its gradient norm jumps.

    a value jumps where  value > factor × median(the last `WINDOW` values before it)

and where it is not finite. Nothing jumps before `MIN_HISTORY` values are known, but for one that
is not finite. A value that has jumped enters the history like any other, so that a new level is
a jump for half a window and no longer; one that is not finite does not. A median of zero gives no
scale, and nothing jumps above it. No torch here.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 20
MIN_HISTORY = 4


class JumpWatch:
    """The running median of one quantity."""

    def __init__(self, name: str, factor: float) -> None:
        """
        Args:
            name: of the quantity, for the reason that a jump is given.
            factor: how many medians are a jump, > 1; 0 for never.
        """
        self._name = name
        self._factor = factor
        self._history: deque[float] = deque(maxlen=WINDOW)

    def see(self, value: float) -> str:
        """Take the next value.

        Returns:
            Why it jumps, or "" where it does not.
        """
        if not self._factor:
            return ""
        if not math.isfinite(value):
            return f"{self._name} is {value}"
        known = len(self._history) >= MIN_HISTORY
        median = statistics.median(self._history) if known else 0.0
        self._history.append(value)
        if not median or value <= self._factor * median:
            return ""
        return f"{self._name} {value:.3g} is above {self._factor:g} × its median {median:.3g}"

    def state(self) -> list[float]:
        """What `restore` needs to go on from here."""
        return list(self._history)

    def restore(self, state: list[float]) -> None:
        """Go on where `state` was taken."""
        self._history = deque(state, maxlen=WINDOW)
