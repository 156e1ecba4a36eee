"""Where an iteration's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseClock:
    """Adds up wall-clock seconds by phase; what no phase claims is `other`."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block under `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begin)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds under `name`."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self, name: str) -> float:
        """Seconds of one phase so far."""
        return self._seconds.get(name, 0.0)

    def metrics(self) -> dict[str, float]:
        """`time/<phase>_s` for each phase, `time/other_s`, and the whole as `time/iteration_s`."""
        whole = time.perf_counter() - self._begin
        named = {f"time/{name}_s": value for name, value in self._seconds.items()}
        return {
            **named,
            "time/other_s": whole - sum(self._seconds.values()),
            "time/iteration_s": whole,
        }
