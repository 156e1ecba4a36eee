"""A task's sets of prompts as a configuration names them: `NAME=PATH` or `NAME=PATH@WEIGHT`.

This module imports no torch, and reads no file.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_precision.errors import Problem

EXPECTED = "NAME=PATH or NAME=PATH@WEIGHT, the name of letters, digits, - and _, the weight above 0"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class PromptSet:
    """One file of prompts.

    Attributes:
        name: in metrics and in the order of prompts.
        path: a `.parquet` or `.jsonl` file; see `data/prompts.py`.
        weight: its share of a mixture, relative to the other weights.
    """

    name: str
    path: Path
    weight: float = 1.0


def parse_set(text: str) -> PromptSet:
    """Read one set.

    Raises:
        ValueError: its message says what would have been accepted.
    """
    name, equals, rest = text.partition("=")
    path, at, weight = rest.rpartition("@")
    if not at:
        path, weight = rest, "1"
    try:
        number = float(weight)
    except ValueError:
        path, number = rest, 1.0  # an @ of the path's own
    if not (equals and _NAME.fullmatch(name) and path and 0 < number < math.inf):
        raise ValueError(EXPECTED)
    return PromptSet(name, Path(path), number)


def set_problems(field: str, texts: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with the sets of one field of a configuration."""
    names: Counter[str] = Counter()
    for text in texts:
        try:
            names[parse_set(text).name] += 1
        except ValueError as wrong:
            yield Problem("a set of prompts that cannot be read", field, repr(text), str(wrong))
    for name, times in names.items():
        if times > 1:
            yield Problem(
                "two sets of one name", field, f"{name}, {times} times", "a name for each set"
            )
