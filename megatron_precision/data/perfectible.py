"""Selects, writes and reads the perfectible set: the questions that the start answers sometimes.

A question that is always or never answered gives a group without variance, hence no gradient. One
that is answered sometimes can be brought to perfection, so the set tests the training and not the
model. Source: arXiv 2510.26788, the sanity test: 40 responses per question, accuracy from 20 % to
80 % kept.

The file is JSON Lines, one question per line. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_precision.data.arithmetic import Question


@dataclass(frozen=True)
class PerfectibleQuestion:
    """A question and the share of the start's responses to it that were right, 0 .. 1."""

    question: Question
    accuracy: float


def select_perfectible(accuracies: Sequence[float], low: float, high: float) -> list[int]:
    """Return the ascending indices of the accuracies from `low` to `high`, both inclusive.

    Raises:
        ValueError: for an accuracy outside 0 .. 1 (NaN too), lists every one; for low > high.
    """
    outside = [index for index, value in enumerate(accuracies) if not 0 <= value <= 1]
    if outside:
        shown = ", ".join(f"{index}: {accuracies[index]}" for index in outside)
        raise ValueError(f"accuracies must lie in 0 .. 1, got (index: value) {shown}")
    if not low <= high:
        raise ValueError(f"bounds of the perfectible set: got {low} and {high}, expected low first")
    return [index for index, value in enumerate(accuracies) if low <= value <= high]


def write_perfectible(path: Path, items: Sequence[PerfectibleQuestion]) -> None:
    """Write the set completely or not at all: a reader never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two jobs that make the same set from writing into one file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as lines:
        for item in items:
            record = {**dataclasses.asdict(item.question), "accuracy": item.accuracy}
            lines.write(json.dumps(record) + "\n")
        lines.flush()
        os.fsync(lines.fileno())
    partial.replace(path)


def read_perfectible(path: Path) -> list[PerfectibleQuestion]:
    """Read a set that `write_perfectible` wrote.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: lists every line that is not a question with an accuracy.
    """
    items: list[PerfectibleQuestion] = []
    wrong: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        item = _parse(line)
        if isinstance(item, str):
            wrong.append(f"line {number}: {item}")
        else:
            items.append(item)
    if wrong:
        raise ValueError(
            f"{path} is not a perfectible set; {'; '.join(wrong)}: delete it to have it made again"
        )
    return items


_TEXTS = tuple(field.name for field in dataclasses.fields(Question))


def _parse(line: str) -> PerfectibleQuestion | str:
    """Parse a line into a question, or into a problem."""
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg})"
    expected = {*_TEXTS, "accuracy"}
    if not isinstance(record, dict) or set(record) != expected:
        return f"expected an object with {', '.join(sorted(expected))}"
    not_text = [name for name in _TEXTS if not isinstance(record[name], str)]
    if not_text:
        return f"expected text in {', '.join(not_text)}"
    accuracy = record["accuracy"]
    if (
        isinstance(accuracy, bool)
        or not isinstance(accuracy, int | float)
        or not 0 <= accuracy <= 1
    ):
        return f"expected an accuracy in 0 .. 1, got {accuracy!r}"
    texts = {name: record[name] for name in _TEXTS}
    return PerfectibleQuestion(question=Question(**texts), accuracy=float(accuracy))
