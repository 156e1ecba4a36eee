"""What a user reads when something they wrote cannot be run.

A mistake of the user is a `UserError`: it holds every problem found, not only the first, and a
front door (`cli.py`, `launch.py`) turns it into a message and exit code 2. A mistake of ours is
any other exception and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Problems of one kind that a message names; a model whose shard is lost lacks hundreds of tensors.
_SHOWN = 10


@dataclass(frozen=True)
class Problem:
    """A thing that is wrong: what, where, got, expected and remedy.

    Attributes:
        what: what is wrong, as a sentence without a full stop.
        where: the option, configuration path or file that holds the value.
        got: the value that was found.
        expected: what is accepted there.
        remedy: what to change, if more can be said than `expected` says.
    """

    what: str
    where: str
    got: str
    expected: str
    remedy: str = ""

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (
            ("where", self.where),
            ("got", self.got),
            ("expected", self.expected),
            ("remedy", self.remedy),
        ):
            if text:
                lines.append(f"    {label + ':':<10}{text}")
        return "\n".join(lines)


# The exit code of a run that a signal stopped and `--resume` continues (EX_TEMPFAIL: try again).
STOPPED = 75


class Stopped(Exception):
    """A signal ended the run; its launcher may start it again."""


class UserError(ValueError):
    """Lists everything that is wrong with what the user asked for; exit code 2."""

    problems: tuple[Problem, ...]

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        """
        Args:
            problems: one problem or several.

        Raises:
            ValueError: when there is no problem to report.
        """
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        if not self.problems:
            raise ValueError("a UserError needs at least one problem")
        super().__init__(self.message())

    def __reduce__(self) -> tuple[type[UserError], tuple[tuple[Problem, ...]]]:
        """Pickle by the message: an exception travels from a worker process to its parent."""
        return type(self), (self.problems,)

    def message(self) -> str:
        """The message, one numbered entry a problem; of many of one kind, the first and how many"""
        if len(self.problems) == 1:
            return f"error: {self.problems[0]}"
        kinds = Counter[str]()
        entries = []
        for number, problem in enumerate(self.problems, start=1):
            kinds[problem.what] += 1
            if kinds[problem.what] <= _SHOWN:
                entries.append(f"{number}. {problem}")
        more = [f"... and {n - _SHOWN} more: {what}" for what, n in kinds.items() if n > _SHOWN]
        return "\n".join([f"error: {len(self.problems)} problems", *entries, *more])


def nearest(name: str, valid: Sequence[str], count: int = 3) -> list[str]:
    """Return the valid names that look most like `name`, best first, ignoring case."""
    by_folded: dict[str, str] = {}
    for candidate in valid:
        by_folded.setdefault(candidate.casefold(), candidate)
    found = difflib.get_close_matches(name.casefold(), list(by_folded), n=count, cutoff=0.5)
    return [by_folded[folded] for folded in found]


def unknown_name(kind: str, where: str, got: str, valid: Sequence[str]) -> Problem:
    """Describe a name that is not in a table.

    Args:
        kind: what the table holds, for example `recipe`.
        where: the option that gave the name.
        got: the name that was given.
        valid: all names of the table.
    """
    close = nearest(got, valid)
    return Problem(
        what=f"unknown {kind} {got!r}",
        where=where,
        got=got,
        expected="one of " + ", ".join(valid),
        remedy=f"did you mean {' or '.join(close)}?" if close else "",
    )
