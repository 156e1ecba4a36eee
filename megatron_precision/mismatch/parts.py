"""The jobs of a comparison, run on every rank of a world of their own."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_precision.actor import parallel
from megatron_precision.actor.actor import Actor
from megatron_precision.actor.batch import Batch, make_batch
from megatron_precision.data.tasks import chat_task
from megatron_precision.layouts.hf_files import OpenCheckpoint
from megatron_precision.mismatch.comparison import (
    Comparison,
    Samples,
    Scores,
    read_samples,
    write_samples,
    write_scores,
)
from megatron_precision.platform import startup
from megatron_precision.precision import audit
from megatron_precision.precision.policy import DType
from megatron_precision.rewards.grading import Grade, graded
from megatron_precision.rollout.engine import Request, Rollout, RolloutEngine, Sampling
from megatron_precision.rollout.sampling import Prompt, Sampler
from megatron_precision.rollout.vllm_engine import VllmEngine

# Sequences of a rank between two reports of progress.
_LOT = 8
Progress = Callable[[float], None]


def progress_writer(path: Path) -> Progress:
    """Make the function that rank 0 calls with the share that is done; it writes a file."""

    def report(share: float) -> None:
        if dist.get_rank() == 0:
            path.write_text(json.dumps(share), encoding="ascii")

    return report


# ---- sampling ----------------------------------------------------------------------------


class _Watched:
    """An engine that reports its progress: its steps, of the longest response's tokens."""

    def __init__(self, engine: RolloutEngine, total: int, progress: Progress) -> None:
        self._engine, self._total, self._progress = engine, total, progress
        self._done, self._told_s = 0, 0.0

    @property
    def weight_version(self) -> int:
        return self._engine.weight_version

    @property
    def unfinished(self) -> int:
        return self._engine.unfinished

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        self._engine.submit(requests, sampling)

    def step(self) -> list[Rollout]:
        self._done += 1
        if time.monotonic() - self._told_s > 1.0:
            self._told_s = time.monotonic()
            self._progress(min(1.0, self._done / self._total))
        return self._engine.step()

    def abort(self) -> None:
        self._engine.abort()

    def update_weights(self, weight_version: int) -> None:
        self._engine.update_weights(weight_version)


def sample(comparison: Comparison, dtype: DType, progress: Progress) -> None:
    """Sample the responses of one engine dtype and write them.

    Raises:
        PrecisionAuditError: where the engine is not in the dtype.
    """
    config = comparison.of(dtype)
    parallel.open_world(startup.backend())
    task = chat_task(config)
    prompts = [p for part in task.train.values() for p in part.prompts][: comparison.num_prompts]
    engine = VllmEngine(config, Path(config.start.checkpoint), task.stop_ids)
    audit.check(list(audit.read_engine(engine)), config.policy)
    lots = -(-len(prompts) * comparison.rollouts // config.parallel.rollout_replicas)
    lots = max(1, -(-lots // config.rollout.max_num_seqs))
    watched = _Watched(engine, lots * config.rollout.max_response_tokens, progress)
    begin_s = time.perf_counter()
    sampled = Sampler(watched, config).sample(
        [Prompt(p.id, p.tokens) for p in prompts],
        rollouts_per_prompt=comparison.rollouts,
        purpose="mismatch",
        iteration=0,
        sampling=Sampling(config.rollout.temperature, config.rollout.max_response_tokens),
        grade=_ungraded,
    )
    seconds = time.perf_counter() - begin_s
    rollouts = sampled.rollouts
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    samples = Samples(
        prompts=[list(rollout.request.prompt_tokens) for rollout in rollouts],
        responses=[list(rollout.tokens) for rollout in rollouts],
        rollout_logprobs=np.array([x for r in rollouts for x in r.rollout_logprobs]),
        truncated=np.array([rollout.truncated for rollout in rollouts]),
        facts=_facts(seconds, tokens),
        routed_experts=_experts(rollouts),
    )
    if dist.get_rank() == 0:
        write_samples(comparison.sample_file(dtype), samples, comparison.sampled_from(dtype))
    dist.barrier()


def _experts(rollouts: Sequence[Rollout]) -> list[NDArray[np.uint8]] | None:
    found = [r.routed_experts for r in rollouts if r.routed_experts is not None]
    return found if len(found) == len(rollouts) else None


def _ungraded(_rollout: Rollout) -> Future[Grade]:
    """Give every response the reward 0: no reward is needed."""
    return graded(0.0)


# ---- scoring -----------------------------------------------------------------------------


def score(comparison: Comparison, dtype: DType, progress: Progress) -> None:
    """Score every engine's responses with the trainer in one dtype.

    Raises:
        PrecisionAuditError: where the trainer is not in the dtype.
        FloatingPointError: where a log-prob is not finite.
    """
    config = comparison.of(dtype)
    parallel.open_world(startup.backend())
    parallel.divide_world(config.parallel, config.seed)
    actor = Actor(config, config.optimizer, config.loss_scale)
    actor.weights.load(OpenCheckpoint(Path(config.start.checkpoint)))
    readings = audit.read_trainer(actor.model, actor.optimizer.megatron)
    audit.check(list(readings), config.policy)
    waiting = comparison.unscored(dtype)
    for number, rollout in enumerate(waiting):
        samples = read_samples(comparison.sample_file(rollout))
        begin_s = time.perf_counter()
        scores = _scores(
            actor,
            samples,
            config.parallel.dp_size,
            lambda share, number=number: progress((number + share) / len(waiting)),  # type: ignore[misc]
        )
        facts = _facts(time.perf_counter() - begin_s, len(scores.train_logprobs)) | scores.facts
        if dist.get_rank() == 0:
            made_from = comparison.scored_from(dtype, rollout)
            path = comparison.score_file(dtype, rollout)
            write_scores(path, dataclasses.replace(scores, facts=facts), made_from)
        dist.barrier()


def _scores(actor: Actor, samples: Samples, dp_size: int, progress: Progress) -> Scores:
    """Score samples with the trainer; MoE models with and without the engine's experts."""
    batch = _batch(samples)
    routing = actor.routing
    if routing is None or batch.routed_experts is None:
        return Scores(_logprobs(actor, batch, dp_size, progress), {})
    routing.replay = False
    routing.record(*batch.tokens.shape)
    own = _logprobs(actor, batch, dp_size, lambda share: progress(share / 2))
    # The position before a token predicts it.
    flipped = torch.nn.functional.pad(routing.take_recorded()[:, :-1], (1, 0))
    differ = actor.router_flips()
    assert differ is not None
    routing.replay = True
    replayed = _logprobs(actor, batch, dp_size, lambda share: progress((1 + share) / 2))
    actor.router_flips()  # they are those of other activations
    return Scores(
        own,
        {"router": dataclasses.asdict(differ)},
        flipped[batch.response_mask].numpy().astype(np.int64),
        replayed,
    )


def _logprobs(actor: Actor, batch: Batch, dp_size: int, progress: Progress) -> NDArray[np.float64]:
    """Return the trainer's log-probs of the responses' tokens, [N], at their temperature."""
    order = torch.argsort(batch.lengths, descending=True, stable=True)
    lots = list(order.split(_LOT * dp_size))
    if len(lots) > 1 and len(lots[-1]) < dp_size:  # every data-parallel rank has work in a lot
        lots[-2:] = [torch.cat(lots[-2:])]
    found = torch.zeros_like(batch.rollout_logprobs)
    for number, rows in enumerate(lots):
        found += actor.logprobs(batch, [rows])
        progress((number + 1) / len(lots))
    values: NDArray[np.float64] = found[batch.response_mask].double().numpy()
    return values


def _batch(samples: Samples) -> Batch:
    flat = iter(samples.rollout_logprobs.tolist())
    logprobs = [[next(flat) for _ in response] for response in samples.responses]
    zeros = torch.zeros(len(samples.prompts))
    return make_batch(samples.prompts, samples.responses, logprobs, zeros, samples.routed_experts)


def _facts(seconds: float, tokens: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "platform": startup.describe(),
        "versions": startup.versions(),
    }
