"""What a comparison is made of: parts that each hold one dtype on one side, and their files.

    sample-<dtype>.npz              responses of the engine in that dtype
    score-<dtype>-of-<dtype>.npz    the trainer's log-probs, of responses of an engine's dtype

A part is a job of its own: no process ever holds two dtypes, and one that was made is not made
again. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_precision.config import (
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    StartConfig,
    TaskConfig,
    TrainConfig,
    fingerprint,
    to_dict,
)
from megatron_precision.offline.samples import is_made_from
from megatron_precision.precision.policy import DType
from megatron_precision.weights.hf_config import read_model

Side = Literal["sample", "score"]
SET = "prompts"
# Longer prompts are left out, unless `--set task.max_prompt_tokens` says otherwise.
_PROMPT_TOKENS = 512
# Padded tokens of one pass of the trainer, unless one sequence is longer.
_PASS_TOKENS = 2048


@dataclass(frozen=True)
class Comparison:
    """Which dtypes are compared, on what.

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
        """The configuration of a part."""
        return dataclasses.replace(self.config, precision=dtype)

    def sample_file(self, rollout: DType) -> Path:
        """Where the responses of an engine's dtype are."""
        return self.out / f"sample-{rollout}.npz"

    def score_file(self, train: DType, rollout: DType) -> Path:
        """Where a trainer's log-probs of an engine's responses are."""
        return self.out / f"score-{train}-of-{rollout}.npz"

    def part_folder(self, side: Side, dtype: DType) -> Path:
        """Where a part's job has its configuration and its log."""
        return self.out / "parts" / f"{side}-{dtype}"

    def took_file(self, side: Side, dtype: DType) -> Path:
        """Seconds that a part took, its start included."""
        return self.part_folder(side, dtype) / "took_s.json"

    def took_s(self) -> dict[str, float]:
        """Seconds of every part, by its name."""
        jobs: list[tuple[Side, DType]] = [("sample", r) for r in self.rollout]
        jobs += [("score", t) for t in self.train]
        paths = {f"{side}-{dtype}": self.took_file(side, dtype) for side, dtype in jobs}
        return {
            name: float(json.loads(path.read_text(encoding="ascii")))
            for name, path in paths.items()
            if path.is_file()
        }

    def sampled_from(self, rollout: DType) -> str:
        """Names all that the responses depend on."""
        values = to_dict(self.of(rollout))
        return fingerprint([values, self.num_prompts, self.rollouts])

    def scored_from(self, train: DType, rollout: DType) -> str:
        """Names all that the log-probs depend on."""
        return fingerprint([to_dict(self.of(train)), self.sampled_from(rollout)])

    def unsampled(self) -> list[DType]:
        """Engine dtypes whose responses are still to be sampled."""
        return [
            r for r in self.rollout if not is_made_from(self.sample_file(r), self.sampled_from(r))
        ]

    def unscored(self, train: DType) -> list[DType]:
        """Engine dtypes whose responses a trainer's dtype has still to score."""
        return [
            r
            for r in self.rollout
            if not is_made_from(self.score_file(train, r), self.scored_from(train, r))
        ]

    def parts(self) -> Iterator[tuple[Side, DType]]:
        """The jobs that are still to be run, in order."""
        fresh = self.unsampled()
        yield from (("sample", dtype) for dtype in fresh)
        yield from (("score", t) for t in self.train if fresh or self.unscored(t))


def base_config(
    model_dir: Path, prompts: Path, *, ranks: int, max_tokens: int, temperature: float, seed: int
) -> RunConfig:
    """The configuration that `--set` starts from: each rank a replica and a trainer of its own.

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
