"""Which questions an iteration asks: a pure function, so that a resumed run asks the same.

Think of all epochs laid end to end, each a fresh shuffle of every question; iteration i takes
the next `per_iteration` places. This module imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import random


def prompts_for_iteration(
    num_questions: int, iteration: int, per_iteration: int, seed: int, stream: str = "order"
) -> list[int]:
    """Indices of the questions of one iteration, in order.

    Every question comes once an epoch. An iteration may reach over the end of an epoch: then
    a question can come twice in it, once from either epoch.

    Args:
        num_questions: the set's size; indices are 0 .. num_questions - 1.
        iteration: 0-based.
        per_iteration: how many indices.
        seed: shuffles otherwise.
        stream: names an order of its own, for example of the prompts that fill up a batch.

    Raises:
        ValueError: lists every argument that is out of range.
    """
    wrong = [
        f"{name}: got {value}, expected {least} or more"
        for name, value, least in (
            ("num_questions", num_questions, 1),
            ("iteration", iteration, 0),
            ("per_iteration", per_iteration, 1),
        )
        if value < least
    ]
    if wrong:
        raise ValueError("cannot order prompts; " + "; ".join(wrong))
    return places(num_questions, iteration * per_iteration, per_iteration, seed, stream)


def places(
    num_questions: int, first: int, count: int, seed: int | str, stream: str = "order"
) -> list[int]:
    """Indices at `count` places from place `first` (0-based) of all epochs laid end to end.

    Args:
        num_questions: 1 or more.
        first: 0 or more.
        count: 0 or more.
        seed: shuffles otherwise; text for a set that is one of several.
        stream: keeps the orders of different uses apart.
    """
    order: list[int] = []
    for epoch in range(first // num_questions, -(-(first + count) // num_questions)):
        order.extend(_epoch_order(num_questions, epoch, seed, stream))
    start = first % num_questions
    return order[start : start + count]


# The sets of a mixture take turns, each within an epoch or over the end of one.
@functools.lru_cache(maxsize=16)
def _epoch_order(num_questions: int, epoch: int, seed: int | str, stream: str) -> tuple[int, ...]:
    shuffled = list(range(num_questions))
    random.Random(hashlib.sha256(f"{stream}/{seed}/{epoch}".encode()).digest()).shuffle(shuffled)
    return tuple(shuffled)
