"""Sampling on a task: prompts to the engine, texts to the grader, groups with rewards back."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from megatron_precision.config import Truncated
from megatron_precision.data.tasks import Task, TaskPrompt
from megatron_precision.rewards.grading import Grade, Grader, Response, graded
from megatron_precision.rollout.engine import Rollout, Sampling
from megatron_precision.rollout.sampling import Prompt, Sampler
from megatron_precision.train.groups import Sampled


class TaskSampler:
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
    ) -> Sampled:
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
        return Sampled.of(found, rollouts_per_prompt)

    def close(self) -> None:
        """End what grades."""
        if self._grader is not None:
            self._grader.close()
