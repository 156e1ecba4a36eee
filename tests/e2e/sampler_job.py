"""Two replicas of a sampler on gloo, with an engine that answers each request by its seed.

    python sampler_job.py RANK PORT OUT

Each rank writes what its engine was asked for and what the sampler returned.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import torch.distributed as dist

import recipes
from megatron_precision.rewards.grading import Grade
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


class LateGrader:
    """Takes a response when it has finished, and grades none before it has the last one."""

    def __init__(self, engine: SeedEngine) -> None:
        self._engine = engine
        self._promised: list[tuple[Future[Grade], float]] = []
        self.still_sampled: list[int] = []

    def __call__(self, rollout: Rollout) -> Future[Grade]:
        promise: Future[Grade] = Future()
        self._promised.append((promise, float(rollout.request.prompt)))
        self.still_sampled.append(self._engine.unfinished)
        if not self._engine.unfinished:
            for future, reward in self._promised:
                future.set_result(Grade(reward))
        return promise


def main() -> None:
    rank, port, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    config = recipes.build(
        "sanity.tiny_dense",
        overrides=["parallel.tp_size=1", "parallel.rollout_tp_size=1"],
    )
    engine = SeedEngine()
    grader = LateGrader(engine)
    # One question comes twice, as it can over the end of an epoch.
    prompts = [Prompt(name, (1, 2)) for name in ("a", "b", "c", "d", "c")]
    sampled = Sampler(engine, config).sample(  # type: ignore[arg-type]
        prompts,
        rollouts_per_prompt=3,
        purpose="train",
        iteration=0,
        sampling=Sampling(1.0, 4),
        grade=grader,
    )
    answer = {
        "asked": [(r.prompt, r.rollout) for r in engine.asked],
        "rollouts": [(r.request.prompt, r.request.rollout, r.tokens[0]) for r in sampled.rollouts],
        "still_sampled": grader.still_sampled,
        "rewards": [grade.reward for grade in sampled.grades],
    }
    (out / f"rank{rank}.json").write_text(json.dumps(answer), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
