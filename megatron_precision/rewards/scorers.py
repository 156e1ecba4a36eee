"""Finds a scorer by its name, and scores by the last number of a response.

A scorer is a function of a response and the right answer. It runs in the worker processes of
`isolation.py`. A new one is a function and a row in `SCORERS`; a user's own needs no edit here:
`MODULE:FUNCTION` of a module that Python finds, or `FILE.py:FUNCTION`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal

from megatron_precision.config import user_files
from megatron_precision.config.errors import Problem, UserError

Scorer = Callable[[str, str], float]

SCORERS = {
    "math": "megatron_precision.rewards.math:score",
    "number": "megatron_precision.rewards.scorers:score_number",
}
SIGNATURE = "a function FUNCTION(response: str, answer: str) -> float"


@dataclass(frozen=True)
class FileScorer:
    """A scorer in a user's file. A worker process receives its name and loads the file itself."""

    reference: str
    function: Scorer = field(compare=False)

    def __call__(self, response: str, answer: str) -> float:
        """Score one response."""
        return self.function(response, answer)

    def __reduce__(self) -> tuple[Callable[[str], Scorer], tuple[str]]:
        """Pickle the reference: a worker finds no module of the file's name."""
        return scorer, (self.reference,)


def scorer(name: str) -> Scorer:
    """Load the function that a name means.

    Args:
        name: a key of `SCORERS`, `MODULE:FUNCTION`, or `FILE.py:FUNCTION`.

    Raises:
        UserError: there is no such module or file, it raises as it is imported, it has no such
            function, or the function does not take a response and an answer.
    """
    if user_files.is_reference(name):
        return FileScorer(name, _from_file(name))
    module, _, function = SCORERS.get(name, name).partition(":")
    try:
        found: Scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as wrong:
        expected = f"a function {function!r} in a module {module!r} that Python finds"
        problem = Problem("a scorer that cannot be loaded", "task.scorer", str(wrong), expected)
        raise UserError(problem) from wrong
    return found


def _from_file(reference: str) -> Scorer:
    found = user_files.load(reference, "task.scorer", SIGNATURE)
    try:
        inspect.signature(found).bind("", "")
    except (TypeError, ValueError) as wrong:
        raise UserError(
            Problem(
                "not a scorer",
                user_files.place(found, reference, "task.scorer"),
                repr(found) if not callable(found) else str(wrong),
                SIGNATURE,
                "change its arguments" if callable(found) else "name a function of the file",
            )
        ) from wrong
    return found


# No leading zero, no sign, ASCII digits alone, and nothing after the number.
_FINAL_ANSWER = re.compile(r"=(0|[1-9][0-9]*)\Z")


def score_arithmetic(response: str, answer: str, *, truncated: bool) -> float:
    """Return 1.0 if the response ends in `=` and the right number, else 0.0.

    The steps before the final answer are not graded. The experiment measures reinforcement
    learning from outcomes, as the paper does; a reward for steps would teach the demonstrated
    way of working, which the warm start has done already, and would pay for wrong answers.

    Args:
        response: the decoded response without special tokens.
        answer: the right answer in decimal digits.
        truncated: the response reached its length limit before its end token. What it would
            have ended in is unknown, so it scores 0, even if it looks right by accident.
    """
    if truncated:
        return 0.0
    final = _FINAL_ANSWER.search(response)
    return 1.0 if final is not None and final.group(1) == answer else 0.0


# A comma counts as a part of a number before three digits, a point before any, and a minus where
# nothing stands right before it: 7-5 has the numbers 7 and 5.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?", re.ASCII)


def score_number(response: str, answer: str) -> float:
    """Return 1.0 if the last number of the response is the right one, else 0.0.

    Args:
        response: the decoded response.
        answer: the right number, in decimal digits.

    Raises:
        ValueError: where the right answer is no number.
    """
    if not _NUMBER.fullmatch(answer.strip()):
        raise ValueError(f"the right answer is not a number: {answer!r}")
    numbers = _NUMBER.findall(response)
    return 1.0 if numbers and _value(numbers[-1]) == _value(answer.strip()) else 0.0


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
