"""A dump's sequences through Megatron again: in another dtype or layout, and in FP32.

Micro-batches are those of the run, made by the same function of lengths and configuration. At the
run's own dtype and layout every kernel sees the same inputs, and the log-probs come back bit for
bit. Both models are whole trainers, with gradient buffers and optimizer: there is one way here to
build a model, and the cost is memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_precision.actor import parallel
from megatron_precision.actor.actor import Actor
from megatron_precision.actor.batch import Batch
from megatron_precision.config.schema import UNKNOWN_EXPERT, RunConfig
from megatron_precision.observe.dump import Arrays
from megatron_precision.platform import startup
from megatron_precision.replay.findings import Scored
from megatron_precision.replay.probe import Comparer, Recorder


def score(config: RunConfig, arrays: Arrays, tensors: Mapping[str, Any]) -> Scored:
    """Score a dump's sequences; every rank of the world calls it.

    Args:
        config: of the run, with the precision and the layout of the replay.
        tensors: the weights by their Hugging Face names.

    Raises:
        UserError: for weights that the precision cannot hold.
    """
    parallel.open_world(startup.backend())
    parallel.divide_world(config.parallel, config.seed)
    subject = _actor(config, tensors)
    batch = _batch(arrays)
    mini_batches = list(torch.arange(len(batch)).chunk(config.train.steps_per_iteration))
    if config.policy.params == "fp32":
        return _alone(subject, batch, mini_batches)
    reference = _actor(dataclasses.replace(config, precision="fp32"), tensors)
    return compare_passes(subject, reference, batch, mini_batches, config.model.num_hidden_layers)


def _actor(config: RunConfig, tensors: Mapping[str, Any]) -> Actor:
    actor = Actor(config, config.optimizer, config.loss_scale)
    actor.weights.load(tensors)
    return actor


def _alone(actor: Actor, batch: Batch, mini_batches: list[torch.Tensor]) -> Scored:
    logprobs = torch.zeros_like(batch.rollout_logprobs)
    _record_flips(actor, batch)
    for rows in mini_batches:
        for micro in actor.plan(batch, rows):
            with _flips_counted(actor):
                actor.forward(batch, micro, logprobs)
    actor.share(logprobs)
    found = _array(logprobs)
    return Scored(found, found, [], [], *_engine_flips(actor, batch))


def _record_flips(actor: Actor, batch: Batch) -> None:
    if actor.routing is not None and batch.routed_experts is not None:
        actor.routing.record(*batch.tokens.shape)


@contextlib.contextmanager
def _flips_counted(actor: Actor) -> Iterator[None]:
    with contextlib.nullcontext() if actor.routing is None else actor.routing.counted():
        yield


def _engine_flips(
    actor: Actor, batch: Batch
) -> tuple[list[float], NDArray[np.int32]] | tuple[None, None]:
    """Return how the counted passes' routers differ from the engine's, by layer and token."""
    if actor.routing is None or batch.routed_experts is None:
        return None, None
    flipped: NDArray[np.int32] = actor.routing.take_recorded().numpy()
    found = actor.routing.take_flips()
    return ([] if found is None else found.by_layer), flipped


def compare_passes(
    subject: Actor, reference: Actor, batch: Batch, mini_batches: list[torch.Tensor], layers: int
) -> Scored:
    """Run both models on every micro-batch, and the subject with exact inputs too.

    The reference's activations are kept for one micro-batch at a time.
    """
    recorder = Recorder(reference.model.module)
    comparer = Comparer(subject.model.module, recorder)
    _record_flips(subject, batch)
    replayed, exact, unused = (torch.zeros_like(batch.rollout_logprobs) for _ in range(3))
    for rows in mini_batches:
        for micro in subject.plan(batch, rows):
            reference.forward(batch, micro, exact)
            with comparer.comparing("free", batch, micro), _flips_counted(subject):
                subject.forward(batch, micro, replayed)
            with comparer.comparing("forced", batch, micro):
                subject.forward(batch, micro, unused)
    subject.share(replayed)
    reference.share(exact)
    free, forced = (comparer.errors(mode, layers) for mode in ("free", "forced"))
    return Scored(_array(replayed), _array(exact), free, forced, *_engine_flips(subject, batch))


def _array(logprobs: torch.Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = logprobs.cpu().numpy()
    return found


def _batch(arrays: Arrays) -> Batch:
    return Batch(
        tokens=torch.from_numpy(arrays.tokens.astype(np.int64)),
        response_mask=torch.from_numpy(arrays.response_mask),
        lengths=torch.from_numpy(arrays.lengths.astype(np.int64)),
        rollout_logprobs=torch.from_numpy(arrays.rollout_logprobs),
        advantages=torch.from_numpy(arrays.advantages),
        routed_experts=_experts(arrays),
    )


def _experts(arrays: Arrays) -> list[NDArray[np.uint8]] | None:
    """Return the engine's experts of each sequence, as a rollout has them."""
    every = arrays.routed_experts
    if every is None:
        return None
    known = np.where(every < 0, UNKNOWN_EXPERT, every).astype(np.uint8)
    return [row[:length] for row, length in zip(known, arrays.lengths.tolist(), strict=True)]
