"""Computes the bytes of a run's weight sync from its two layouts, in milliseconds for any job size.

A plan (`sync/plan.py`) sends each rank once what its engine needs and its trainer does not have,
and each node once what its ranks need and none of them has. So the received bytes follow from the
regions of both sides, without a plan; tests compare them with plans counted message by message
(`sync/traffic.py`). All layers of a stage and all experts of a rank are divided alike, so each
family of tensors is looked at once for a rank's position, not once for each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_precision.config.schema import RunConfig
from megatron_precision.layouts.regions import overlap
from megatron_precision.precision.policy import BYTES_PER_ELEMENT
from megatron_precision.sync.families import (
    Family,
    RolloutLayout,
    Shard,
    Shards,
    TrainerLayout,
    families,
)


@dataclass(frozen=True)
class SyncBytes:
    """Bytes on the wire of one weight sync.

    Attributes:
        weights: all weights of the model, once.
        copied: copied inside ranks, summed over all ranks.
        received: received in messages, summed over all ranks.
        network: the part of `received` that crosses the network; a byte that several ranks of a
            node need is counted once.
        rank_received: received by the rank that receives most.
        node_network: entering the node that receives most over the network.
        exact: whether a plan moves exactly these bytes; for main copies they are an upper bound.
    """

    weights: int
    copied: int
    received: int
    network: int
    rank_received: int
    node_network: int
    exact: bool


def of_run(config: RunConfig, ranks_per_node: int) -> SyncBytes:
    """Compute the bytes of a weight sync of a valid configuration."""
    layout, model = config.parallel, config.model
    trainer = TrainerLayout(
        layout.world_size, layout.tp_size, layout.pp_size, layout.ep_size, layout.etp_size
    )
    sides = _Sides(config, trainer, RolloutLayout(layout.world_size, layout.rollout_tp_size))
    itemsize = BYTES_PER_ELEMENT[config.policy.wire]
    world = range(layout.world_size)
    ranks = [sides.balance([rank]) for rank in world]
    nodes = [
        sides.balance(range(first, min(first + ranks_per_node, layout.world_size)))
        for first in range(0, layout.world_size, ranks_per_node)
    ]
    missing = [balance.missing * itemsize for balance in ranks]
    entering = [balance.missing * itemsize for balance in nodes]
    weights = sum(math.prod(f.shape) * _count(f, config) for f in families(model))
    return SyncBytes(
        weights=weights * itemsize,
        copied=sum(balance.there for balance in ranks) * itemsize,
        received=sum(missing),
        network=sum(entering),
        rank_received=max(missing),
        node_network=max(entering),
        exact=config.policy.wire_source == "parameters",
    )


@dataclass(frozen=True)
class _Balance:
    """Elements that the engines of some ranks need.

    Attributes:
        there: elements that the trainers of the same ranks have.
        missing: all other elements.
    """

    there: int
    missing: int


# A rank's position: (in its engine, in TP, in expert TP, in expert parallelism, pipeline stage).
_Place = tuple[int, int, int, int, int]


class _Sides:
    """Compares the regions that both layouts of a run give to its ranks."""

    def __init__(self, config: RunConfig, trainer: TrainerLayout, rollout: RolloutLayout) -> None:
        self._config, self._trainer, self._rollout = config, trainer, rollout
        self._families = families(config.model)
        self._have: Shards = trainer.shards(config.model)
        self._need: Shards = rollout.shards(config.model)
        self._balances: dict[tuple[_Place, ...], _Balance] = {}
        self._overlaps: dict[tuple[str, frozenset[int], frozenset[int]], int] = {}

    def balance(self, ranks: Iterable[int]) -> _Balance:
        """Return the balance of some ranks together; equal positions are computed once."""
        places = tuple(sorted({self._place(rank) for rank in ranks}))
        if places not in self._balances:
            self._balances[places] = self._of_places(places)
        return self._balances[places]

    def _place(self, rank: int) -> _Place:
        t = self._trainer
        stage, within = divmod(rank, t.size // t.pp)
        return rank % self._rollout.tp, within % t.tp, within % t.etp, within // t.etp % t.ep, stage

    def _of_places(self, places: tuple[_Place, ...]) -> _Balance:
        positions = frozenset(place[0] for place in places)
        needed = there = 0
        for family in self._families:
            boxes = [s for s in self._need[family.template] if positions.intersection(s.positions)]
            needed += _count(family, self._config) * sum(_size(shard) for shard in boxes)
            if self._config.policy.wire_source == "main_copies":
                continue  # Megatron decides which range of a main copy a rank has
            for count, holders in self._holders(family, places):
                there += count * self._shared(family.template, positions, holders)
        return _Balance(there, needed - there)

    def _holders(
        self, family: Family, places: tuple[_Place, ...]
    ) -> Iterator[tuple[int, frozenset[int]]]:
        """Yield how many tensors of the family are divided alike, and the positions with a part."""
        t, model = self._trainer, self._config.model
        layers = model.num_hidden_layers // t.pp
        groups: dict[tuple[int, int], set[int]] = {}
        if "{expert}" in family.template:
            for _, _, etp, ep, stage in places:
                groups.setdefault((stage, ep), set()).add(etp)
            count = layers * (model.num_experts // t.ep)
        else:
            only = None
            if "{layer}" not in family.template:
                only = 0 if family.template == "model.embed_tokens.weight" else t.pp - 1
            for _, tp, _, _, stage in places:
                if only in (None, stage):
                    groups.setdefault((stage, 0), set()).add(tp)
            count = layers if only is None else 1
        for holders in groups.values():
            yield count, frozenset(holders)

    def _shared(self, template: str, needers: frozenset[int], holders: frozenset[int]) -> int:
        """Count the elements of one tensor that needers and holders share."""
        key = (template, needers, holders)
        if key not in self._overlaps:
            self._overlaps[key] = self._shared_boxes(template, needers, holders)
        return self._overlaps[key]

    def _shared_boxes(self, template: str, needers: frozenset[int], holders: frozenset[int]) -> int:
        found = 0
        for target in self._need[template]:
            for source in self._have[template]:
                if needers.isdisjoint(target.positions) or holders.isdisjoint(source.positions):
                    continue
                box = overlap(source.box, target.box)
                found += math.prod(box.shape) if box else 0
        return found


def _size(shard: Shard) -> int:
    return math.prod(shard.box.shape)


def _count(family: Family, config: RunConfig) -> int:
    """Return the number of tensors in a family."""
    layers = config.model.num_hidden_layers if "{layer}" in family.template else 1
    return layers * (config.model.num_experts if "{expert}" in family.template else 1)
