"""What the ranks do in tests of the transport: a plan on live tensors, and what arrived."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.sync import full_gather, measure
from benchmarks.sync.parameters import engine_coordinates
from megatron_precision.sync.families import RolloutLayout
from megatron_precision.sync.plan import PlanError, Planner, rank_groups
from megatron_precision.sync.transfer import Transfer
from megatron_precision.sync.transport import Transport
from tests.distributed.layout_oracle import RankTensors, engine_rank, numbered, trainer_rank


def run_plan(planner: Planner, dtype: torch.dtype, batch_bytes: int) -> list[dict[str, Any]]:
    """Twice, with other numbers the second time; what went wrong and how much moved, by rank."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    empty = RankTensors()
    trainers, engines = planner.trainer.world, planner.rollout.world
    source = trainer_rank(planner.model, planner.trainer, rank) if rank in trainers else empty
    target = engine_rank(planner.model, planner.rollout, rank) if rank in engines else empty
    weights = {name: tensor.to(dtype) for name, tensor in source.tensors.items()}
    held = {name: torch.full(t.shape, -1.0) for name, t in target.tensors.items()}
    transport = Transport(
        rank_groups(planner, rank),
        [(region, weights[region.parameter]) for region in source.regions],
        [(region, held[region.parameter]) for region in target.regions],
        wire=dtype,
        world_size=dist.get_world_size(),
        batch_bytes=batch_bytes,
    )
    wrong = 0
    for change in (0.0, 512.0):
        for tensor in weights.values():
            tensor.add_(change)
        for group in range(planner.group_count):
            transport.run(group)
        model = {n: t.to(dtype) + change for n, t in numbered(planner.model).items()}
        for region in target.regions:
            view = held[region.parameter].view(region.view)[region.spans]
            expected = model[region.hf_name][region.box].reshape(view.shape).float()
            wrong += int((view != expected).sum())
    # The same layouts as `sync-bench --execute` has them: it raises where a weight differs.
    measured = measure.run(planner, dtype, batch_bytes, 1, torch.device("cpu"))
    mine = {
        "wrong": wrong,
        "received": measured.received,
        "buffers": transport.buffer_bytes,
        "compared": sum(region.numel for region in target.regions),
    }
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    dist.destroy_process_group()  # gloo's threads may not outlive it
    return everyone


def lossy_gather(planner: Planner) -> str:
    """A full gather that leaves out its last cut, and what the measurement says of it."""
    dist.init_process_group("gloo")
    bind = full_gather.FullGather._cuts

    def lossy(self: Any, region: Any, shard: torch.Tensor) -> list[Any]:
        return list(bind(self, region, shard))[: -1 if "down_proj" in region.hf_name else None]

    full_gather.FullGather._cuts = lossy  # type: ignore[assignment, method-assign]
    try:
        measure.run(planner, torch.float32, 4096, 1, torch.device("cpu"))
    except measure.SyncDiffersError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""


def other_layout(planner: Planner, live: RolloutLayout) -> str:
    """What binding a plan says of engines that are laid out otherwise."""
    dist.init_process_group("gloo")
    rank, cpu = dist.get_rank(), torch.device("cpu")
    there = dataclasses.replace(planner, rollout=live)
    sources, _ = measure._trainer(planner, rank, torch.float32, cpu)
    engine = measure._engine(there, rank, torch.float32, cpu)
    at = engine_coordinates(planner.model, live, rank)
    try:
        Transfer(planner, sources, engine, at, wire=torch.float32, dtype=torch.float32)
    except PlanError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""
