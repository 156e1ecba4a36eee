"""Defines a mismatch comparison: its parts, one dtype on one side each, and the files between them.

    sample-<dtype>.npz              responses that the engine sampled in that dtype
    score-<dtype>-of-<dtype>.npz    the trainer's log-probs of an engine dtype's responses

Each part is a job of its own, so that no process ever holds two dtypes. The files are NumPy
archives without pickles. Each records the settings that it was made from, so that a stopped
comparison resumes, skips finished parts and never mixes settings. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_precision.config.schema import (
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    StartConfig,
    TaskConfig,
    TrainConfig,
    fingerprint,
    to_dict,
)
from megatron_precision.layouts.hf_config import read_model
from megatron_precision.precision.policy import DType

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
        """The number of tokens of each response, [S]."""
        return np.array([len(response) for response in self.responses], dtype=np.int64)


@dataclass(frozen=True)
class Scores:
    """A trainer's scores of some samples' N tokens.

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
    """Say whether the archive exists and was made with these settings."""
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


Side = Literal["sample", "score"]
SET = "prompts"
# Longer prompts are left out, unless `--set task.max_prompt_tokens` says otherwise.
_PROMPT_TOKENS = 512
# Padded tokens of one pass of the trainer, unless one sequence is longer.
_PASS_TOKENS = 2048


@dataclass(frozen=True)
class Comparison:
    """A comparison: its dtypes, checkpoint and prompts.

    Attributes:
        config: precision apart, the run that every part belongs to.
        train, rollout: the matrix' dtypes.
        num_prompts, rollouts: how many prompts, and responses to each.
        out: the folder of its files.
    """

    config: RunConfig
    train: tuple[DType, ...]
    rollout: tuple[DType, ...]
    num_prompts: int
    rollouts: int
    out: Path

    def of(self, dtype: DType) -> RunConfig:
        """Return the configuration of a part."""
        return dataclasses.replace(self.config, precision=dtype)

    def sample_file(self, rollout: DType) -> Path:
        """Return the file of the responses of an engine's dtype."""
        return self.out / f"sample-{rollout}.npz"

    def score_file(self, train: DType, rollout: DType) -> Path:
        """Return the file of a trainer's log-probs of an engine's responses."""
        return self.out / f"score-{train}-of-{rollout}.npz"

    def part_folder(self, side: Side, dtype: DType) -> Path:
        """Return the folder of a part's job, with its configuration and log."""
        return self.out / "parts" / f"{side}-{dtype}"

    def took_file(self, side: Side, dtype: DType) -> Path:
        """Return the file with the seconds that a part took, its start included."""
        return self.part_folder(side, dtype) / "took_s.json"

    def took_s(self) -> dict[str, float]:
        """Return the seconds of every part, by its name."""
        jobs: list[tuple[Side, DType]] = [("sample", r) for r in self.rollout]
        jobs += [("score", t) for t in self.train]
        paths = {f"{side}-{dtype}": self.took_file(side, dtype) for side, dtype in jobs}
        return {
            name: float(json.loads(path.read_text(encoding="ascii")))
            for name, path in paths.items()
            if path.is_file()
        }

    def sampled_from(self, rollout: DType) -> str:
        """Hash all that the responses depend on."""
        values = to_dict(self.of(rollout))
        return fingerprint([values, self.num_prompts, self.rollouts])

    def scored_from(self, train: DType, rollout: DType) -> str:
        """Hash all that the log-probs depend on."""
        return fingerprint([to_dict(self.of(train)), self.sampled_from(rollout)])

    def unsampled(self) -> list[DType]:
        """List the engine dtypes whose responses are still to be sampled."""
        return [
            r for r in self.rollout if not is_made_from(self.sample_file(r), self.sampled_from(r))
        ]

    def unscored(self, train: DType) -> list[DType]:
        """List the engine dtypes whose responses a trainer's dtype has still to score."""
        return [
            r
            for r in self.rollout
            if not is_made_from(self.score_file(train, r), self.scored_from(train, r))
        ]

    def parts(self) -> Iterator[tuple[Side, DType]]:
        """List the jobs that are still to be run, in order."""
        fresh = self.unsampled()
        yield from (("sample", dtype) for dtype in fresh)
        yield from (("score", t) for t in self.train if fresh or self.unscored(t))


def base_config(
    model_dir: Path, prompts: Path, *, ranks: int, max_tokens: int, temperature: float, seed: int
) -> RunConfig:
    """Return the configuration that `--set` changes: each rank a replica and a trainer.

    Raises:
        UserError: where the folder holds no model that is known here.
    """
    model = read_model(model_dir / "config.json")
    room = max(1, model.max_position_embeddings - max_tokens)
    task = TaskConfig(
        name="chat", train_sets=(f"{SET}={prompts}",), max_prompt_tokens=min(_PROMPT_TOKENS, room)
    )
    longest = task.max_prompt_tokens + max_tokens
    return RunConfig(
        recipe="mismatch",
        seed=seed,
        model=model,
        parallel=ParallelConfig(world_size=ranks, tp_size=1, rollout_tp_size=1),
        task=task,
        start=StartConfig("checkpoint", str(model_dir)),
        rollout=RolloutConfig(
            max_response_tokens=max_tokens,
            max_num_seqs=64,
            kv_cache_mib=2048,
            temperature=temperature,
        ),
        train=TrainConfig(micro_batch_tokens=-(-max(longest, _PASS_TOKENS) // 8) * 8),
    )
