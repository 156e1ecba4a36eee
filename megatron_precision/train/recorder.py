"""Responses that could not be graded: all in a file, the scorer's own failures on the console.

Where an iteration's time goes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_precision.rewards.grading import Grade


class FailedGrades:
    """Reports of a run's failed grades.

    A response that runs out of time or memory costs its own reward; that is what the limits are
    for, and the file tells of it. A scorer that raises is a mistake in it or in a right answer,
    and is said aloud, once an iteration.
    """

    def __init__(self, path: Path | None) -> None:
        """
        Args:
            path: the file, made with the first report; None on ranks that don't write.
        """
        self._path = path

    def sizes(self) -> dict[str, int]:
        """Bytes of the file so far, by its name."""
        if self._path is None:
            return {}
        return {self._path.name: self._path.stat().st_size if self._path.exists() else 0}

    def record(self, failures: Sequence[Grade]) -> None:
        """Add the reports of an iteration or an evaluation."""
        if self._path is None or not failures:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{grade.report}\n\n" for grade in failures)
        raised = [grade for grade in failures if grade.status == "raised"]
        if raised:
            print(
                f"the scorer raised for {len(raised)} responses, the first of them:\n"
                f"{raised[0].report}\nall of them: {self._path}",
                file=sys.stderr,
                flush=True,
            )


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
