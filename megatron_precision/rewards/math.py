"""Scores a mathematical answer: the last boxed one, compared by math-verify.

math-verify reads LaTeX into SymPy and compares values: fractions with decimals, sets in any order,
numbers with units or thousands separators. The cost depends on the response, so this runs in the
worker processes of `isolation.py` and has no time limit of its own. This module imports no torch.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_BASE = re.compile(r"[0-9A-F]_\{?(\d+)\}?[\s$]*\Z")
_LATEX = (LatexExtractionConfig(boxed_match_priority=0),)

# It warns in every process that its alarm is off, which is what we want: alarms are a signal
# of the whole process, and do not interrupt an endless computation inside a C function.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def score(response: str, answer: str) -> float:
    """Return 1.0 if the last box of the response has the right answer, else 0.0.

    Several boxes are several tries, of which the last counts. An answer outside a box does not
    count: the prompt asks for a box, and whatever else is searched can be found by luck. A
    response that was cut short is graded like any other: a closed box is an answer.

    Args:
        response: the decoded response.
        answer: the right answer in LaTeX, with or without dollar signs or a box.

    Raises:
        ValueError: when the right answer has no value that could be compared.
    """
    right, expected = _expected(answer)
    box = last_box(response)
    if box is None or not box.strip():
        return 0.0
    # math-verify drops the base of 25_8. To leave it out is common; to name another is wrong.
    bases = [found.group(1) for found in map(_BASE.search, (right, box)) if found]
    if len(set(bases)) > 1:
        return 0.0
    return 1.0 if verify(expected, _read(box), timeout_seconds=None) else 0.0


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}`; None without one.

    An escaped brace is no brace. A last box that is not closed is none, whatever stands before.
    """
    start = -1
    for opening in _BOX.finditer(text):
        start = opening.end()
    if start < 0:
        return None
    depth = 1
    for brace in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : brace.start()]
    return None


@functools.lru_cache(maxsize=4096)
def _expected(answer: str) -> tuple[str, list[Any]]:
    """Return the right answer without its box, and its values; a group's rollouts share them."""
    boxed = last_box(answer)
    right = answer if boxed is None else boxed
    values = _read(right)
    if not values:
        raise ValueError(
            f"the right answer {answer!r} has no value: expected a number, an expression, a set, "
            "a matrix or a word in LaTeX"
        )
    return right, values


def _read(latex: str) -> list[Any]:
    """Parse into SymPy values and the text itself; empty if math-verify can parse nothing."""
    found: list[Any] = parse(f"\\boxed{{{latex}}}", extraction_config=_LATEX, parsing_timeout=None)
    return found
