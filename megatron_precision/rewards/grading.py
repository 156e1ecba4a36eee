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
    """The grade of a response.

    Attributes:
        reward: the scorer's number; 0.0 unless scored.
        status: `scored`, or why it was not.
        report: names the response and says what happened; empty where scored.
    """

    reward: float
    status: Status = "scored"
    report: str = ""


def graded(reward: float) -> Future[Grade]:
    """Return a finished future with a reward."""
    done: Future[Grade] = Future()
    done.set_result(Grade(reward))
    return done


class Grader(Protocol):
    """Grades responses; the first rank of every engine replica has one."""

    def submit(self, response: Response) -> Future[Grade]:
        """Queue a response. If the future raises, the grader itself failed, and the run aborts."""
        ...

    def close(self) -> None:
        """Stop the processes that grade."""
        ...


class ArithmeticGrader:
    """Grades the made-up sums on the spot: a regular expression needs no isolation."""

    def submit(self, response: Response) -> Future[Grade]:
        """Grade a response; see `Grader`."""
        reward = scorers.score_arithmetic(
            response.text, response.answer, truncated=response.truncated
        )
        return graded(reward)

    def close(self) -> None:
        """Do nothing: nothing is open."""


class PooledGrader:
    """Grades with a scorer in worker processes.

    A truncated response that comes here is graded as it stands; see `task.truncated`.
    """

    def __init__(self, scorer: Scorer, *, workers: int, time_limit_s: float) -> None:
        self._pool = ScorerPool(scorer, workers=workers, time_limit_s=time_limit_s)

    def submit(self, response: Response) -> Future[Grade]:
        """Grade a response; see `Grader`."""
        sample = Sample(response.name, response.text, response.answer)
        return _mapped(self._pool.submit(sample))

    def close(self) -> None:
        """Stop the workers at once."""
        self._pool.close()


def _mapped(verdict: Future[Verdict]) -> Future[Grade]:
    """Map the future of a verdict to one of a grade, which does not keep the response."""
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
