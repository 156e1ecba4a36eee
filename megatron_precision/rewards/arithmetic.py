"""The reward of an arithmetic question: the right final answer, or nothing."""

from __future__ import annotations

import re

# No leading zero, no sign, ASCII digits alone, and nothing after the number.
_FINAL_ANSWER = re.compile(r"=(0|[1-9][0-9]*)\Z")


def score(response: str, answer: str, *, truncated: bool) -> float:
    """1.0 if the response ends in `=` and the right number, else 0.0.

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
