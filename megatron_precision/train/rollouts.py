"""Samples groups of rollouts for a task's prompts and grades them.

`GroupSampler` sends prompts to the engine and each finished response to the grader.
`sample_rounds` repeats that until a batch is full of groups whose rewards differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from megatron_precision.config.schema import Truncated
from megatron_precision.data.tasks import Task, TaskPrompt
from megatron_precision.rewards.grading import Grade, Grader, Response, graded
from megatron_precision.rl.advantages import with_contrast
from megatron_precision.rollout.engine import Rollout, Sampling
from megatron_precision.rollout.sampling import GradedRollouts, Prompt, Sampler


@dataclass(frozen=True)
class RolloutGroups:
    """Groups of rollouts with their rewards; a group is all rollouts of one prompt.

    Attributes:
        rollouts: all rollouts, ordered by prompt, then by rollout.
        rewards: [prompts, rollouts] FP32.
        reward_s: seconds that this rank spent on grading; see `GradedRollouts`.
        failures: grades of responses that could not be scored.
    """

    rollouts: list[Rollout]
    rewards: torch.Tensor
    reward_s: float
    failures: tuple[Grade, ...] = ()

    @classmethod
    def of(cls, graded: GradedRollouts, rollouts_per_prompt: int) -> RolloutGroups:
        """Arrange graded rollouts into groups."""
        rewards = torch.tensor([grade.reward for grade in graded.grades])
        failures = tuple(grade for grade in graded.grades if grade.status != "scored")
        shape = (-1, rollouts_per_prompt)
        return cls(graded.rollouts, rewards.view(shape), graded.grading_s, failures)

    @property
    def response_tokens(self) -> torch.Tensor:
        """Lengths of the responses in tokens, [prompts, rollouts] int64."""
        lengths = [len(rollout.tokens) for rollout in self.rollouts]
        return torch.tensor(lengths, dtype=torch.int64).view(self.rewards.shape)

    def groups(self, chosen: Sequence[int]) -> RolloutGroups:
        """Return the groups with these numbers, in this order."""
        size = self.rewards.shape[1]
        rollouts = [self.rollouts[group * size + i] for group in chosen for i in range(size)]
        return RolloutGroups(rollouts, self.rewards[list(chosen)], self.reward_s, self.failures)


def sample_rounds(
    sample: Callable[[int, int], RolloutGroups], num_groups: int, extra_rounds: int
) -> tuple[RolloutGroups, RolloutGroups]:
    """Sample groups, and replace groups whose rewards are all equal by further ones.

    Each further round asks for as many prompts as are missing. When the rounds run out, groups of
    equal rewards fill the batch: its shape is fixed, and they add no gradient. Every rank has the
    same rewards, so all ranks ask for the same rounds.

    Args:
        sample: called with (round, number of prompts), returns that many groups; round 0 is the
            iteration's own.
        num_groups: the number of groups in the batch.
        extra_rounds: the largest number of further rounds; with 0 the batch is round 0.

    Returns:
        Everything that was sampled, and the batch: `num_groups` of these groups, in their order.

    Source: arXiv 2503.14476, section 3.2, which samples whole batches without a bound until the
    batch is full.
    """
    everything = sample(0, num_groups)
    for number in range(1, extra_rounds + 1):
        missing = num_groups - int(with_contrast(everything.rewards).sum())
        if missing <= 0:
            break
        more = sample(number, missing)
        everything = RolloutGroups(
            [*everything.rollouts, *more.rollouts],
            torch.cat([everything.rewards, more.rewards]),
            everything.reward_s + more.reward_s,
            (*everything.failures, *more.failures),
        )
    # A stable sort: groups with contrast first, each kind in the order in which it was sampled.
    order = torch.argsort(with_contrast(everything.rewards), descending=True, stable=True)
    return everything, everything.groups(sorted(order[:num_groups].tolist()))


class GroupSampler:
    """Samples a task's prompts and grades every response as soon as it is finished."""

    def __init__(self, task: Task, sampler: Sampler, max_response_tokens: int) -> None:
        self._task = task
        self._sampler = sampler
        self._max_tokens = max_response_tokens
        self._grader: Grader | None = task.open_grader() if sampler.grades else None

    def sample(
        self,
        prompts: Sequence[TaskPrompt],
        *,
        rollouts_per_prompt: int,
        purpose: str,
        iteration: int,
        temperature: float,
        logprobs: bool,
        top_p: float = 1.0,
        truncated: Truncated = "graded",
    ) -> RolloutGroups:
        """Sample every prompt and grade every response; see `Sampler.sample`.

        Args:
            truncated: "graded" grades a response that reached its length limit; "wrong" gives it
                the reward 0.
        """

        def grade(rollout: Rollout) -> Future[Grade]:
            assert self._grader is not None
            if rollout.truncated and truncated == "wrong":
                return graded(0.0)
            prompt, number = prompts[rollout.request.prompt], rollout.request.rollout
            name = f"{purpose}, iteration {iteration}, {prompt.id}, rollout {number}"
            text = self._task.text(rollout.tokens)
            return self._grader.submit(Response(name, text, prompt.answer, rollout.truncated))

        found = self._sampler.sample(
            [Prompt(p.id, p.tokens) for p in prompts],
            rollouts_per_prompt=rollouts_per_prompt,
            purpose=purpose,
            iteration=iteration,
            sampling=Sampling(temperature, self._max_tokens, logprobs, top_p),
            grade=grade,
        )
        return RolloutGroups.of(found, rollouts_per_prompt)

    def close(self) -> None:
        """Stop the processes that grade."""
        if self._grader is not None:
            self._grader.close()
