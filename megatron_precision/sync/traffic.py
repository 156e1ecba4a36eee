"""What a plan moves, against the least that any plan could move.

The bounds are computed from the boxes of both sides, not from the plan's cells or routes: a rank
must receive what it needs and has not, a node what its ranks need and none of them has.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.regions import Box, overlap
from megatron_precision.sync.families import Family, Group, Instance, Shard, Side, families
from megatron_precision.sync.plan import Cell, Planner, RankPlan, batches

# Above this many ranks, only those of the first and the last node are planned for the report.
ALL_RANKS = 64


@dataclass(frozen=True)
class RankTraffic:
    """One rank's share, in bytes.

    Attributes:
        copied: from its own trainer to its own engine.
        received, sent: in messages, inside the node and over the network.
        received_bound: the least that it must receive.
        from_network: the part of `received` that crossed between nodes.
        messages: received and sent; a sync that goes by groups of layers may have a few more.
        peers: ranks that it exchanges messages with.
        plan_s: seconds to plan the rank's part, the cells included.
    """

    rank: int
    copied: int
    received: int
    received_bound: int
    from_network: int
    sent: int
    to_network: int
    messages: int
    peers: int
    plan_s: float


@dataclass(frozen=True)
class Traffic:
    """A sync's bytes, for the ranks that were counted.

    Attributes:
        ranks: one entry each.
        network: node → (bytes that enter it, the least that must); of nodes whose ranks were all
            looked at.
        model_bytes: of all weights.
    """

    ranks: list[RankTraffic]
    network: dict[int, tuple[int, int]]
    model_bytes: int


def traffic(planner: Planner, itemsize: int, batch_bytes: int) -> Traffic:
    """Plan a sync and count its bytes.

    Args:
        itemsize: bytes of an element on the wire.
    """
    world = sorted({*planner.trainer.world, *planner.rollout.world})
    chosen = world
    if len(world) > ALL_RANKS:
        ends = {planner.node(world[0]), planner.node(world[-1])}
        chosen = [rank for rank in world if planner.node(rank) in ends]
    found, entered = [], dict[int, int]()
    for rank in chosen:
        fresh = dataclasses.replace(planner)  # without the cells that another rank has made
        begin = time.perf_counter()
        plan = fresh.rank_plan(rank)
        seconds = time.perf_counter() - begin
        row = _rank_traffic(planner, plan, itemsize, batch_bytes, seconds)
        found.append(row)
        node = planner.node(rank)
        entered[node] = entered.get(node, 0) + row.from_network
    network = {
        node: (size, _bound(planner, _members(world, planner, node)) * itemsize)
        for node, size in entered.items()
    }
    elements = sum(
        math.prod(family.shape) * family.count(planner.model) for family in families(planner.model)
    )
    return Traffic(found, network, elements * itemsize)


def _members(world: Sequence[int], planner: Planner, node: int) -> list[int]:
    return [rank for rank in world if planner.node(rank) == node]


def _rank_traffic(
    planner: Planner, plan: RankPlan, itemsize: int, batch_bytes: int, seconds: float
) -> RankTraffic:
    node = planner.node(plan.rank)
    exchanges = (plan.direct, plan.fan_out)
    received = {(p, i): c for i, e in enumerate(exchanges) for p, c in e.receives.items()}
    sent = {(p, i): c for i, e in enumerate(exchanges) for p, c in e.sends.items()}

    def size(exchanged: Iterable[list[Cell]]) -> int:
        return itemsize * sum(cell.numel for cells in exchanged for cell in cells)

    def abroad(exchanged: dict[tuple[int, int], list[Cell]]) -> int:
        return size(c for (peer, _), c in exchanged.items() if planner.node(peer) != node)

    return RankTraffic(
        rank=plan.rank,
        copied=size([plan.copies]),
        received=size(received.values()),
        received_bound=_bound(planner, [plan.rank]) * itemsize,
        from_network=abroad(received),
        sent=size(sent.values()),
        to_network=abroad(sent),
        messages=sum(
            sum(len(batch) for batch in batches(cells, batch_bytes // itemsize))
            for cells in (*received.values(), *sent.values())
        ),
        peers=len({peer for peer, _ in (*received, *sent)}),
        plan_s=seconds,
    )


def _bound(planner: Planner, ranks: Sequence[int]) -> int:
    """Count the elements that some of the ranks need and none of them has."""
    model = planner.model
    have = _Members(planner.trainer, model, set(ranks))
    need = _Members(planner.rollout, model, set(ranks))
    missing = 0
    for family in families(model):
        for at in family.instances(model):
            there = have.boxes(family, at)
            for box in need.boxes(family, at):
                inside = (overlap(box, other) for other in there)
                missing += math.prod(box.shape)
                missing -= sum(math.prod(part.shape) for part in inside if part is not None)
    return missing


class _Members:
    """The boxes of one side that some ranks have."""

    def __init__(self, side: Side, model: ModelConfig, ranks: set[int]) -> None:
        self._side, self._model, self._ranks = side, model, ranks
        self._shards = side.shards(model)
        self._known: dict[Group, bool] = {}

    def boxes(self, family: Family, at: Instance) -> list[Box]:
        """Return the distinct boxes of one tensor."""
        return [shard.box for shard in self._shards[family.template] if self._hold(at, shard)]

    def _hold(self, at: Instance, shard: Shard) -> bool:
        group = self._side.group(self._model, at, shard)
        if group not in self._known:
            self._known[group] = not self._ranks.isdisjoint(self._side.ranks(group))
        return self._known[group]
