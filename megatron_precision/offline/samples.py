"""Files between the parts of a comparison: sampled responses, and log-probs of their tokens.

Both are NumPy archives without pickles; each names what it was made from, so that a comparison
that was stopped goes on where it was and never mixes settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """Responses that an engine sampled, flat: S responses of N tokens in all.

    Attributes:
        prompts: token ids of each response's prompt.
        responses: token ids of each response.
        rollout_logprobs: [N] the engine's, after temperature.
        truncated: [S] the response reached its limit.
        facts: how it was sampled: dtype, seconds, tokens a second, platform, versions.
        routed_experts: of each response [its prompt's and its own tokens, layers, k], the engine's
            experts; None for a dense model.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    rollout_logprobs: Floats
    truncated: NDArray[np.bool_]
    facts: dict[str, Any]
    routed_experts: list[NDArray[np.uint8]] | None = None

    @property
    def lengths(self) -> Ints:
        """[S] tokens of each response."""
        return np.array([len(response) for response in self.responses], dtype=np.int64)


@dataclass(frozen=True)
class Scores:
    """What a trainer makes of some samples' N tokens.

    Attributes:
        train_logprobs: [N] at the rollouts' temperature.
        facts: how they were scored; of an MoE model `router`, too: how its routers differ.
        router_flips: [N] layers that sent the position which predicts the token to other experts
            than the engine's; None for a dense model, as the next one.
        replayed_logprobs: [N] with the engine's experts in every router (R3).
    """

    train_logprobs: Floats
    facts: dict[str, Any]
    router_flips: Ints | None = None
    replayed_logprobs: Floats | None = None


def write_samples(path: Path, samples: Samples, made_from: str) -> None:
    """Write the archive, whole or not at all."""
    experts = samples.routed_experts
    _write(
        path,
        made_from,
        samples.facts,
        prompt_lengths=np.array([len(p) for p in samples.prompts]),
        prompts=np.array([t for p in samples.prompts for t in p], dtype=np.int64),
        lengths=samples.lengths,
        tokens=np.array([t for r in samples.responses for t in r], dtype=np.int64),
        rollout_logprobs=samples.rollout_logprobs.astype(np.float32),
        truncated=samples.truncated,
        **({} if experts is None else {"routed_experts": np.concatenate(experts)}),
    )


def read_samples(path: Path) -> Samples:
    """Read what `write_samples` wrote."""
    with np.load(path, allow_pickle=False) as found:
        experts = None
        if "routed_experts" in found:
            ends = np.cumsum(found["prompt_lengths"] + found["lengths"])[:-1]
            experts = np.split(found["routed_experts"], ends)
        return Samples(
            prompts=list(_cut(found["prompts"], found["prompt_lengths"])),
            responses=list(_cut(found["tokens"], found["lengths"])),
            rollout_logprobs=found["rollout_logprobs"].astype(np.float64),
            truncated=found["truncated"],
            facts=json.loads(str(found["facts"])),
            routed_experts=experts,
        )


def write_scores(path: Path, scores: Scores, made_from: str) -> None:
    """Write the archive, whole or not at all."""
    arrays: dict[str, Any] = {"train_logprobs": scores.train_logprobs.astype(np.float32)}
    if scores.router_flips is not None and scores.replayed_logprobs is not None:
        arrays["router_flips"] = scores.router_flips.astype(np.int32)
        arrays["replayed_logprobs"] = scores.replayed_logprobs.astype(np.float32)
    _write(path, made_from, scores.facts, **arrays)


def read_scores(path: Path) -> Scores:
    """Read what `write_scores` wrote."""
    with np.load(path, allow_pickle=False) as found:
        routed = "router_flips" in found
        return Scores(
            train_logprobs=found["train_logprobs"].astype(np.float64),
            facts=json.loads(str(found["facts"])),
            router_flips=found["router_flips"].astype(np.int64) if routed else None,
            replayed_logprobs=found["replayed_logprobs"].astype(np.float64) if routed else None,
        )


def is_made_from(path: Path, made_from: str) -> bool:
    """Whether the archive is there and of these settings."""
    if not path.is_file():
        return False
    with np.load(path, allow_pickle=False) as found:
        return str(found["made_from"]) == made_from


def _write(path: Path, made_from: str, facts: dict[str, Any], **arrays: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, made_from=np.array(made_from), facts=np.array(json.dumps(facts)), **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _cut(flat: Sequence[int] | NDArray[Any], lengths: NDArray[Any]) -> Iterator[list[int]]:
    begin = 0
    for length in lengths.tolist():
        yield [int(t) for t in flat[begin : begin + length]]
        begin += length
