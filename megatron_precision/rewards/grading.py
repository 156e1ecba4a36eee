"""Turns finished responses into rewards, without keeping the engine waiting.

`submit` returns at once. The arithmetic grader has its answer ready; the pooled one scores in the
worker processes of `isolation.py` while the engine samples on. This module imports no torch.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from megatron_precision.rewards import scorers
from megatron_precision.rewards.isolation import Sample, ScorerPool, Status, Verdict
from megatron_precision.rewards.scorers import Scorer


@dataclass(frozen=True)
class Response:
    """A finished response.

    Attributes:
        name: says in a report which one it is: question and rollout.
        text: decoded, without the token that ended it.
        answer: the right answer.
        truncated: it reached its length limit before an end token.
    """

    name: str
    text: str
    answer: str
    truncated: bool


@dataclass(frozen=True)
class Grade:
    """What came of a response.

    Attributes:
        reward: the scorer's number; 0.0 unless scored.
        status: `scored`, or why it was not.
        report: names the response and says what happened; empty where scored.
    """

    reward: float
    status: Status = "scored"
    report: str = ""


def graded(reward: float) -> Future[Grade]:
    """The future of a response that has been graded."""
    done: Future[Grade] = Future()
    done.set_result(Grade(reward))
    return done


class Grader(Protocol):
    """Grades responses; one of it on the first rank of every replica of the engine."""

    def submit(self, response: Response) -> Future[Grade]:
        """Queue a response; the future's own error ends the run: no response is to blame for it."""
        ...

    def close(self) -> None:
        """End what grades."""
        ...


class ArithmeticGrader:
    """Grades the made-up sums on the spot: a regular expression needs no isolation."""

    def submit(self, response: Response) -> Future[Grade]:
        """See `Grader`."""
        reward = scorers.score_arithmetic(
            response.text, response.answer, truncated=response.truncated
        )
        return graded(reward)

    def close(self) -> None:
        """Nothing is open."""


class PooledGrader:
    """Grades by a scorer in processes of its own.

    A truncated response that comes here is graded as it stands; see `task.truncated`.
    """

    def __init__(self, scorer: Scorer, *, workers: int, time_limit_s: float) -> None:
        self._pool = ScorerPool(scorer, workers=workers, time_limit_s=time_limit_s)

    def submit(self, response: Response) -> Future[Grade]:
        """See `Grader`."""
        sample = Sample(response.name, response.text, response.answer)
        return _mapped(self._pool.submit(sample))

    def close(self) -> None:
        """End the workers at once."""
        self._pool.close()


def _mapped(verdict: Future[Verdict]) -> Future[Grade]:
    """The future of a grade from that of a verdict, which holds the whole response."""
    grade: Future[Grade] = Future()

    def finish(done: Future[Verdict]) -> None:
        error = done.exception()
        if error is not None:
            grade.set_exception(error)
            return
        found = done.result()
        report = "" if found.status == "scored" else found.report()
        grade.set_result(Grade(found.reward, found.status, report))

    verdict.add_done_callback(finish)
    return grade
