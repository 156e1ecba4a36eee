"""Sample groups of rollouts on every replica, in lockstep, with rewards as responses finish."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from megatron_precision.config import RunConfig
from megatron_precision.rollout.engine import (
    Request,
    Rollout,
    RolloutEngine,
    Sampling,
    request_seed,
    token_hash,
)


@dataclass(frozen=True)
class Prompt:
    """A question to sample, by an identity that does not depend on its place in a batch."""

    name: str
    tokens: tuple[int, ...]


class TokenDisagreementError(RuntimeError):
    """The ranks of one tensor-parallel replica sampled different tokens."""


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

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        rollouts_per_prompt: int,
        purpose: str,
        iteration: int,
        sampling: Sampling,
        reward: Callable[[Rollout], float],
    ) -> tuple[list[Rollout], list[float]]:
        """Sample every prompt `rollouts_per_prompt` times.

        Args:
            purpose: names the random stream (`train`, `eval`, ...).
            reward: called as soon as a response has finished.

        Returns:
            Rollouts ordered by prompt and rollout, and their rewards; equal on every rank.

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
        finished: list[tuple[Rollout, float]] = []
        with _collector_paused():
            while self._engine.unfinished:
                for rollout in self._engine.step():
                    finished.append((rollout, reward(rollout)))
        return self._share(finished)

    def _share(self, finished: list[tuple[Rollout, float]]) -> tuple[list[Rollout], list[float]]:
        mine = finished if self._tp_rank == 0 else []
        everyone: list[tuple[str, list[tuple[Rollout, float]]]]
        everyone = [("", [])] * dist.get_world_size()
        dist.all_gather_object(everyone, (token_hash([r for r, _ in finished]), mine))
        for rank, (digest, _) in enumerate(everyone):
            leader = rank - rank % self._tp_size
            if digest != everyone[leader][0]:
                raise TokenDisagreementError(
                    f"rank {rank} sampled other tokens than rank {leader} of its replica: their "
                    "weights, request order or random streams differ"
                )
        results = [item for _, part in everyone for item in part]
        results.sort(key=lambda item: (item[0].request.prompt, item[0].request.rollout))
        return [rollout for rollout, _ in results], [reward for _, reward in results]


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep Python's collector from walking every request at each step: a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _streams(prompts: Sequence[Prompt]) -> list[str]:
    """A name for each prompt's random streams: its own, numbered where it has come before.

    Over the end of an epoch a question can come twice in one iteration; with the same seeds its
    second group would repeat the first.
    """
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        names.append(f"{prompt.name}#{seen[prompt.name]}" if seen[prompt.name] else prompt.name)
        seen[prompt.name] += 1
    return names
