"""A scorer of your own: a number for a response, by the right answer.

--set task.scorer=examples/my_scorer.py:close
"""

import re

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def close(response: str, answer: str) -> float:
    """Return 1 for the right last number, 0.5 for one within 10 %, and 0 otherwise."""
    numbers = _NUMBER.findall(response)
    if not numbers:
        return 0.0
    found, right = float(numbers[-1]), float(answer)
    if found == right:
        return 1.0
    return 0.5 if abs(found - right) <= 0.1 * abs(right) else 0.0
