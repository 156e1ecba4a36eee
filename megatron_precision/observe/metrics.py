"""metrics.jsonl: the one place where a run says what it measured.

One JSON object a line, flushed as it is written, so that a killed run leaves a readable file.
Console, Weights & Biases, TensorBoard and the report are handed these same events. The names
are listed in docs/architecture.md. This module imports neither torch nor an engine.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron_precision.config.errors import Problem, UserError

Value = float | int | str | list[float] | dict[str, Any]

EVENTS = ("run", "resume", "eval", "step", "iteration", "checkpoint", "end")
AREAS = (
    "checkpoint",
    "eval",
    "loss",
    "memory",
    "mismatch",
    "precision",
    "response",
    "reward",
    "sync",
    "throughput",
    "time",
)
# Fields that describe a run and are no metrics; every other name is `area/name`.
PLAIN_FIELDS: dict[str, frozenset[str]] = {
    "run": frozenset(
        {
            "config",
            "fingerprint",
            "versions",
            "platform",
            "dtypes",
            "start_fingerprint",
            "prompts",
            "rank_count",
        }
    ),
    "resume": frozenset({"checkpoint", "damaged", "changed", "not_identical", "versions"}),
    "end": frozenset({"status", "error"}),
}
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Sink(Protocol):
    """Shows the events of a run."""

    def event(self, event: dict[str, Any]) -> None:
        """Take one event, as `MetricsWriter.write` returns it."""

    def close(self) -> None:
        """Release the sink's resources; safe to call twice."""


class TruncatedMetricsWarning(UserWarning):
    """The last line of a metrics file is cut: its writer was killed while writing."""


@dataclass(frozen=True)
class MetricsFile:
    """The content of a metrics file.

    Attributes:
        events: every whole event, oldest first, non-finite metrics as floats again.
        truncated_tail: the cut last line, or "" where the file ends well.
    """

    events: list[dict[str, Any]]
    truncated_tail: str


class MetricsWriter:
    """Appends events to a metrics file and passes them to the sinks.

    A file that a killed run left with half a last line is continued after its last whole event;
    the half line is dropped.

    Args:
        path: the metrics.jsonl to append to; made if missing, with its folders.
        sinks: who else sees each event, in this order, after it is in the file.
        elapsed_s: seconds that the run has taken in earlier processes.

    Raises:
        UserError: where the file exists and is damaged elsewhere than in its last line.
    """

    def __init__(self, path: Path, sinks: Iterable[Sink] = (), elapsed_s: float = 0.0) -> None:
        self.path = path
        self._sinks = tuple(sinks)
        self._begin_s = time.monotonic() - elapsed_s
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_truncated_tail(path)
        self._file = path.open("a", encoding="utf-8")

    def write(
        self, event: str, *, iteration: int, step: int, values: Mapping[str, Value]
    ) -> dict[str, Any]:
        """Write one event as one line, then hand it to the sinks.

        Args:
            event: one of `EVENTS`.
            iteration: 0-based; an iteration is rollout and training.
            step: optimizer steps attempted so far, skipped ones included.
            values: metrics by `area/name`: numbers, strings, or lists of numbers; the `run` and
                `end` events also take the plain fields that docs/architecture.md lists.

        Returns:
            The event with `event`, `time_s` (seconds since the run began), `iteration`
            and `step` first; non-finite numbers are still floats here and strings in the file.

        Raises:
            ValueError: for an unknown event, or names or values that the contract does not
                know; all of them are listed, and nothing is written.
        """
        problems = _problems(event, values)
        if problems:
            raise ValueError(
                f"metrics event {event!r} at iteration {iteration}, step {step}: "
                + "; ".join(problems)
            )
        stamped: dict[str, Any] = {
            "event": event,
            "time_s": round(time.monotonic() - self._begin_s, 3),
            "iteration": iteration,
            "step": step,
            **{name: int(v) if isinstance(v, bool) else v for name, v in values.items()},
        }
        self._file.write(json.dumps(finite(stamped), allow_nan=False) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.event(stamped)
        return stamped

    @property
    def size(self) -> int:
        """The size of the file so far, in bytes."""
        return self.path.stat().st_size

    def close(self) -> None:
        """Close the file and every sink."""
        with ExitStack() as closing:  # every sink is closed, whichever fails
            for sink in reversed(self._sinks):
                closing.callback(sink.close)
            self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read every whole event of a metrics file.

    A cut last line, as a killed run leaves it, is left out and reported by a
    `TruncatedMetricsWarning`. The strings "nan", "inf" and "-inf" in metrics (names with a
    slash) become floats again.

    Raises:
        UserError: for damage elsewhere, with the file and the line number; a ValueError.
        FileNotFoundError: where there is no such file.
    """
    content = parse_metrics(path)
    if content.truncated_tail:
        warnings.warn(
            f"{path}: the last line is cut after {len(content.truncated_tail)} characters and "
            f"was left out; {len(content.events)} events were read",
            TruncatedMetricsWarning,
            stacklevel=2,
        )
    return content.events


def parse_metrics(path: Path) -> MetricsFile:
    """Read a metrics file and hand back the cut last line, if any, instead of warning of it."""
    lines = path.read_text(encoding="utf-8").split("\n")
    tail = lines.pop()  # what follows the last newline; empty where the file ends well
    events = [_parse_line(path, number, line) for number, line in enumerate(lines, start=1)]
    if tail and _is_event(tail):
        return MetricsFile([*events, _parse_line(path, len(lines) + 1, tail)], "")
    return MetricsFile(events, tail)


def cut_to(path: Path, size: int, iteration: int) -> None:
    """Take back what was written after a checkpoint, for a run that goes on from there.

    Args:
        size: of the file when the checkpoint was begun.
        iteration: of the checkpoint, whose own event comes after and stays.
    """
    with path.open("r+b") as file:
        file.seek(size)
        line = file.readline()
        if line.endswith(b"\n"):
            event = json.loads(line)
            if (event["event"], event["iteration"]) == ("checkpoint", iteration):
                size += len(line)
        file.truncate(size)


def finite(value: Any) -> Any:
    """Replace every non-finite number in a value by "nan", "inf" or "-inf", for strict JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return value


def _problems(event: str, values: Mapping[str, Value]) -> list[str]:
    if event not in EVENTS:
        return [f"unknown event: expected one of {', '.join(EVENTS)}"]
    plain = PLAIN_FIELDS.get(event, frozenset())
    problems = []
    for name, value in values.items():
        if name in plain:
            continue
        area, slash, rest = name.partition("/")
        if not slash or area not in AREAS or not rest or "/" in rest:
            also = f", or one of {', '.join(sorted(plain))}" if plain else ""
            problems.append(
                f"unknown metric name {name!r}: expected area/name with an area of "
                f"{', '.join(AREAS)}{also}"
            )
        elif not _is_metric(value):
            problems.append(
                f"{name} is a {type(value).__name__}: expected a number, a string or a list of "
                "numbers (call .item() or .tolist() on a tensor)"
            )
    return problems


def _is_metric(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, (int, float)) for part in value)
    return isinstance(value, (int, float, str))


def _is_event(line: str) -> bool:
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(event, dict) and event.get("event") in EVENTS


def _parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    if not _is_event(line):
        raise UserError(
            Problem(
                what="damaged metrics file",
                where=f"{path}, line {number}",
                got=repr(line[:60]),
                expected=f"one JSON object with an `event` of {', '.join(EVENTS)}",
                remedy="mend or remove the line; only a cut last line is tolerated",
            )
        )
    event: dict[str, Any] = json.loads(line)
    return {name: _as_number(v) if "/" in name else v for name, v in event.items()}


def _as_number(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_number(part) for part in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _drop_truncated_tail(path: Path) -> None:
    """Cut a half-written last line, so that the next event begins a new one."""
    if not path.exists() or not path.stat().st_size:
        return
    content = parse_metrics(path)
    text = path.read_bytes()
    if text.endswith(b"\n"):
        return
    with path.open("r+b") as file:
        if content.truncated_tail:
            file.truncate(len(text) - len(content.truncated_tail.encode()))
        else:
            file.seek(0, 2)
            file.write(b"\n")
