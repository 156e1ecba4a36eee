"""A scorer of one's own that random text can please, and that knows how to misbehave."""

from __future__ import annotations

import time


def parity(response: str, answer: str) -> float:
    """1.0 where the number of letters in the response is as the answer says."""
    if answer == "raise":
        raise RuntimeError("this scorer has a mistake")
    while answer == "hang":
        time.sleep(60)
    letters = sum(character.isalpha() for character in response)
    return float(letters % 2 == (answer == "odd"))
