"""What the ranks do in tests of skipped steps. Each public function runs on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_precision.actor.actor import Actor
from megatron_precision.precision import audit
from tests.distributed.actor_bodies import make_actor, weighted_logprobs
from tests.distributed.cases import Case

Snapshot = dict[str, torch.Tensor]


def snapshot(actor: Actor) -> Snapshot:
    """Every number that a skipped step must leave alone: parameters, main copies, Adam's state."""
    state = {f"param {n}": p.data.clone() for n, p in actor.model.module.named_parameters()}
    for number, member in enumerate(actor.optimizer.members):
        main = [p for group in member.optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(main):
            state[f"main {number} {index}"] = parameter.data.clone()
            for key, value in member.optimizer.state.get(parameter, {}).items():
                state[f"{key} {number} {index}"] = torch.as_tensor(value).clone()
        for index, group in enumerate(member.optimizer.param_groups):
            if "step" in group:
                state[f"step {number} group {index}"] = torch.as_tensor(group["step"]).clone()
    return state


def changed(before: Snapshot, after: Snapshot) -> list[str]:
    """Names that are new (Adam's state after the first step) or whose bits differ, on any rank."""
    assert before.keys() <= after.keys()
    mine = [n for n in after if n not in before or not torch.equal(before[n], after[n])]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return sorted({name for part in everyone for name in part})


def kinds(state: Snapshot) -> list[str]:
    """First words of the snapshot's names: what it covers."""
    return sorted({name.split()[0] for name in state})


def spoil_one_dense_gradient(actor: Actor, on_rank: int) -> None:
    """Write an inf into one dense parameter's `main_grad` inside one rank's own shard."""
    (buffer,) = actor.model.buffers
    if dist.get_rank() != on_rank:
        return
    group = buffer.data_parallel_group
    shard = buffer.buckets[0].grad_data.chunk(dist.get_world_size(group))[dist.get_rank(group)]
    begin, end = shard.storage_offset(), shard.storage_offset() + shard.numel()
    for parameter in actor.model.module.parameters():
        grad = parameter.main_grad
        if getattr(parameter, "allreduce", True) and begin <= grad.storage_offset() < end:
            grad.view(-1)[0] = float("inf")
            return
    raise AssertionError("no dense parameter begins in this rank's shard")


def record(actor: Actor, before: Snapshot, outcome: Any) -> dict[str, Any]:
    return {
        "skipped": outcome.skipped,
        "grad_norm": outcome.grad_norm,
        "applied_steps": actor.optimizer.applied_steps,
        "scales": _everywhere([float(m.grad_scaler.scale) for m in actor.optimizer.members]),
        "changed": changed(before, snapshot(actor)),
    }


def _everywhere(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def dense_overflow_in_a_chain(case: Case) -> dict[str, Any]:
    """A good step, two with an inf in one dense gradient on rank 1, and a good one."""
    actor = make_actor(case.config, case.tensors)
    plan = actor.plan(case.batch, torch.arange(len(case.batch)))
    steps = []
    for spoil in (False, True, True, False):
        before = snapshot(actor)
        actor.gradients(case.batch, plan, weighted_logprobs)
        expert_grads = [b.grad_data.abs().max().item() for b in actor.model.expert_parallel_buffers]
        if spoil:
            spoil_one_dense_gradient(actor, on_rank=1)
        steps.append(record(actor, before, actor.optimizer.step()))
        steps[-1]["expert_gradients"] = _everywhere(expert_grads)
    return {"steps": steps, "kinds": kinds(snapshot(actor)), "router": _router_dtypes(actor, case)}


def _router_dtypes(actor: Actor, case: Case) -> dict[str, list[str]]:
    """dtypes that one pass shows, by the policy's field."""
    plan = actor.plan(case.batch, torch.arange(len(case.batch)))
    with audit.ForwardReadings(actor.model) as watch:
        actor.gradients(case.batch, plan, weighted_logprobs)
    seen: dict[str, list[str]] = {}
    for reading in watch.readings:
        seen.setdefault(reading.kind, []).append(str(reading.dtype))
    audit.check(watch.readings, actor.policy)
    return seen


def overflow_by_scale(case: Case, scale: float) -> list[dict[str, Any]]:
    """A good step, one at a loss scale that overflows, and two at the first scale."""
    actor = make_actor(case.config, case.tensors)
    assert actor.optimizer.loss_scale is not None
    usual = actor.optimizer.loss_scale.value
    plan = actor.plan(case.batch, torch.arange(len(case.batch)))
    steps = []
    for value in (usual, scale, usual, usual):
        actor.optimizer.loss_scale.value = value
        before = snapshot(actor)
        result = actor.step(case.batch, plan, weighted_logprobs)
        steps.append(record(actor, before, result.outcome))
        steps[-1]["finite_forward"] = result.finite_forward
    return steps


def optimizer_experiments(moe: Case, dense: Case) -> dict[str, Any]:
    """All of the above in one world."""
    return {"chain": dense_overflow_in_a_chain(moe), "scale": overflow_by_scale(dense, 2.0**40)}
