"""The last number of a response, as GSM8K and its like are graded."""

from __future__ import annotations

import re
from decimal import Decimal

# A comma counts as a part of a number before three digits, a point before any, and a minus where
# nothing stands right before it: 7-5 has the numbers 7 and 5.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?", re.ASCII)


def score(response: str, answer: str) -> float:
    """1.0 if the last number of the response is the right one, else 0.0.

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
