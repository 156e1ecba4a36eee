"""Sampling on a task: prompts to the engine, texts to the grader, groups with rewards back.

Groups of rollouts with their rewards, and the rounds of sampling that fill a batch with them.
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
    """Groups of rollouts with their rewards.

    Attributes:
        rollouts: ordered by prompt, then rollout.
        rewards: [prompts, rollouts] FP32.
        reward_s: seconds that this rank gave to grading; see `GradedRollouts`.
        failures: grades of responses that could not be scored.
    """

    rollouts: list[Rollout]
    rewards: torch.Tensor
    reward_s: float
    failures: tuple[Grade, ...] = ()

    @classmethod
    def of(cls, graded: GradedRollouts, rollouts_per_prompt: int) -> RolloutGroups:
        """Turn graded rollouts into groups."""
        rewards = torch.tensor([grade.reward for grade in graded.grades])
        failures = tuple(grade for grade in graded.grades if grade.status != "scored")
        shape = (-1, rollouts_per_prompt)
        return cls(graded.rollouts, rewards.view(shape), graded.grading_s, failures)

    @property
    def response_tokens(self) -> torch.Tensor:
        """[prompts, rollouts] int64: lengths of the responses."""
        lengths = [len(rollout.tokens) for rollout in self.rollouts]
        return torch.tensor(lengths, dtype=torch.int64).view(self.rewards.shape)

    def groups(self, chosen: Sequence[int]) -> RolloutGroups:
        """The groups with these numbers, in this order."""
        size = self.rewards.shape[1]
        rollouts = [self.rollouts[group * size + i] for group in chosen for i in range(size)]
        return RolloutGroups(rollouts, self.rewards[list(chosen)], self.reward_s, self.failures)


def sample_rounds(
    sample: Callable[[int, int], RolloutGroups], num_groups: int, extra_rounds: int
) -> tuple[RolloutGroups, RolloutGroups]:
    """Sample groups, and further ones in place of those whose rewards are all equal.

    Each further round asks only as many prompts as are missing. Where the rounds run out, groups
    without contrast fill the batch: its shape is fixed, and they add no gradient. Every rank
    holds the same rewards, so all ranks ask for the same rounds.

    Args:
        sample: (round, prompts) to that many groups; round 0 is the iteration's own.
        num_groups: groups of the batch.
        extra_rounds: further rounds at most; with 0 the batch is what was sampled.

    Returns:
        Everything that was sampled, and the batch: `num_groups` of its groups, in its order.

    Source: arXiv 2503.14476, section 3.2. It samples until the batch is full, without a
    bound, and whole batches at a time.
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
    """Samples prompts of a task and has every response graded as it finishes."""

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
            truncated: whether a response that reached its limit is graded, or has the reward 0.
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
        """End what grades."""
        if self._grader is not None:
            self._grader.close()
