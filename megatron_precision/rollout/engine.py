"""Defines what the loop needs of a rollout engine: submit, step and abort, and nothing that blocks.

A group is all rollouts of one prompt. Every request has its own seed, hashed from its purpose, so
the result does not depend on batching, replica or parallel layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of a request.

    Attributes:
        temperature: 0 is greedy.
        max_tokens: the longest response; a response that reaches it is truncated.
        logprobs: whether the sampled tokens' log-probs (after temperature) are returned.
        top_p: of evaluation alone; with less than 1 no log-probs are to be had.
    """

    temperature: float
    max_tokens: int
    logprobs: bool = True
    top_p: float = 1.0

    def __post_init__(self) -> None:
        # vLLM would give those of the cut distribution, which nobody differentiates.
        assert self.top_p == 1.0 or not self.logprobs


@dataclass(frozen=True)
class Request:
    """One rollout to sample: `prompt` and `rollout` number it within the call."""

    prompt: int
    rollout: int
    prompt_tokens: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    Attributes:
        request: what was asked.
        tokens: the response, with the token that ended it unless truncated.
        rollout_logprobs: the engine's log-prob of each token after temperature; empty where not
            asked for.
        truncated: the response reached `max_tokens`.
        weight_version: of the weights that sampled it.
        routed_experts: [prompt and response tokens, layers, k] uint8, the experts that the
            engine's routers chose (`rollout/routed_experts.py`); None where not recorded.
    """

    request: Request
    tokens: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    truncated: bool
    weight_version: int
    routed_experts: NDArray[np.uint8] | None = field(default=None, compare=False)


class RolloutEngine(Protocol):
    """An engine replica; its ranks call every method together, with the same arguments."""

    @property
    def weight_version(self) -> int:
        """The version of the weights that the engine samples with."""

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Queue requests."""

    def step(self) -> list[Rollout]:
        """Advance every running request by one scheduler step; return those that finished."""

    def abort(self) -> None:
        """Drop all unfinished requests."""

    @property
    def unfinished(self) -> int:
        """The number of requests that are queued or running."""

    def update_weights(self, weight_version: int) -> None:
        """Take the trainer's weights by the connected plan, and drop all cached prefixes."""


def request_seed(run_seed: int, purpose: str, iteration: int, prompt: str, rollout: int) -> int:
    """Hash a request's purpose into a seed of 62 bits, equal in every layout.

    Args:
        purpose: `train`, `eval`, ...: keeps the streams of different uses apart.
        prompt: the question's identity, not its place in a batch.
    """
    text = f"{run_seed}|{purpose}|{iteration}|{prompt}|{rollout}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def token_hash(rollouts: Sequence[Rollout]) -> str:
    """Hash sampled tokens, whatever the order in which they finished."""
    digest = hashlib.sha256()
    for rollout in sorted(rollouts, key=lambda r: (r.request.prompt, r.request.rollout)):
        digest.update(repr((rollout.request, rollout.tokens)).encode())
    return digest.hexdigest()
