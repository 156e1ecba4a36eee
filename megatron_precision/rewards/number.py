"""The last number of a response, as GSM8K and its like are graded."""

from __future__ import annotations

import re
from decimal import Decimal

# A point or a comma counts as a part of the number where digits follow it as in one.
_NUMBER = re.compile(r"-?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?", re.ASCII)


def score(response: str, answer: str) -> float:
    """1.0 if the last number of the response is the right one, else 0.0.

    Args:
        response: the decoded response.
        answer: the right number, in decimal digits.

    Raises:
        ValueError: where the right answer is no number.
    """
    right = _value(answer.strip())
    if right is None or not _NUMBER.fullmatch(answer.strip()):
        raise ValueError(f"the right answer is not a number: {answer!r}")
    numbers = _NUMBER.findall(response)
    return 1.0 if numbers and _value(numbers[-1]) == right else 0.0


def _value(text: str) -> Decimal | None:
    plain = text.replace(",", "")
    return Decimal(plain) if _NUMBER.fullmatch(plain) else None
