"""Scorers of chat responses by name: functions of a response and the right answer.

Each runs in the worker processes of `isolation.py`. A new one is a function in a file of its own
and a row in `SCORERS`; one of the user's own is named as `MODULE:FUNCTION`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from megatron_precision.errors import Problem, UserError

Scorer = Callable[[str, str], float]

SCORERS = {
    "math": "megatron_precision.rewards.math:score",
    "number": "megatron_precision.rewards.number:score",
}


def scorer(name: str) -> Scorer:
    """The function that a name means.

    Args:
        name: a key of `SCORERS`, or `MODULE:FUNCTION`.

    Raises:
        UserError: where there is no such module, or no such function in it.
    """
    module, _, function = SCORERS.get(name, name).partition(":")
    try:
        found: Scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as wrong:
        expected = f"a function {function!r} in a module {module!r} that Python finds"
        problem = Problem("a scorer that cannot be loaded", "task.scorer", str(wrong), expected)
        raise UserError(problem) from wrong
    return found
