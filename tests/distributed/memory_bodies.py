"""What the ranks do in tests of the memory plan. Each public function runs on every rank."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from megatron_precision.actor.actor import Actor
from tests.distributed.actor_bodies import full_gradients, make_actor, weighted_logprobs
from tests.distributed.cases import Case


def footprints_and_gradients(
    held: dict[str, Case], differentiated: dict[str, Case]
) -> dict[str, dict[str, Any]]:
    """`footprints` of some cases and `gradients` of others, in one world."""
    return {"footprints": footprints(held), "gradients": gradients(differentiated)}


def footprints(cases: dict[str, Case]) -> dict[str, list[dict[str, int]]]:
    """For each case, what every rank holds after one step, in bytes."""
    results = {}
    for name, case in cases.items():
        actor = make_actor(case.config, case.tensors)
        rows = torch.arange(len(case.batch))
        plan = actor.plan(case.batch, rows)
        saved = _saved_bytes(actor, case, plan)
        actor.step(case.batch, plan, weighted_logprobs)
        held = {
            "parameters": sum(p.nbytes for p in actor.model.module.parameters()),
            "named": len(list(actor.model.module.parameters())),
            "gradients": sum(
                buffer.grad_data.nbytes
                for buffer in [*actor.model.buffers, *actor.model.expert_parallel_buffers]
            ),
            "optimizer": _optimizer_bytes(actor),
            "saved": saved,
        }
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, held)
        results[name] = everyone
    return results


def _own_storages(actor: Actor) -> set[int]:
    """Addresses of the storages of parameters and of accumulated gradients."""
    buffers = [*actor.model.buffers, *actor.model.expert_parallel_buffers]
    owned = [*actor.model.module.parameters(), *(b.grad_data for b in buffers)]
    owned += [buffer.param_data for buffer in buffers]
    return {tensor.untyped_storage().data_ptr() for tensor in owned}


class _Saved:
    """Storages that autograd keeps at a time, parameters and gradients left out.

    Attributes:
        peak: their bytes when they were most.
    """

    def __init__(self, actor: Actor) -> None:
        self._own = _own_storages(actor)
        self._count: Counter[int] = Counter()
        self._now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> _Kept:
        return _Kept(self, tensor)

    def add(self, tensor: torch.Tensor, sign: int) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._own:
            return
        before = self._count[storage.data_ptr()]
        self._count[storage.data_ptr()] += sign
        if min(before, before + sign) == 0:  # the first of a storage, or the last
            self._now += sign * storage.nbytes()
            self.peak = max(self.peak, self._now)


class _Kept:
    """What autograd holds for a saved tensor: it goes when its node in the graph goes."""

    def __init__(self, saved: _Saved, tensor: torch.Tensor) -> None:
        self.saved, self.tensor = saved, tensor
        saved.add(tensor, 1)

    def __del__(self) -> None:
        self.saved.add(self.tensor, -1)


def _saved_bytes(actor: Actor, case: Case, plan: list[Any]) -> int:
    """The most that autograd keeps at a time in one forward and backward pass."""
    saved = _Saved(actor)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
        actor.gradients(case.batch, plan, weighted_logprobs)
    return saved.peak


def _optimizer_bytes(actor: Actor) -> int:
    """FP32 main copies of this rank's share, and Adam's state of them."""
    own = _own_storages(actor)
    found = 0
    for member in actor.optimizer.members:
        inner = member.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                if parameter.untyped_storage().data_ptr() not in own:
                    found += parameter.nbytes
                found += sum(
                    value.nbytes
                    for value in inner.state[parameter].values()
                    if isinstance(value, torch.Tensor) and value.numel() > 1
                )
    return found


def gradients(cases: dict[str, Case]) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of each case, put together."""
    results = {}
    for name, case in cases.items():
        actor = make_actor(case.config, case.tensors)
        rows = torch.arange(len(case.batch))
        actor.gradients(case.batch, actor.plan(case.batch, rows), weighted_logprobs)
        results[name] = full_gradients(actor)
    return results
