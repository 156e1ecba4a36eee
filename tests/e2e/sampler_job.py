"""Two replicas of a sampler on gloo, with an engine that answers each request by its seed.

    python sampler_job.py RANK PORT OUT

Each rank writes what its engine was asked for and what the sampler returned.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

import recipes
from megatron_precision.rewards.grading import graded
from megatron_precision.rollout.engine import Request, Rollout, Sampling
from megatron_precision.rollout.sampling import Prompt, Sampler


class SeedEngine:
    """Answers with the request's seed, the last request first."""

    weight_version = 3

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self._waiting: list[Request] = []

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        self.asked += requests
        self._waiting += requests

    def step(self) -> list[Rollout]:
        request = self._waiting.pop()
        return [Rollout(request, (request.seed,), (-0.5,), False, self.weight_version)]

    @property
    def unfinished(self) -> int:
        return len(self._waiting)


def main() -> None:
    rank, port, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    config = recipes.build(
        "sanity.tiny_dense",
        overrides=["parallel.tp_size=1", "parallel.rollout_tp_size=1"],
    )
    engine = SeedEngine()
    # One question comes twice, as it can over the end of an epoch.
    prompts = [Prompt(name, (1, 2)) for name in ("a", "b", "c", "d", "c")]
    sampled = Sampler(engine, config).sample(  # type: ignore[arg-type]
        prompts,
        rollouts_per_prompt=3,
        purpose="train",
        iteration=0,
        sampling=Sampling(1.0, 4),
        grade=lambda rollout: graded(float(rollout.request.prompt)),
    )
    answer = {
        "asked": [(r.prompt, r.rollout) for r in engine.asked],
        "rollouts": [(r.request.prompt, r.request.rollout, r.tokens[0]) for r in sampled.rollouts],
        "rewards": [grade.reward for grade in sampled.grades],
    }
    (out / f"rank{rank}.json").write_text(json.dumps(answer), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
