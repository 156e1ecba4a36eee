"""What the ranks of distributed tests do. Each function runs on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_precision.actor.actor import Actor, MicroLoss
from megatron_precision.actor.batch import Batch
from megatron_precision.actor.parallel import divide_world, open_world
from megatron_precision.config import RunConfig
from megatron_precision.platform.startup import start


def make_actor(config: RunConfig, tensors: dict[str, torch.Tensor] | None = None) -> Actor:
    start(config.seed)
    open_world("gloo")
    divide_world(config.parallel, config.seed)
    actor = Actor(config, config.optimizer, config.loss_scale)
    if tensors is not None:
        actor.load(tensors)
    return actor


def weighted_logprob_loss(weights: torch.Tensor):
    """loss = sum over response tokens of weight[row, position] * train_logprobs."""

    def loss(part: Batch, logprobs: torch.Tensor, entropies: torch.Tensor) -> MicroLoss:
        # rollout_logprobs carries the weights: it is sliced as the log-probs are.
        value = (part.rollout_logprobs * logprobs).sum()
        return MicroLoss(value, {"entropy": float(entropies.sum())}, {})

    return loss


def full_gradients(actor: Actor) -> dict[str, torch.Tensor]:
    """Gradients as Hugging Face tensors on rank 0, put together from every rank's pieces."""
    for buffer in [*actor.model.buffers, *actor.model.expert_parallel_buffers]:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(dist.get_world_size(group)))
            mine = shards[dist.get_rank(group)].clone()
            gathered = [torch.empty_like(mine) for _ in shards]
            dist.all_gather(gathered, mine, group=group)
            bucket.grad_data.copy_(torch.cat(gathered))
    parameters = dict(actor.model.module.named_parameters())
    local = []
    for piece, _ in actor.weight_pieces():
        grad = parameters[piece.parameter].main_grad.view(piece.view)
        spans = tuple(slice(a, b) for a, b in piece.index)
        local.append((piece, grad[spans].reshape(piece.shape).clone()))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    full: dict[str, torch.Tensor] = {}
    from megatron_precision.weights.qwen3 import hf_shapes

    for name, shape in hf_shapes(actor._run.model).items():
        full[name] = torch.full(shape, float("nan"))
    for part in everyone:
        for piece, grad in part:
            box = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))
            full[piece.hf_name][box] = grad
    return full


def logprobs_and_gradients(
    config: RunConfig, tensors: dict[str, torch.Tensor], batch: Batch
) -> dict[str, Any]:
    actor = make_actor(config, tensors)
    rows = torch.arange(len(batch))
    logprobs = actor.logprobs(batch, [rows])
    result = actor.gradients(
        batch, actor.plan(batch, rows), weighted_logprob_loss(batch.rollout_logprobs)
    )
    return {
        "logprobs": logprobs,
        "loss": result.loss,
        "entropy": result.sums["entropy"],
        "gradients": full_gradients(actor),
    }
