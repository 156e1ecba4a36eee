"""Chooses the next questions, from one set or several: deterministic, resumed from a small dict.

Of `n` questions a set with share `w` gives `n * w`, as nearly as whole numbers allow, at every
moment and not only on average: the next question comes from the set that is furthest behind its
share. Inside a set all epochs are laid end to end, each a fresh shuffle of every question, and an
iteration takes the next places. The order is a pure function of the seed, so that a resumed run
asks the same questions. This module imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypedDict

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import fingerprint


def prompts_for_iteration(
    num_questions: int, iteration: int, per_iteration: int, seed: int, stream: str = "order"
) -> list[int]:
    """Return the indices of an iteration's questions, in order.

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
    """Return the indices at `count` places from `first` (0-based) of all epochs end to end.

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


@dataclass(frozen=True)
class MixtureSet:
    """One set of a mixture.

    Attributes:
        name: unlike that of any other set of the mixture; its shuffles depend on it.
        num_prompts: its size.
        weight: its share, relative to the other weights.
    """

    name: str
    num_prompts: int
    weight: float = 1.0


class MixtureState(TypedDict):
    """The position of a mixture, as JSON values.

    Keys:
        fingerprint: names the sets, weights and seed that the counts belong to.
        taken: how many questions each set has given.
    """

    fingerprint: str
    taken: dict[str, int]


class Mixture:
    """Questions of several sets in one order; the same for every rank and every way to cut it."""

    def __init__(self, sets: Sequence[MixtureSet], seed: int, stream: str = "order") -> None:
        """
        Args:
            sets: one or more; their order breaks ties.
            seed: shuffles otherwise.
            stream: keeps the orders of different uses apart.

        Raises:
            UserError: lists every set that cannot take part.
        """
        if problems := _set_problems(sets):
            raise UserError(problems)
        self._sets = tuple(sets)
        self._seed, self._stream = seed, stream
        # Exact shares: a sum of rounded ones would drift, and differ from place to place.
        total = sum(Fraction(part.weight) for part in sets)
        self._shares = [Fraction(part.weight) / total for part in sets]
        self._taken = [0] * len(sets)
        parts = [[part.name, part.num_prompts, part.weight] for part in sets]
        self._fingerprint = fingerprint({"sets": parts, "seed": seed, "stream": stream})

    def take(self, count: int) -> list[tuple[str, int]]:
        """Take the next `count` questions, each as a set's name and an index into that set.

        Raises:
            ValueError: for a negative count.
        """
        if count < 0:
            raise ValueError(f"questions to take: got {count}, expected 0 or more")
        chosen = [self._next_set() for _ in range(count)]
        drawn = {}
        for number, from_it in Counter(chosen).items():
            part = self._sets[number]
            # `_next_set` has counted this batch already.
            first = self._taken[number] - from_it
            # A set without a name is the only one, and its order that of `prompts_for_iteration`.
            seed = f"{self._seed}/{part.name}" if part.name else self._seed
            indices = places(part.num_prompts, first, from_it, seed, self._stream)
            drawn[number] = iter(indices)
        return [(self._sets[number].name, next(drawn[number])) for number in chosen]

    def state(self) -> MixtureState:
        """Return what `restore` needs."""
        names = [part.name for part in self._sets]
        taken = dict(zip(names, self._taken, strict=True))
        return {"fingerprint": self._fingerprint, "taken": taken}

    def restore(self, state: MixtureState) -> None:
        """Continue from a state that `state()` returned.

        Raises:
            UserError: when it is the state of other sets, sizes, weights or another seed.
        """
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                Problem(
                    what="the saved order of prompts is that of another mixture",
                    where="state of the data",
                    got=f"{state['fingerprint']}, of sets {', '.join(state['taken'])}",
                    expected=f"{self._fingerprint}, of sets {', '.join(self.state()['taken'])}",
                    remedy="resume with the sets, weights and seed that the run began with",
                )
            )
        self._taken = [state["taken"][part.name] for part in self._sets]

    def _next_set(self) -> int:
        place = sum(self._taken) + 1
        lags = [
            share * place - taken for share, taken in zip(self._shares, self._taken, strict=True)
        ]
        number = lags.index(max(lags))
        self._taken[number] += 1
        return number


def _set_problems(sets: Sequence[MixtureSet]) -> list[Problem]:
    if not sets:
        return [Problem("a mixture of nothing", "mixture", "no set", "one set or more")]
    problems = []
    times = Counter(part.name for part in sets)
    for part in sets:
        where = f"set {part.name!r} of the mixture"
        if part.num_prompts < 1:
            problems.append(Problem("an empty set", where, str(part.num_prompts), "1 prompt"))
        if not 0 < part.weight < math.inf:
            what = "a weight that gives no share"
            problems.append(Problem(what, where, str(part.weight), "a finite number above 0"))
    for name, count in times.items():
        if count > 1:
            what = "a set that is named more than once"
            problems.append(Problem(what, f"set {name!r} of the mixture", f"{count} times", "once"))
    return problems
