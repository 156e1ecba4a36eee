"""The full gather, for comparison: every parameter whole on every rank, one after the other.

As the systems in use do it: tensor- and expert-parallel ranks gather a parameter, its pipeline
stage broadcasts it to the others, a first trainer broadcasts it to engines elsewhere, and each rank
cuts out what its engine needs. It is given every advantage: the gathered shards are not put
together into a tensor first, all cuts are found beforehand, and one buffer serves all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from benchmarks.sync.parameters import RankParameter, trainer_parameters
from megatron_precision.layouts.regions import Box, Region, overlap
from megatron_precision.sync.families import TrainerLayout
from megatron_precision.sync.plan import Cell, Planner, common_slabs
from megatron_precision.sync.transport import RegionTensors, view_of

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class _Parameter:
    """One parameter: gathered by its stage, broadcast to the other ranks, and cut.

    Attributes:
        own: this rank's shard; None where another stage has it.
        gathered: [shards, elements], in the buffer.
        shards: the ranks that gather it; where this rank is one of them.
        relays: (from, ranks) of the broadcasts that this rank takes part in.
        cuts: (part of `gathered`, part of the engine).
    """

    own: torch.Tensor | None
    gathered: torch.Tensor
    shards: Ranks
    relays: list[tuple[int, Ranks]]
    cuts: list[tuple[torch.Tensor, torch.Tensor]]


class FullGather:
    """One rank's part; every rank of the world makes one.

    Args:
        weights: this rank's trainer, by parameter.
        targets: the engine's regions on this rank.
        wire: dtype of what is gathered.

    Attributes:
        received: bytes that come from other ranks.
    """

    def __init__(
        self,
        planner: Planner,
        weights: Mapping[str, torch.Tensor],
        targets: RegionTensors,
        *,
        wire: torch.dtype,
        device: torch.device,
    ) -> None:
        self._planner, self._rank, self._wire = planner, dist.get_rank(), wire
        self._targets: dict[str, list[tuple[Region, torch.Tensor]]] = {}
        for region, tensor in targets:
            self._targets.setdefault(region.hf_name, []).append((region, tensor))
        self._groups = {ranks: dist.new_group(list(ranks)) for ranks in _all_groups(planner)}
        layout = planner.trainer
        shards = [(s, found) for s in range(layout.pp) for found in _sharded(planner, s)]
        longest = max(len(found) * math.prod(found[0].shape) for _, found in shards)
        self._buffer = torch.empty(longest, dtype=wire, device=device)
        self._parameters = [self._bind(stage, found, weights) for stage, found in shards]
        self.received = sum(self._received(parameter) for parameter in self._parameters)

    @property
    def buffer_bytes(self) -> int:
        """What the gathered parameter takes."""
        return self._buffer.nbytes

    @torch.no_grad()
    def run(self) -> None:
        """Bring the engine up to date; every rank calls it."""
        for parameter in self._parameters:
            if parameter.own is not None:
                own = parameter.own.to(self._wire).flatten()
                if len(parameter.shards) > 1:
                    group = self._groups[parameter.shards]
                    dist.all_gather_into_tensor(parameter.gathered.view(-1), own, group=group)
                else:
                    parameter.gathered.view(-1).copy_(own)
            for source, ranks in parameter.relays:
                dist.broadcast(parameter.gathered, source, group=self._groups[ranks])
            for gathered, target in parameter.cuts:
                target.copy_(gathered)

    def _bind(
        self, stage: int, shards: Sequence[RankParameter], weights: Mapping[str, torch.Tensor]
    ) -> _Parameter:
        layout, rank = self._planner.trainer, self._rank
        numel = math.prod(shards[0].shape)
        gathered = self._buffer[: len(shards) * numel].view(len(shards), numel)
        relays: list[tuple[int, Ranks]] = []
        own, members = None, Ranks()
        if rank in layout.world:
            if _stage(layout, rank) == stage:
                own = weights[shards[0].name]
                members = _gathering(layout, rank, len(shards))
            if layout.pp > 1:
                ranks = _pipeline(layout, rank)
                relays.append((ranks[stage], ranks))
        to_engines = _to_engines(self._planner)
        if rank in to_engines:
            relays.append((to_engines[0], to_engines))
        cuts = [
            cut
            for parameter, shard in zip(shards, gathered, strict=True)
            for region in parameter.regions
            for cut in self._cuts(region, shard.view(parameter.shape))
        ]
        return _Parameter(own, gathered, members, relays, cuts)

    def _cuts(
        self, region: Region, shard: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for needed, tensor in self._targets.get(region.hf_name, ()):
            shared = overlap(Box(region.start, region.shape), Box(needed.start, needed.shape))
            if shared is None:
                continue
            begin = shared.start[0]
            for a, b in common_slabs(region, needed, begin, begin + shared.shape[0]):
                start, shape = (a, *shared.start[1:]), (b - a, *shared.shape[1:])
                cell = Cell(region.hf_name, start, shape)
                view = view_of(cell, region, shard)
                yield view, view_of(cell, needed, tensor).view(view.shape)

    def _received(self, parameter: _Parameter) -> int:
        whole = parameter.gathered.nbytes
        if parameter.own is not None:
            return whole - whole // len(parameter.gathered)
        return whole


def _sharded(planner: Planner, stage: int) -> Iterator[list[RankParameter]]:
    """The parameters of a stage, each as the shards of the ranks that gather it."""
    layout = planner.trainer
    first = layout.first + stage * (layout.size // layout.pp)
    # Ranks follow one another in both grids: a parameter's shards are those of the first ones.
    most = max(layout.tp, layout.etp * layout.ep)
    held = [
        {h.name: h for h in trainer_parameters(planner.model, layout, first + n)}
        for n in range(most)
    ]
    for name in held[0]:
        count = layout.etp * layout.ep if ".experts." in name else layout.tp
        yield [held[n][name] for n in range(count)]


def _stage(layout: TrainerLayout, rank: int) -> int:
    return (rank - layout.first) // (layout.size // layout.pp)


def _gathering(layout: TrainerLayout, rank: int, count: int) -> Ranks:
    begin = rank - (rank - layout.first) % (layout.size // layout.pp) % count
    return tuple(range(begin, begin + count))


def _pipeline(layout: TrainerLayout, rank: int) -> Ranks:
    per_stage = layout.size // layout.pp
    within = (rank - layout.first) % per_stage
    return tuple(layout.first + stage * per_stage + within for stage in range(layout.pp))


def _to_engines(planner: Planner) -> Ranks:
    """A first trainer and the engines, where they are apart."""
    trainers, engines = planner.trainer.world, planner.rollout.world
    return () if engines[0] in trainers else (trainers[0], *engines)


def _all_groups(planner: Planner) -> list[Ranks]:
    """Every group of any rank, in one order on all of them."""
    layout = planner.trainer
    groups = {_to_engines(planner)}
    for rank in layout.world:
        groups |= {_gathering(layout, rank, n) for n in (layout.tp, layout.etp * layout.ep)}
        groups.add(_pipeline(layout, rank))
    return sorted(ranks for ranks in groups if len(ranks) > 1)
