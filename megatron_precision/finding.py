"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "optional", "missing"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found.

    Attributes:
        name: what was looked at.
        state: `missing` makes the exit code 1; `optional` is worth knowing only.
        text: what was found.
        remedy: what to do, where there is something to do.
    """

    name: str
    state: State
    text: str
    remedy: str = ""
