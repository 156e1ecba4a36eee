"""Samples groups of rollouts on every replica in lockstep, and grades responses as they finish."""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from megatron_precision.config.schema import RunConfig
from megatron_precision.rewards.grading import Grade
from megatron_precision.rollout.engine import (
    Request,
    Rollout,
    RolloutEngine,
    Sampling,
    request_seed,
    token_hash,
)

# Rollouts that an error names.
_SHOWN = 10


@dataclass(frozen=True)
class Prompt:
    """A question to sample; its name does not depend on its place in a batch."""

    name: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class GradedRollouts:
    """Rollouts with their grades, ordered by prompt and rollout; equal on every rank.

    Attributes:
        grading_s: seconds that this rank gave to grading: handing responses over, and waiting
            for the last grades after the last response.
    """

    rollouts: list[Rollout]
    grades: list[Grade]
    grading_s: float


class TokenDisagreementError(RuntimeError):
    """The ranks of one tensor-parallel replica sampled different tokens."""


class NonFiniteLogprobError(FloatingPointError):
    """The engine gave a sampled token a log-prob that is not finite."""


class Sampler:
    """Samples on this rank's replica and shares the results with the whole job.

    Prompts are dealt to the replicas in turn. Seeds belong to requests, so the result is the
    same for any number of replicas, and no replica repeats another.
    """

    def __init__(self, engine: RolloutEngine, config: RunConfig) -> None:
        self._engine = engine
        self._seed = config.seed
        self._replicas = config.parallel.rollout_replicas
        tp_size = config.parallel.rollout_tp_size
        self._replica, self._tp_rank = divmod(dist.get_rank(), tp_size)
        self._tp_size = tp_size

    @property
    def grades(self) -> bool:
        """True if this rank grades its replica's responses."""
        return self._tp_rank == 0

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        rollouts_per_prompt: int,
        purpose: str,
        iteration: int,
        sampling: Sampling,
        grade: Callable[[Rollout], Future[Grade]],
    ) -> GradedRollouts:
        """Sample every prompt `rollouts_per_prompt` times.

        Args:
            purpose: names the random stream (`train`, `eval`, ...).
            grade: called as soon as a response has finished, on the ranks that grade; the grades
                are waited for when the engine has nothing left to do.

        Raises:
            TokenDisagreementError: where ranks of one replica sampled different tokens.
        """
        requests = [
            Request(
                number,
                rollout,
                prompt.tokens,
                request_seed(self._seed, purpose, iteration, name, rollout),
            )
            for number, (prompt, name) in enumerate(zip(prompts, _streams(prompts), strict=True))
            if number % self._replicas == self._replica
            for rollout in range(rollouts_per_prompt)
        ]
        # The engine gets everything at once: its scheduler fills the batch better than we could.
        self._engine.submit(requests, sampling)
        finished: list[Rollout] = []
        pending: list[Future[Grade]] = []
        grading_s = 0.0
        with _collector_paused():
            while self._engine.unfinished:
                done = self._engine.step()
                finished += done
                if self.grades and done:
                    begin = time.perf_counter()
                    pending += [grade(rollout) for rollout in done]
                    grading_s += time.perf_counter() - begin
        begin = time.perf_counter()
        grades = [future.result() for future in pending]
        grading_s += time.perf_counter() - begin
        return self._share(prompts, finished, grades, grading_s)

    def _share(
        self,
        prompts: Sequence[Prompt],
        finished: list[Rollout],
        grades: list[Grade],
        grading_s: float,
    ) -> GradedRollouts:
        mine = list(zip(finished, grades, strict=True)) if self.grades else []
        everyone: list[tuple[str, list[tuple[Rollout, Grade]]]]
        everyone = [("", [])] * dist.get_world_size()
        dist.all_gather_object(everyone, (token_hash(finished), mine))
        for rank, (digest, _) in enumerate(everyone):
            leader = rank - rank % self._tp_size
            if digest != everyone[leader][0]:
                raise TokenDisagreementError(
                    f"rank {rank} sampled other tokens than rank {leader} of its replica: their "
                    "weights, request order or random streams differ"
                )
        refuse_non_finite(prompts, [[rollout for rollout, _ in part] for _, part in everyone])
        results = [item for _, part in everyone for item in part]
        results.sort(key=lambda item: (item[0].request.prompt, item[0].request.rollout))
        return GradedRollouts([r for r, _ in results], [g for _, g in results], grading_s)


def refuse_non_finite(prompts: Sequence[Prompt], by_rank: Sequence[Sequence[Rollout]]) -> None:
    """Refuse log-probs that are not finite: they are never trained on.

    Args:
        by_rank: rollouts of the ranks that speak for a replica; of others, none.

    Raises:
        NonFiniteLogprobError: naming the requests and their ranks.
    """
    wrong = []
    for rank, rollouts in enumerate(by_rank):
        for rollout in rollouts:
            if math.isfinite(sum(rollout.rollout_logprobs)):
                continue
            at, value = next(
                (at, value)
                for at, value in enumerate(rollout.rollout_logprobs)
                if not math.isfinite(value)
            )
            request = rollout.request
            wrong.append(
                f"rank {rank}: prompt {prompts[request.prompt].name}, rollout {request.rollout}: "
                f"log-prob {value} of token {at} of {len(rollout.tokens)}"
            )
    if wrong:
        more = f"\n  ... and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise NonFiniteLogprobError(
            f"the engine's log-probs of {len(wrong)} rollouts are not finite, and are not trained "
            "on; look at precision/act_max_rollout and at the dtype of the rollouts:\n  "
            + "\n  ".join(wrong[:_SHOWN])
            + more
        )


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector, which would visit every request at each step."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _streams(prompts: Sequence[Prompt]) -> list[str]:
    """Name each prompt's random stream: its own name, numbered if it repeats.

    Over the end of an epoch a question can come twice in one iteration; with the same seeds its
    second group would repeat the first.
    """
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        names.append(f"{prompt.name}#{seen[prompt.name]}" if seen[prompt.name] else prompt.name)
        seen[prompt.name] += 1
    return names
