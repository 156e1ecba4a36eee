"""What the ranks do in tests of the trainer's passes. Each public function runs on every rank."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_precision.actor import logprobs
from megatron_precision.actor.actor import Actor, MicroLoss
from megatron_precision.actor.batch import Batch
from megatron_precision.actor.logprobs import response_logprobs
from megatron_precision.actor.parallel import divide_world, open_world
from megatron_precision.config.schema import RunConfig
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.platform.startup import backend, start
from megatron_precision.train.warm_start import full_tensors
from tests.distributed import logprob_kernels_in_torch
from tests.distributed.cases import Case


def make_actor(config: RunConfig, tensors: dict[str, torch.Tensor]) -> Actor:
    """A trainer in this process; an earlier one's layout is taken down first."""
    start(config.seed)
    open_world(backend())
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    divide_world(config.parallel, config.seed)
    actor = Actor(config, config.optimizer, config.loss_scale)
    actor.weights.load(tensors)
    return actor


def weighted_logprobs(part: Batch, logprobs: torch.Tensor, entropies: torch.Tensor) -> MicroLoss:
    """loss = sum of weight × train_logprobs over the response; `rollout_logprobs` is the weight."""
    value = (part.rollout_logprobs * logprobs).sum()
    return MicroLoss(value, {"entropy": float(entropies.sum())}, {})


def full_gradients(actor: Actor) -> dict[str, torch.Tensor]:
    """Gradients as Hugging Face tensors, put together from every rank's regions."""
    for buffer in [*actor.model.buffers, *actor.model.expert_parallel_buffers]:
        # The distributed optimizer leaves each rank with its own shard of the sum.
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(dist.get_world_size(group)))
            mine = shards[dist.get_rank(group)].clone()
            gathered = [torch.empty_like(mine) for _ in shards]
            dist.all_gather(gathered, mine, group=group)
            bucket.grad_data.copy_(torch.cat(gathered))
    parameters = dict(actor.model.module.named_parameters())
    local = []
    for region, _ in actor.weights.views():
        grad = parameters[region.parameter].main_grad.view(region.view)
        spans = tuple(slice(begin, end) for begin, end in region.index)
        local.append((region, grad[spans].reshape(region.shape).clone()))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    full = {
        name: torch.full(shape, float("nan")) for name, shape in hf_shapes(actor._run.model).items()
    }
    for region, grad in (item for part in everyone for item in part):
        box = tuple(slice(a, a + n) for a, n in zip(region.start, region.shape, strict=True))
        full[region.hf_name][box] = grad
    return full


def passes(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """For each case: log-probs, loss, gradients, their norm, and the weights after one step."""
    results = {}
    for name, case in cases.items():
        actor = make_actor(case.config, case.tensors)
        rows = torch.arange(len(case.batch))
        plan = actor.plan(case.batch, rows)
        logprobs = actor.logprobs(case.batch, [rows])
        result = actor.gradients(case.batch, plan, weighted_logprobs)
        gradients = full_gradients(actor)
        step = actor.step(case.batch, plan, weighted_logprobs)
        gathered = full_tensors(actor, case.config.model)
        results[name] = {
            "logprobs": logprobs,
            "loss": result.loss,
            "gradients": gradients,
            "grad_norm": step.outcome.grad_norm,
            "stepped": {name: tensor.clone() for name, tensor in gathered.items()},
            "micro_batches": [len(micro.rows) for micro in plan],
        }
    return results


def both_passes(cases: dict[str, Case]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each case: log-probs of the forward-only pass, and those of the training pass."""
    results = {}
    for name, case in cases.items():
        actor = make_actor(case.config, case.tensors)
        rows = torch.arange(len(case.batch))
        old = actor.logprobs(case.batch, [rows])
        training = actor.gradients(
            case.batch, actor.plan(case.batch, rows), weighted_logprobs, keep_logprobs=True
        )
        assert training.logprobs is not None
        results[name] = (old, training.logprobs)
    return results


def sharded_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    vocab_size: int,
    temperature: float,
) -> dict[str, torch.Tensor]:
    """`response_logprobs` over a vocabulary that all ranks share; gradients put together.

    Args:
        logits: [b, L, V] of all ranks; each takes its columns.
    """
    open_world("gloo")
    shards = logits.chunk(dist.get_world_size(), dim=-1)
    mine = shards[dist.get_rank()].clone().requires_grad_(True)
    logprobs, entropies = response_logprobs(
        mine,
        tokens,
        mask,
        temperature=temperature,
        vocab_size=vocab_size,
        tp_group=dist.group.WORLD,
    )
    (weights * logprobs).sum().backward()
    assert mine.grad is not None
    gathered = [torch.empty_like(mine.grad) for _ in shards]
    dist.all_gather(gathered, mine.grad.contiguous())
    return {
        "logprobs": logprobs.detach(),
        "entropies": entropies.detach(),
        "gradient": torch.cat(gathered, -1),
    }


def many_sharded_logprobs(
    cases: dict[str, tuple[Any, ...]],
) -> dict[str, dict[str, torch.Tensor]]:
    """`sharded_logprobs` for each case."""
    return {name: sharded_logprobs(*case) for name, case in cases.items()}


def many_sharded_logprobs_by_kernels(
    cases: dict[str, tuple[Any, ...]],
) -> dict[str, dict[str, torch.Tensor]]:
    """The same on the way that a GPU takes, with PyTorch for its kernels."""
    kernels = {"megatron_precision.actor.logprob_kernels": logprob_kernels_in_torch}
    with (
        mock.patch.dict(sys.modules, kernels),
        mock.patch.object(logprobs, "by_kernels", return_value=True),
    ):
        return many_sharded_logprobs(cases)


def head_passes(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """For each case of one micro-batch: what its head multiplied, and what came of it."""
    results = {}
    for name, case in cases.items():
        actor = make_actor(case.config, case.tensors)
        rows = torch.arange(len(case.batch))
        (micro,) = actor.plan(case.batch, rows)
        hidden: list[torch.Tensor] = []
        norm = actor.model.module.decoder.final_layernorm
        norm.register_forward_hook(lambda _m, _i, out, keep=hidden: keep.append(out.detach()))
        logprobs = actor.logprobs(case.batch, [rows])
        actor.gradients(case.batch, [micro], weighted_logprobs)
        results[name] = {
            "rows": micro.rows,
            "hidden": hidden[0].transpose(0, 1),
            "logprobs": logprobs,
            "gradients": full_gradients(actor),
        }
    return results
