"""What is graded and what is not, with an engine and a grader made up here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, cast

import recipes
from megatron_precision.config.schema import TaskConfig, Truncated
from megatron_precision.data.tasks import Task, TaskPrompt
from megatron_precision.rewards.grading import Grade, Response, graded
from megatron_precision.rollout.engine import Request, Rollout
from megatron_precision.rollout.sampling import GradedRollouts, Prompt
from megatron_precision.train.rollouts import GroupSampler

# Two prompts, two rollouts each; the second of each runs into its limit of three tokens.
ROLLOUTS = [
    Rollout(Request(prompt, number, (9,), 0), (5, 6, 7)[: 2 + number], (), number == 1, 3)
    for prompt in range(2)
    for number in range(2)
]


class Finished:
    """Stands in for the sampler: every rollout has finished."""

    grades = True

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        grade: Callable[[Rollout], Future[Grade]],
        **_asked: Any,
    ) -> GradedRollouts:
        return GradedRollouts(ROLLOUTS, [grade(rollout).result() for rollout in ROLLOUTS], 0.0)


class Pays:
    """A grader that finds everything right, and remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[Response] = []

    def submit(self, response: Response) -> Future[Grade]:
        self.seen.append(response)
        return graded(1.0)

    def close(self) -> None:
        pass


def sampled(truncated: Truncated) -> tuple[list[list[float]], Pays]:
    grader = Pays()
    task = Task(
        train={}, evals={}, stop_ids=(6,), decode=lambda ids: " ".join(map(str, ids)),
        open_grader=lambda: grader, check_sequences=[], counts={},
    )  # fmt: skip
    found = GroupSampler(task, cast(Any, Finished()), 3).sample(
        [TaskPrompt(f"q{n}", (9,), "right", "?") for n in range(2)],
        rollouts_per_prompt=2,
        purpose="train",
        iteration=4,
        temperature=1.0,
        logprobs=True,
        truncated=truncated,
    )
    return found.rewards.tolist(), grader


def test_a_truncated_response_of_training_has_no_reward_and_costs_no_grading() -> None:
    rewards, grader = sampled("wrong")
    assert rewards == [[1.0, 0.0], [1.0, 0.0]]
    assert [response.name for response in grader.seen] == [
        "train, iteration 4, q0, rollout 0", "train, iteration 4, q1, rollout 0",
    ]  # fmt: skip


def test_one_that_is_graded_is_graded_as_it_stands() -> None:
    rewards, grader = sampled("graded")
    assert rewards == [[1.0, 1.0], [1.0, 1.0]]
    # The end token is no part of an answer; a truncated response has none.
    assert [(r.text, r.truncated) for r in grader.seen[:2]] == [("5", False), ("5 6 7", True)]


def test_the_authors_rule_is_the_default() -> None:
    assert TaskConfig().truncated == "wrong"


def test_dapo_grades_the_text() -> None:

    assert recipes.recipe("dense14b.dapo").task.truncated == "graded"
